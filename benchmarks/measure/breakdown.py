"""Where the time of the model goes: its forward split into parts, for the baseline and for ours.

For the first whole model in the results of a run; written beside them, for `report`. A GPU
is waited for before and behind every part, so that the whole takes longer than the run says.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command import options, outputs
from benchmarks.command.table import FittedTable, significant
from benchmarks.measure.record import read
from benchmarks.providers import baselines as eager
from equiseg_fast import EQUISeg
from equiseg_fast import nn as ours

FILE = "breakdown.json"
SEAMS = ("baseline", "torch", "triton")
"""Providers that have parts; a compiled model has none."""
REPEATS = 3
REST = "norms, residuals, copies"
"""What no part claims."""
Label = Callable[[Any], str]
"""The part, by the first argument of a function; "" for none."""


def _attention(layer: Any) -> str:
    own = isinstance(layer, ours.EfficientSelfAttention)
    return "self-attention" if own else "cross-attention"


def _embedding(conv: torch.nn.Conv2d) -> str:
    # The other convolutions with a stride reduce keys, inside attention.
    return "patch embedding" if conv.stride[0] > 1 else ""


PARTS: tuple[tuple[str | Label, Any, str], ...] = (
    (_embedding, torch.nn.Conv2d, "forward"),
    (_attention, ours.CrossModalAttention, "forward"),
    (_attention, ours.EfficientSelfAttention, "forward"),
    (_attention, eager, "_attention_layer"),
    ("Mix-FFN", ours.MixFFN, "forward"),
    ("Mix-FFN", eager, "_mix_ffn"),
    ("query hub", ours.SelfQueryHub, "forward"),
    ("query hub", eager, "hub_of"),
    ("pooling mixer", ours.ParallelPoolingMixer, "forward"),
    ("pooling mixer", eager, "_pooling_mixer_block"),
    ("gate", EQUISeg, "_balance"),
    ("gate", eager, "balance"),
    ("head", EQUISeg, "_head"),
    ("head", eager.EagerBaseline, "_head"),
)
"""The functions that are a part, each with its owner."""


def split(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds per part of one call, and of the REST; they add up to the time of the call. What a
    part calls belongs to it."""
    spent: defaultdict[str, float] = defaultdict(float)
    inside = False

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    def watched(label: str | Label, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            part = label if isinstance(label, str) else label(first)
            if inside or not part:
                return function(first, *args, **kwargs)
            inside, begin = True, now()
            result = function(first, *args, **kwargs)
            spent[part] += now() - begin
            inside = False
            return result

        return run

    with ExitStack() as stack, torch.no_grad():
        for label, owner, name in PARTS:
            new = watched(label, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, new))
        begin = now()
        call()
        whole = now() - begin
    return {**spent, REST: whole - sum(spent.values())}


def measure(
    shape: Shape, dtype: str, device: torch.device, providers: Iterable[str]
) -> dict[str, Any]:
    """{"label": of the case, "providers": {provider: {part: seconds}}}, each of the run whose time
    is the median of REPEATS; only providers that have parts."""
    problem = operations()["model"].build(shape, DTYPES[dtype], device, 0)
    found = {}
    for provider in (p for p in providers if p in SEAMS):
        call = problem.calls[provider]
        split(call, device)  # warm
        runs = [split(call, device) for _ in range(REPEATS)]
        found[provider] = sorted(runs, key=lambda parts: sum(parts.values()))[REPEATS // 2]
    return {"label": f"model fwd {shape.label} {dtype}", "providers": found}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks breakdown`."""
    parser.add_argument(
        "results", type=options.to_path, help="the folder of a run with the whole model"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    options.threads_argument(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises ValueError if the results have no whole model."""
    device = options.choose_device(args.device)
    options.use_threads(args.threads)
    options.full_fp32()
    measured = [r for r in read(args.results) if r.op == "model" and r.p50_us is not None]
    if not measured:
        raise ValueError(f"{args.results} must have times of the operation model; it has none")
    first = measured[0]
    providers = [r.provider for r in measured if r.group == first.group]
    found = measure(first.shape, first.dtype, device, providers)
    folder: Path = args.results if args.results.is_dir() else args.results.parent
    outputs.write(folder / FILE, json.dumps(found, indent=1) + "\n")
    times = found["providers"]
    table = FittedTable(("part", *times), words=("part",), title=f"ms of {found['label']}")
    for part in dict.fromkeys(part for parts in times.values() for part in parts):
        seconds = [parts.get(part) for parts in times.values()]
        table.add_row(part, *(significant(s and 1e3 * s) for s in seconds))
    console.print(table)
    console.print(f"written to {folder / FILE}; `report {folder}` shows it", soft_wrap=True)
    return 0

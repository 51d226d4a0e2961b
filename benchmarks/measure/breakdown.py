"""Where the time of the model goes: its forward split into parts, for the baseline and for ours.

For the first whole model in the results of a run; written beside them, for `report` to draw. What
is one part is timed as a whole while the model runs, with the clock on a CPU and with events on a
GPU (where gaps between kernels count, too: no CUDA graph hides them).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import (
    choose_device,
    full_fp32,
    threads_argument,
    to_path,
    use_threads,
)
from benchmarks.command.table import FittedTable, significant
from benchmarks.measure.record import read
from benchmarks.providers import baseline_model
from equiseg_fast.models import EQUISeg
from equiseg_fast.nn import (
    CrossModalAttention,
    EfficientSelfAttention,
    MixFFN,
    ParallelPoolingMixer,
    SelfQueryHub,
)

FILE = "breakdown.json"
SEAMS = ("baseline", "torch", "triton")
"""Providers that have parts; a compiled model has none."""
REPEATS = 3
REST = "norms, residuals, copies"
"""What no part claims."""


def _attention(layer: Any) -> str:
    return "self-attention" if isinstance(layer, EfficientSelfAttention) else "cross-attention"


def _embedding(conv: nn.Conv2d) -> str:
    # The other convolutions with a stride reduce keys, inside attention.
    return "patch embedding" if conv.stride[0] > 1 else ""


WATCHED: tuple[tuple[Any, str, str | Callable[[Any], str]], ...] = (
    (nn.Conv2d, "forward", _embedding),
    (CrossModalAttention, "forward", "cross-attention"),
    (EfficientSelfAttention, "forward", "self-attention"),
    (baseline_model, "_attention_layer", _attention),
    (MixFFN, "forward", "Mix-FFN"),
    (baseline_model, "_mix_ffn", "Mix-FFN"),
    (SelfQueryHub, "forward", "query hub"),
    (baseline_model, "hub_of", "query hub"),
    (ParallelPoolingMixer, "forward", "pooling mixer"),
    (baseline_model, "_pooling_mixer_block", "pooling mixer"),
    (EQUISeg, "_balance", "gate"),
    (baseline_model, "balance", "gate"),
    (EQUISeg, "_head", "head"),
    (baseline_model.EagerBaseline, "_head", "head"),
)
"""Functions that are a part, by name or by their first argument ("": no part). What runs inside a
part belongs to it."""


@contextmanager
def watching(mark: Callable[[], Any]) -> Iterator[list[tuple[str, Any, Any]]]:
    """Parts that run inside, each with the marks before and behind it."""
    spans: list[tuple[str, Any, Any]] = []
    inside = False

    def watched(function: Callable[..., Any], part: str | Callable[[Any], str]) -> Any:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            name = part if isinstance(part, str) else part(first)
            if inside or not name:
                return function(first, *args, **kwargs)
            inside, begin = True, mark()
            try:
                return function(first, *args, **kwargs)
            finally:
                spans.append((name, begin, mark()))
                inside = False

        return call

    with ExitStack() as stack:
        for owner, name, part in WATCHED:
            new = watched(getattr(owner, name), part)
            stack.enter_context(patch.object(owner, name, new))
        yield spans


def split(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds per part of one call, and of the REST; they add up to the time of the call."""
    cuda = device.type == "cuda"

    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    def seconds(begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if cuda else end - begin

    mark = event if cuda else perf_counter
    with watching(mark) as spans, torch.no_grad():
        begin = mark()
        call()
        end = mark()
    if cuda:
        torch.cuda.synchronize(device)
    parts: Counter[str] = Counter()
    for part, *span in spans:
        parts[part] += seconds(*span)
    return {**parts, REST: seconds(begin, end) - sum(parts.values())}


def measure(
    shape: Shape, dtype: str, device: torch.device, providers: Iterable[str], seed: int = 0
) -> dict[str, Any]:
    """{"label": of the case, "providers": {provider: {part: seconds}}}, each of the run whose time
    is the median of REPEATS; only providers that have parts."""
    problem = operations()["model"].build(shape, DTYPES[dtype], device, seed)
    found = {}
    for provider in (p for p in providers if p in SEAMS):
        call = problem.calls[provider]
        split(call, device)  # warm
        runs = [split(call, device) for _ in range(REPEATS)]
        found[provider] = sorted(runs, key=lambda parts: sum(parts.values()))[REPEATS // 2]
    return {"label": f"model fwd {shape.label} {dtype}", "providers": found}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks breakdown`."""
    parser.add_argument("results", type=to_path, help="the folder of a run with the whole model")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    threads_argument(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises ValueError if the results have no whole model."""
    device = choose_device(args.device)
    use_threads(args.threads)
    full_fp32()
    measured = [r for r in read(args.results) if r.op == "model" and r.p50_us is not None]
    if not measured:
        raise ValueError(f"{args.results} must have times of the operation model; it has none")
    first = measured[0]
    providers = [r.provider for r in measured if r.group == first.group]
    found = measure(first.shape, first.dtype, device, providers, args.seed)
    folder: Path = args.results if args.results.is_dir() else args.results.parent
    outputs.write(folder / FILE, json.dumps(found, indent=1) + "\n")
    times = found["providers"]
    table = FittedTable(("part", *times), words=("part",), title=f"ms of {found['label']}")
    for part in dict.fromkeys(part for parts in times.values() for part in parts):
        seconds = [parts.get(part) for parts in times.values()]
        table.add_row(part, *(significant(s and 1e3 * s) for s in seconds))
    console.print(table)
    console.print(f"written to {folder / FILE}; `report {folder}` draws it", soft_wrap=True)
    return 0

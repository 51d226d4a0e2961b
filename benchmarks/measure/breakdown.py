"""Where the time of the model goes: its forward split into parts, for the baseline and for ours.

For the first whole model in the results of a run; written beside them, for `report` to draw. The
functions and modules that are one part each are watched while the model runs, with the clock on a
CPU and with events on a GPU (where gaps between kernels count, too: no CUDA graph hides them). What
no part claims is the rest: norms, residuals, copies. A compiled model has no such seams.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

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
from benchmarks.providers import baselines as baseline_model
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
"""Providers that have parts."""
REPEATS = 3
REST = "norms, residuals, copies"

Label = Callable[[Any], str | None]
"""Of the first argument: the part, None for no part."""


def _attention(layer: Any) -> str:
    return "self-attention" if isinstance(layer, EfficientSelfAttention) else "cross-attention"


def _embedding(conv: nn.Conv2d) -> str | None:
    # The other convolutions with a stride reduce keys, inside attention.
    return "patch embedding" if conv.stride[0] > 1 else None


def _always(name: str) -> Label:
    return lambda _: name


WATCHED: tuple[tuple[Any, str, Label], ...] = (
    (nn.Conv2d, "forward", _embedding),
    (CrossModalAttention, "forward", _attention),
    (EfficientSelfAttention, "forward", _attention),
    (baseline_model, "_attention_layer", _attention),
    (MixFFN, "forward", _always("Mix-FFN")),
    (baseline_model, "_mix_ffn", _always("Mix-FFN")),
    (SelfQueryHub, "forward", _always("query hub")),
    (baseline_model, "hub_of", _always("query hub")),
    (ParallelPoolingMixer, "forward", _always("pooling mixer")),
    (baseline_model, "_pooling_mixer_block", _always("pooling mixer")),
    (EQUISeg, "_balance", _always("gate")),
    (baseline_model, "balance", _always("gate")),
    (EQUISeg, "_head", _always("head")),
    (baseline_model.EagerBaseline, "_head", _always("head")),
)


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
    names = list(found["providers"])
    table = FittedTable(("part", *names), words=("part",), title=f"ms of {found['label']}")
    for part in dict.fromkeys(part for name in names for part in found["providers"][name]):
        seconds = [found["providers"][name].get(part) for name in names]
        table.add_row(part, *(significant(s and 1e3 * s) for s in seconds))
    console.print(table)
    console.print(f"written to {folder / FILE}; `report {folder}` draws it", soft_wrap=True)
    return 0


class Stopwatch:
    """Spans of parts; what runs inside a part belongs to it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inside = False
        self.spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin

    def watched(self, function: Callable[..., Any], label: Label) -> Callable[..., Any]:
        @wraps(function)
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            part = None if self.inside else label(first)
            if part is None:
                return function(first, *args, **kwargs)
            self.inside, begin = True, self.mark()
            try:
                return function(first, *args, **kwargs)
            finally:
                self.spans.append((part, begin, self.mark()))
                self.inside = False

        return call

    @contextmanager
    def on(self) -> Iterator[None]:
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in WATCHED]
        try:
            for owner, name, label in WATCHED:
                setattr(owner, name, self.watched(getattr(owner, name), label))
            yield
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)


def split(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds per part of one call, and of the REST; they add up to the time of the call."""
    watch = Stopwatch(device)
    with watch.on(), torch.no_grad():
        begin = watch.mark()
        call()
        end = watch.mark()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    parts: dict[str, float] = {}
    for part, *span in watch.spans:
        parts[part] = parts.get(part, 0.0) + watch.seconds(*span)
    return parts | {REST: watch.seconds(begin, end) - sum(parts.values())}


def measure(
    shape: Shape, dtype: str, device: torch.device, providers: Iterable[str], seed: int = 0
) -> dict[str, Any]:
    """{"label": of the case, "providers": {provider: {part: seconds}}}, each of the run whose time
    is the median of REPEATS; only providers that have parts."""
    problem = operations()["model"].build(shape, DTYPES[dtype], device, seed)
    found = {}
    for provider in providers:
        if provider in SEAMS:
            call = problem.calls[provider]
            with torch.no_grad():
                call()
            runs = sorted((split(call, device) for _ in range(REPEATS)), key=_total)
            found[provider] = runs[len(runs) // 2]
    return {"label": f"model fwd {shape.label} {dtype}", "providers": found}


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())

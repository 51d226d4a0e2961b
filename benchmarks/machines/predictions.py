"""How long everything that a visit to a GPU times should take, written down before the visit.

Every case runs on tensors of "meta" at its full size, and each kernel takes the longest of what it
needs from each unit of the GPU, at the share of the unit's rate that its kind is assumed to reach,
and a gap before the next; nothing here was measured on the kernels themselves. Written is also by
which of the `ASSUMPTIONS` the time is spent. The summary of a visit puts measured times beside it.

A time is that of kernels in a row, as in a CUDA graph. That the baseline waits for values (which
classes there are) is left out, but each of its masks counts as if it selected everything.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, MODES
from benchmarks.command import outputs
from benchmarks.command.options import ROOT, to_path
from benchmarks.machines.gpus import GPUS, Gpu
from benchmarks.measure.kernel_work import Kernel
from benchmarks.measure.launches import count
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.measure.record import Key

FOLDER = ROOT / "benchmarks" / "results" / "predictions"
PROVIDERS = ("baseline", "torch", "triton")
LARGE = (("variant", "b2"), ("height", "1024"), ("width", "1024"))
"""The model that is timed beside those of the suite."""
TOLERANCE = 0.01
"""By how much a time may differ from the one committed: releases of PyTorch do in places."""
LEAST = 0.005
"""Smaller shares of a time are not written."""

LANES = 128
"""Instructions that an SM can issue per clock, counted for every lane."""
CLOCK_UNDER_LOAD, COPY, PRODUCT = 0.96, 0.8957, 0.8025
"""Of the published clock, bandwidth and bf16 peak, what H100 and H200 have shown: copies of 3.0 and
4.3 TB/s, large products of 798 and 790 TFLOP/s."""
MEMORY, PRODUCTS = "copy bandwidth", "a large product"
ISSUE, SCORES = "the issue slots", "its bound"
"""What shares are of. `PRODUCTS`: tensor cores as a large product sustains them, or FP32 lanes.
`SCORES`: the slower of tensor cores and exponentials at their peak."""
GAP = "launch gap"
ASSUMPTIONS = {
    "HBM of our kernels": (0.80, MEMORY, "ours|attention .*"),
    "issue slots of our kernels": (0.75, ISSUE, "ours"),
    "attention forward D=32": (0.56, SCORES, "attention forward D=32"),
    "attention forward D=64": (0.44, SCORES, "attention forward D=64"),
    "attention backward D=32": (0.31, SCORES, "attention backward D=32"),
    "attention backward D=64": (0.31, SCORES, "attention backward D=64"),
    "SDPA forward D=32": (0.41, SCORES, "SDPA forward D=32"),
    "SDPA forward D=64": (0.34, SCORES, "SDPA forward D=64"),
    "SDPA backward": (0.26, SCORES, "SDPA backward"),
    "GEMM, memory": (0.80, MEMORY, "GEMM"),
    "GEMM, tensor cores": (0.70, PRODUCTS, "GEMM"),
    "weight-gradient GEMM, memory": (0.70, MEMORY, "weight-gradient GEMM"),
    "weight-gradient GEMM, tensor cores": (0.55, PRODUCTS, "weight-gradient GEMM"),
    "convolution, memory": (0.50, MEMORY, "convolution"),
    "convolution, tensor cores": (0.50, PRODUCTS, "convolution"),
    "stock stencil, memory": (0.40, MEMORY, "stencil"),
    "stock stencil, issue slots": (1.0, ISSUE, "stencil"),
    "stock pointwise": (0.85, MEMORY, "pointwise|interpolation|SDPA .*"),
    "stock reduction": (0.75, MEMORY, "reduction"),
    "transposing copy": (0.55, MEMORY, "transposing copy"),
    "LayerNorm forward": (0.80, MEMORY, "LayerNorm forward"),
    "LayerNorm backward": (0.55, MEMORY, "LayerNorm backward"),
    "BatchNorm": (0.60, MEMORY, "BatchNorm"),
    "bilinear backward": (0.25, MEMORY, "bilinear backward"),
    GAP: (1.5, "us", ""),
}
"""Which share, of what, and the kinds of kernels that this limits; the gap in microseconds."""


@cache
def limiting(kind: str) -> list[str]:
    """The assumptions about a kind of kernel."""
    return [name for name, (*_, kinds) in ASSUMPTIONS.items() if re.fullmatch(kinds, kind)]


def needed(kernel: Kernel, gpu: Gpu) -> dict[str, float]:
    """Seconds that a kernel needs of each unit at its full rate."""
    peak, load = gpu.peak, CLOCK_UNDER_LOAD
    vector = kernel.vector / peak["fp32"] / load
    scores = max(kernel.matrix / peak["bf16"] / load + vector, kernel.exps / gpu.limits.exps / load)
    # A grid with fewer programs than there are SMs leaves some of them idle.
    idle = max(1.0, gpu.num_sms / kernel.programs) if kernel.programs else 1.0
    return {
        MEMORY: kernel.bytes / gpu.bandwidth / COPY,
        PRODUCTS: kernel.matrix / peak["bf16"] / PRODUCT + vector,
        ISSUE: kernel.slots / (LANES * gpu.num_sms * gpu.clock) / load,
        SCORES: idle * scores,
    }


def spend(kernels: Iterable[Kernel], gpu: Gpu) -> dict[str, float]:
    """Microseconds of kernels one after the other, by assumption; the sum is the time."""
    spent: dict[str, float] = {}
    for kernel in kernels:
        units, times = needed(kernel, gpu), {}
        for name in limiting(kernel.kind):
            share, unit, _ = ASSUMPTIONS[name]
            times[name] = 1e6 * units[unit] / share
        longest = max(times, key=lambda name: times[name])
        spent[longest] = spent.get(longest, 0.0) + times[longest]
        spent[GAP] = spent.get(GAP, 0.0) + ASSUMPTIONS[GAP][0]
    return spent


@dataclass(frozen=True)
class Prediction:
    """Of one provider on one case in one mode; op to provider as in `record.Record`.

    us: predicted, per call; kernels, gb, tflop: launches, bytes / 1e9 and FLOPs of products / 1e12
    of a call; spent: microseconds by assumption, the largest first.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    us: float
    kernels: int
    gb: float
    tflop: float
    spent: dict[str, float]

    @property
    def key(self) -> Key:
        return (self.op, self.shape, self.dtype, self.mode, self.provider)


def cases() -> list[Case]:
    """The suite core, and the large model in inference and training."""
    core = Options(suite="core", device="cuda")
    return plan(core) + plan(replace(core, ops=("model", "training"), at=LARGE))


def modes_of(case: Case) -> list[str]:
    """Those of the case, and both halves of a step of more than an operation."""
    halves = ("fwd_train", "bwd") if case.op.scope != "operation" and "step" in case.modes else ()
    return [m for m in MODES if m in case.modes or (m in halves and m in case.op.modes)]


def kernels_of(case: Case, provider: str, mode: str, gpu: Gpu) -> list[Kernel]:
    """What one provider launches in a mode."""
    facts = gpu.capability, gpu.num_sms
    calls = count(case.op, case.shape, DTYPES[case.dtype], provider, mode != "fwd", facts)
    phase = {"fwd_train": "fwd", "bwd": "bwd"}.get(mode)
    return [kernel for call in calls if phase in (None, call.phase) for kernel in call.kernels]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def predict(chosen: Iterable[Case], gpu: Gpu) -> list[Prediction]:
    """All rows of the cases on a GPU."""
    rows = []
    for case in chosen:
        for provider in (p for p in PROVIDERS if p in case.providers):
            for mode in modes_of(case):
                kernels = kernels_of(case, provider, mode, gpu)
                spent = spend(kernels, gpu)
                us = sum(spent.values())
                shown = sorted((-x, name) for name, x in spent.items() if x >= LEAST * us)
                flops = sum(k.matrix + k.vector for k in kernels)
                rows.append(Prediction(
                    case.op.name, case.shape.label, case.dtype, mode, provider, _short(us),
                    len(kernels), _short(sum(k.bytes for k in kernels) / 1e9),
                    _short(flops / 1e12), {name: _short(-x) for x, name in shown},
                ))  # fmt: skip
    return rows


def read(gpu: str, folder: Path = FOLDER) -> list[Prediction]:
    """What was written for a GPU, a key of `gpus.GPUS`; empty where nothing was."""
    path = folder / f"{gpu}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Prediction(**json.loads(line)) for line in lines]


def differences(before: Iterable[Prediction], now: Iterable[Prediction]) -> Iterator[str]:
    """Times that differ by more than the tolerance; 0 where there is no such row."""
    old, new = ({" ".join(row.key): row.us for row in rows} for rows in (before, now))
    for name in sorted(old.keys() | new.keys()):
        us, now_us = old.get(name, 0.0), new.get(name, 0.0)
        if abs(now_us - us) > TOLERANCE * us:
            yield f"{name}: {us:.4g} us are {now_us:.4g} us now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks predict`."""
    parser.add_argument("--gpu", type=str.lower, choices=tuple(GPUS), help="default: h100 and h200")
    parser.add_argument("--out", type=to_path, default=FOLDER, help="default: %(default)s")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit with 1 if what is there is stale"
    )


def main(args: argparse.Namespace, console: Console) -> int:
    """Write or check the files; the exit status says whether some are stale."""
    if not args.check:
        outputs.writable(args.out)
    stale = False
    for name in [args.gpu] if args.gpu else ["h100", "h200"]:
        rows, path = predict(cases(), GPUS[name]), args.out / f"{name}.jsonl"
        if args.check:
            found = list(differences(read(name, args.out), rows))
            stale = stale or bool(found)
            result = [*found[:10], f"{path.name}: {len(rows)} rows, {len(found)} differ"]
            console.print("\n".join(result), markup=False, soft_wrap=True)
            continue
        outputs.write(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        console.print(f"{path.name}: {len(rows)} rows; predicted, not measured:")
        for row in rows:
            if operations()[row.op].scope == "model":
                console.print(f"{' '.join(row.key)}: {row.us / 1e3:.2f} ms, {row.kernels} kernels")
    return int(stale)

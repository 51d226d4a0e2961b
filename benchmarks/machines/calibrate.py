"""What a device can do here and now: copy, multiply, exponentiate, launch.

Everything runs on random data, because a GPU clocks higher on zeros than on anything real. `run`
takes the limits of its roofline from the same measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cases.common.cost import Limits
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, to_path
from benchmarks.command.table import FittedTable
from benchmarks.machines import gpus
from benchmarks.measure.record import environment
from benchmarks.measure.timing import Timing

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
ROUNDS = {"cuda": 50, "cpu": 25}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCHES = 200
SLOW_PRODUCT = 1.0
"""Seconds."""


@dataclass(frozen=True)
class Sizes:
    """copy: elements of the fp32 tensor that is copied. matrix: rows of the square matrices. exps:
    elements of the tensor whose exponentials are taken."""

    copy: int
    matrix: int
    exps: int


SIZES = {
    "cuda": Sizes(copy=2**28, matrix=8192, exps=2**22),
    "cpu": Sizes(copy=2**24, matrix=1024, exps=2**18),
}


@dataclass(frozen=True)
class Measurement:
    """name: "copy", "exps", "launch", "launch in a row", or a dtype of a matrix product. amount:
    bytes, exponentials, launches or FLOPs of one call, seconds how long a call took: the best, and
    quantiles over n calls."""

    name: str
    unit: str
    amount: float
    best: float
    p20: float
    p50: float
    p80: float
    n: int

    @property
    def rate(self) -> float:
        """Amount per second, of the best call."""
        return self.amount / self.best

    @property
    def median_rate(self) -> float:
        return self.amount / self.p50


def measure(
    device: torch.device, dtypes: Mapping[str, torch.dtype], rounds: int | None = None
) -> list[Measurement]:
    """Copy bandwidth, matrix products of these dtypes ("tf32" is fp32 that may be rounded to TF32)
    and exponentials; a GPU without Triton has no measurement of those. rounds: None for `ROUNDS`.
    """
    sizes = SIZES[device.type]
    source = torch.randn(sizes.copy, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    found = [_timed("copy", "B/s", 2 * source.nbytes, copy, device, rounds)]
    del source, copy
    found += [_product(name, dtype, sizes.matrix, device, rounds) for name, dtype in dtypes.items()]
    if device.type == "cpu":
        x, out = torch.rand(2, sizes.exps)
        call: Callable[[], Any] = partial(torch.exp, x, out=out)
        found.append(_timed("exps", "exp/s", sizes.exps, call, device, rounds))
    elif find_spec("triton"):  # an elementwise kernel would measure memory
        from benchmarks.machines.exp_kernel import STEPS, exponentials

        with torch.cuda.device(device):
            call = partial(exponentials, torch.empty(sizes.exps, device=device))
            found.append(_timed("exps", "exp/s", STEPS * sizes.exps, call, device, rounds))
    return found


def _product(
    name: str, dtype: torch.dtype, n: int, device: torch.device, rounds: int | None
) -> Measurement:
    """Of small matrices where large ones take too long: not every CPU has arithmetic for halves."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, name == "tf32"
    try:
        small = torch.randn(n // 4, n // 4, device=device).to(dtype)
        small @ small  # what the first product has to load is not its time
        if 4**3 * _seconds(lambda: small @ small, device, host=False) > SLOW_PRODUCT:
            n //= 4
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return _timed(name, "FLOP/s", 2 * n**3, lambda: a @ b, device, rounds)
    finally:
        matmul.allow_tf32 = before


def measure_launches(device: torch.device) -> list[Measurement]:
    """What one small operator costs the host, and on a GPU how soon kernels follow one another."""
    x = torch.randn(1, device=device)

    def in_a_row() -> None:
        for _ in range(LAUNCHES):
            x.add_(1.0)

    found = [_timed("launch", "s", 1, lambda: x.add_(1.0), device, rounds=LAUNCHES, host=True)]
    if device.type == "cuda":
        found.append(_timed("launch in a row", "s", LAUNCHES, in_a_row, device))
    return found


def _timed(
    name: str, unit: str, amount: float, call: Callable[[], Any], device: torch.device,
    rounds: int | None = None, host: bool = False,
) -> Measurement:  # fmt: skip
    """host: time until the call returns, not until the device is done."""
    call()
    times = [_seconds(call, device, host) for _ in range(rounds or ROUNDS[device.type])]
    timing = Timing.of(times, "wall")
    us = (timing.min_us, timing.p20_us, timing.p50_us, timing.p80_us)
    return Measurement(name, unit, amount, *(t / 1e6 for t in us), len(times))


def _seconds(call: Callable[[], Any], device: torch.device, host: bool) -> float:
    if device.type == "cuda" and not host:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = perf_counter()
    call()
    return perf_counter() - begin


def limits_of(measurements: list[Measurement]) -> Limits:
    """The best rates as limits."""
    rates = {m.name: m.rate for m in measurements}
    peak = {m.name: m.rate for m in measurements if m.unit == "FLOP/s"}
    return Limits(rates["copy"], peak, rates.get("exps"))


def device_limits(device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Limits:
    """Limits for the roofline of calls in these dtypes; fp32 is always among them."""
    return limits_of(measure(device, {"fp32": torch.float32, **dtypes}))


def read(path: Path) -> Limits:
    """Limits from a `calibration.json` or an `env.json`, or a folder with one of them. Raises
    FileNotFoundError if there is no such file, ValueError naming it if there are none in it."""
    if path.is_dir():
        names = [n for n in ("calibration.json", "env.json") if (path / n).is_file()]
        path = path / (names[0] if names else "calibration.json")
    found = outputs.read_json(path)
    if "limits" not in found:
        raise ValueError(f"--calibration: {path.name} has no limits; `calibrate` writes some")
    return Limits.read(found["limits"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks calibrate`."""
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument(
        "--out", type=to_path, help="folder; default: benchmark-results/calibration-<device>-<date>"
    )
    parser.add_argument(
        "--rounds", type=int, help=f"of each; default: {ROUNDS['cuda']}, on a CPU {ROUNDS['cpu']}"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured")


def main(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, and write `calibration.json`."""
    device = choose_device(args.device, needed=not args.dry_run)
    sizes = SIZES[device.type]
    # On a GPU also fp32 rounded to TF32.
    dtypes = DTYPES | ({"tf32": torch.float32} if device.type == "cuda" else {})
    if args.dry_run:
        console.print(f"copy: {4 * sizes.copy / 2**20:.0f} MiB of random fp32, read and written")
        console.print(f"matrix products: {sizes.matrix} cubed, {', '.join(dtypes)}")
        console.print(f"exponentials: of {sizes.exps} elements")
        console.print(f"launches: {LAUNCHES} of one small operator; nothing was run")
        return 0
    if args.rounds is not None and args.rounds < 2:
        raise ValueError(f"--rounds must be at least 2; got {args.rounds}")
    name = f"calibration-{device.type}-{datetime.now():%Y-%m-%d-%H%M}"
    folder = outputs.writable(args.out or outputs.fresh(Path("benchmark-results") / name))
    found = [*measure(device, dtypes, args.rounds), *measure_launches(device)]
    limits = asdict(limits_of(found))
    env = environment(device, limits)
    gpu = gpus.of_device(env["device"])
    console.print(table(found, env["device"], gpu))
    if limits["exps"] is None:
        console.print("exponentials: not measured, Triton is not installed")
    result = {
        "schema": SCHEMA,
        "limits": limits,
        "measurements": [asdict(m) for m in found],
        "datasheet": None if gpu is None else {"source": gpu.source, **asdict(gpu.limits)},
        "env": env,
    }
    outputs.write(folder / "calibration.json", json.dumps(result, indent=1) + "\n")
    console.print(f"written to {folder}/calibration.json", markup=False, soft_wrap=True)
    return 0


def table(measurements: list[Measurement], device: str, gpu: gpus.Gpu | None) -> FittedTable:
    """A table for the terminal, the datasheet beside what was measured."""
    shown = FittedTable(
        ("what", "best", "median", "spread", "n", "datasheet", "of it"),
        words=("what",), spare=("n", "spread", "median"), title=f"measured on {device}",
        caption=f"datasheet: {gpu.source}" if gpu else "",
    )  # fmt: skip
    published = {"copy": gpu.bandwidth, "exps": gpu.exps, **gpu.peak} if gpu else {}
    for m in measurements:
        paper = published.get(m.name)
        shown.add_row(
            f"matrix product {m.name}" if m.unit == "FLOP/s" else m.name,
            _rate(m.rate, m.unit), _rate(m.median_rate, m.unit),
            f"{100 * (m.p80 - m.p20) / m.p50:.0f} %", str(m.n),
            "" if paper is None else _rate(paper, m.unit),
            "" if paper is None else f"{100 * m.rate / paper:.0f} %",
        )  # fmt: skip
    return shown


def _rate(value: float, unit: str) -> str:
    if unit == "s":
        return f"{1e6 / value:.2f} us"
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {prefix}{unit}"

"""What a device can do here and now: copy, multiply, exponentiate, launch.

Everything runs on random data, because a GPU clocks higher on zeros than on anything real. `run`
takes the limits of its roofline from the same measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.op import DTYPES
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, full_fp32, to_path
from benchmarks.machines import gpus
from benchmarks.measure import timing
from benchmarks.measure.record import environment

SECONDS, ROUNDS = 2.0, (3, 50)
"""Of each measurement: not every CPU has arithmetic for halves."""
LAUNCHES = 200
SIZES = {"cuda": (2**28, 8192, 2**22), "cpu": (2**24, 1024, 2**18)}
"""Elements of the fp32 tensor that is copied, rows of the square matrices, and elements of the
tensor whose exponentials are taken."""


def measure(device: torch.device, dtypes: Mapping[str, torch.dtype]) -> list[dict[str, Any]]:
    """Copy bandwidth, matrix products of these dtypes, exponentials (on a GPU with Triton only) and
    launches of one small operator; "rate" is that of the best of n calls."""
    cpu = device.type == "cpu"
    copied, n, elements = SIZES[device.type]
    source, x = torch.randn(copied, device=device), torch.rand(elements, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    calls: dict[str, tuple[str, float, timing.Call]] = {"copy": ("B/s", 2 * source.nbytes, copy)}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls[name] = "FLOP/s", 2 * n**3, partial(torch.matmul, a, b)
    if cpu:
        calls["exps"] = "exp/s", elements, partial(torch.exp, x, out=torch.empty_like(x))
    elif find_spec("triton"):  # an elementwise operator would measure memory
        from benchmarks.machines.exp_kernel import BLOCK, STEPS, exp2_kernel

        exps = partial(exp2_kernel[(elements // BLOCK,)], x, STEPS, BLOCK, num_warps=4)
        calls["exps"] = "exp/s", STEPS * elements, exps
    one = torch.randn(1, device=device)
    calls["launch"] = "launches/s", LAUNCHES, lambda: [one.add_(1.0) for _ in range(LAUNCHES)]
    found = []
    for name, (unit, amount, call) in calls.items():
        if cpu:
            call()  # what the first one has to load is not its time
            taken = timing.measure_cpu({name: call}, seconds=SECONDS, rounds=ROUNDS)[name]
        else:
            with torch.cuda.device(device):
                call()
                units = {name: [(call, 1)]}
                taken = timing.measure_gpu(units, "events", seconds=SECONDS, rounds=ROUNDS)[name]
        best, median = (1e6 * amount / us for us in (taken.min_us, taken.p50_us))
        found.append({"name": name, "unit": unit, "rate": best, "median": median, "n": taken.n})
    return found


def limits_of(measurements: list[dict[str, Any]]) -> Limits:
    """The best rates as limits."""
    rates = {m["name"]: m["rate"] for m in measurements}
    peak = {m["name"]: m["rate"] for m in measurements if m["unit"] == "FLOP/s"}
    return Limits(rates["copy"], peak, rates.get("exps"))


def device_limits(device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Limits:
    """Limits for the roofline of calls in these dtypes; fp32 is always among them."""
    return limits_of(measure(device, {"fp32": torch.float32, **dtypes}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks calibrate`."""
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/calibration")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured")


def main(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, and write `calibration.json`."""
    device = choose_device(args.device, needed=not args.dry_run)
    if args.dry_run:
        console.print(f"copy, {', '.join(DTYPES)}, exps, launch on {device}; nothing was run")
        return 0
    full_fp32()
    folder = args.out or outputs.fresh(Path("benchmark-results/calibration"))
    outputs.writable(folder)
    found = measure(device, DTYPES)
    limits = asdict(limits_of(found))
    env = environment(device, limits)
    gpu = gpus.of_device(env["device"])
    published = {"copy": gpu.bandwidth, "exps": gpu.limits.exps, **gpu.peak} if gpu else {}
    for m in found:
        paper = published.get(m["name"])
        of_it = f", {100 * m['rate'] / paper:.0f} % of the datasheet" if paper else ""
        console.print(f"{m['name']}: {m['rate']:.4g} {m['unit']}, median {m['median']:.4g}{of_it}")
    result = {"limits": limits, "measurements": found, "env": env}
    outputs.write(folder / "calibration.json", json.dumps(result, indent=1) + "\n")
    console.print(f"written to {folder}/calibration.json", markup=False, soft_wrap=True)
    return 0

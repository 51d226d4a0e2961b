"""Where the time of one case goes: its operators or kernels, and a trace to look at.

Results are checked before anything is profiled. Printed, too: the commands with which profilers of
NVIDIA look into the same calls on a GPU.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import profile

from benchmarks.command import outputs
from benchmarks.command.options import choose_device, device_arguments, names, to_path
from benchmarks.measure.plan import Case, Options, dry_run, plan, shape_arguments
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES

CALLS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks profile`."""
    parser.add_argument("--op", required=True, help="one operation")
    parser.add_argument("--mode", type=names, default=(), help="default: the suite's first")
    parser.add_argument("--dtype", type=names, default=(), help="default: the suite's first")
    parser.add_argument("--provider", default="", help="default: triton on a GPU, else torch")
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    shape_arguments(parser)
    device_arguments(parser)
    parser.add_argument(
        "--only-calls", type=int, metavar="N",
        help="for ncu and nsys: N calls between cudaProfilerStart and Stop, no other profiler",
    )  # fmt: skip
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/profile-<case>")


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises RuntimeError if the case cannot be computed here, or comes out wrong."""
    device = choose_device(args.device, needed=not args.dry_run)
    if args.only_calls and device.type != "cuda":
        raise ValueError(f"--only-calls is for profilers of a GPU; the device is {device.type!r}")
    provider = args.provider or ("triton" if device.type == "cuda" else "torch")
    options = Options(
        suite=args.suite, ops=(args.op,), providers=(provider,), dtypes=args.dtype,
        modes=args.mode, device=str(device), seed=args.seed, shape=args.shape, at=args.at,
    )  # fmt: skip
    case, *others = plan(options)
    case = replace(case, modes=case.modes[:1])
    name = f"{case.label} {case.modes[0]} {provider}"
    more = f" (the first of {len(others) + 1} cases)" if others else ""
    console.print(f"{name} on {device}{more}")
    out = args.out or outputs.fresh(Path(f"benchmark-results/profile-{name}".replace(" ", "-")))
    commands = external_commands(case, args, out)
    if args.dry_run:
        console.print("\n".join(dry_run([case], device)), markup=False, soft_wrap=True)
    else:
        if not args.only_calls:
            outputs.writable(out, "trace.json")
        runner = Runner(options)
        with runner.stream():
            call = _checked(runner, case)
            for _ in range(3):
                call()
            if args.only_calls:
                _only_calls(call, args.only_calls)
                return 0
            found = _profile(call, device, out)
        console.print(f"{CALLS} calls:\n{found}", markup=False, soft_wrap=True)
        trace = f"trace for chrome://tracing or ui.perfetto.dev: {out}/trace.json"
        console.print(trace, markup=False, soft_wrap=True)
    console.print("in depth, on a machine with a GPU and these tools:")
    console.print("\n".join(f"  {line}" for line in commands), markup=False, soft_wrap=True)
    return 0


def _checked(runner: Runner, case: Case) -> Callable[[], Any]:
    """The call, once its results were found right."""
    (provider,), (mode,) = case.providers, case.modes
    prepared = runner.prepare(case)
    prepared.check(provider)
    calls = prepared.calls(mode, [provider]) if prepared.ok(provider) else {}
    row = prepared.record(provider, mode)
    if row.status != "ok":
        raise RuntimeError(f"{case.label} {mode} {provider}: {row.status}: {row.reason}")
    return calls[provider][0]


def _only_calls(call: Callable[[], Any], number: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(number):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _profile(call: Callable[[], Any], device: torch.device, out: Path) -> str:
    """The table of the profiler; a trace goes into the folder."""
    with profile(record_shapes=True) as prof:
        for _ in range(CALLS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(out / "trace.json"))
    own = f"self_{device.type}_time_total"
    return prof.key_averages().table(sort_by=own, row_limit=15, max_name_column_width=60)


def external_commands(case: Case, args: argparse.Namespace, out: Path) -> list[str]:
    """Commands for ncu and nsys that profile the same calls on a GPU."""
    shape = ",".join(f"{name}={value}" for name, value in asdict(case.shape).items())
    same = (
        f"python -m benchmarks profile --op {case.op.name} --mode {case.modes[0]} "
        f"--dtype {case.dtype} --provider {args.provider or 'triton'} --suite {args.suite} "
        f"--at {shape} --seed {args.seed} --device cuda --only-calls"
    )
    folder = shlex.quote(str(out))
    return [
        f"mkdir -p {folder} && ncu --set full --clock-control none --profile-from-start off "
        f"--force-overwrite --export {folder}/kernels {same} 1",
        f"mkdir -p {folder} && nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi "
        f"--force-overwrite true --output {folder}/timeline {same} {CALLS}",
    ]

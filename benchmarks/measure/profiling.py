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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import outputs
from benchmarks.command.options import choose_device, device_arguments, pairs, to_path
from benchmarks.command.table import FittedTable, significant
from benchmarks.measure.plan import Case, Options, dry_run, plan
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES

WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks profile`."""
    parser.add_argument("--op", required=True, help="one operation")
    parser.add_argument("--mode", default="", help="default: the first of the suite's")
    parser.add_argument("--dtype", default="", help="default: the first of the suite's")
    parser.add_argument("--provider", default="", help="default: triton on a GPU, else torch")
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    parser.add_argument("--at", type=pairs, default=(), metavar="K=V,..", help="its shape")
    device_arguments(parser)
    parser.add_argument("--calls", type=int, default=10, help="how many are profiled")
    parser.add_argument("--top", type=int, default=15, help="rows of the table")
    parser.add_argument(
        "--only-calls", action="store_true",
        help="for ncu and nsys: the calls between cudaProfilerStart and Stop, no other profiler",
    )  # fmt: skip
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/profile-<case>")


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises RuntimeError if the case cannot be computed here, or comes out wrong."""
    for name in ("calls", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}")
    device = choose_device(args.device, needed=not args.dry_run)
    if args.only_calls and device.type != "cuda":
        raise ValueError(f"--only-calls is for profilers of a GPU; the device is {device.type!r}")
    case, others = _chosen(args, device)
    options = Options(suite=args.suite, device=str(device), seed=args.seed)
    (provider,), (mode,) = case.providers, case.modes
    name = f"profile-{case.label} {mode} {provider}".replace(" ", "-")
    out = args.out or outputs.fresh(Path("benchmark-results") / name)
    console.print(f"{case.label} {mode} {provider} on {device}", end="")
    console.print(f" (the first of {others + 1} cases)" if others else "")
    commands = external_commands(case, args, out)
    if args.dry_run:
        console.print("\n".join(dry_run([case], device)), markup=False, soft_wrap=True)
    else:
        if not args.only_calls:
            outputs.writable(out, "trace.json")
        runner = Runner(options)
        with runner.stream():
            call = _warm_call(runner, case)
            if args.only_calls:
                _only_calls(call, args.calls)
                return 0
            _profile(call, args, device.type == "cuda", out, console)
    console.print("in depth, on a machine with a GPU and these tools:")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
    return 0


def _chosen(args: argparse.Namespace, device: torch.device) -> tuple[Case, int]:
    """The first case that fits, with one mode and provider, and how many more there are."""
    provider = args.provider or ("triton" if device.type == "cuda" else "torch")
    wanted = {"modes": args.mode, "dtypes": args.dtype}
    options = Options(
        suite=args.suite, ops=(args.op,), providers=(provider,), device=str(device),
        seed=args.seed, at=args.at,
        **{name: (value,) for name, value in wanted.items() if value},
    )  # fmt: skip
    cases = plan(options)
    return replace(cases[0], modes=cases[0].modes[:1]), len(cases) - 1


def _warm_call(runner: Runner, case: Case) -> Callable[[], Any]:
    (provider,), (mode,) = case.providers, case.modes
    prepared = runner.prepare(case)
    prepared.check(provider)
    calls = prepared.calls(mode, [provider])
    row = prepared.rows[provider, mode]
    if row.status != "ok":
        raise RuntimeError(f"{case.label} {mode} {provider}: {row.status}: {row.reason}")
    call = calls[provider][0]
    for _ in range(WARM_UP):
        call()
    return call


def _only_calls(call: Callable[[], Any], calls: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _profile(
    call: Callable[[], Any], args: argparse.Namespace, cuda: bool, out: Path, console: Console
) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as prof:
        for _ in range(args.calls):
            call()
        if cuda:
            torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(out / "trace.json"))
    console.print(table(prof, args.calls, args.top, cuda))
    trace = f"trace for chrome://tracing or ui.perfetto.dev: {out}/trace.json"
    console.print(trace, markup=False, soft_wrap=True)


def table(prof: profile, calls: int, top: int, cuda: bool) -> FittedTable:
    """Kernels of the GPU, or operators of the CPU, by their own time without what they call."""
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in prof.key_averages() if e.device_type == kind and getattr(e, time) > 0]
    events.sort(key=lambda e: -getattr(e, time))
    total = sum(getattr(e, time) for e in events)
    who = "kernel" if cuda else "operator"
    shown = FittedTable(
        (who, "us", "share", "cumulative", "times"),
        words=(who,),
        title=f"self time per call, {significant(total / calls)} us in {len(events)} kinds",
    )
    reached = 0.0
    for event in events[:top]:
        own = getattr(event, time)
        reached += own
        shown.add_row(
            event.key, significant(own / calls), f"{100 * own / total:.1f} %",
            f"{100 * reached / total:.1f} %", significant(event.count / calls),
        )  # fmt: skip
    return shown


def external_commands(case: Case, args: argparse.Namespace, out: Path) -> list[str]:
    """Commands for ncu and nsys that profile the same calls on a GPU."""
    (mode,), (provider,) = case.modes, case.providers
    if not args.provider:
        provider = "triton"
    shape = ",".join(f"{name}={value}" for name, value in asdict(case.shape).items())
    same = (
        "python", "-m", "benchmarks", "profile", "--op", case.op.name, "--mode", mode, "--dtype",
        case.dtype, "--provider", provider, "--suite", args.suite, "--at", shape, "--seed",
        str(args.seed), "--device", "cuda", "--only-calls",
    )  # fmt: skip
    ncu = (
        "ncu", "--set", "full", "--clock-control", "none", "--profile-from-start", "off",
        "--force-overwrite", "--export", f"{out}/kernels", *same, "--calls", "1",
    )  # fmt: skip
    nsys = (
        "nsys", "profile", "--trace", "cuda,nvtx", "--capture-range", "cudaProfilerApi",
        "--force-overwrite", "true", "--output", f"{out}/timeline", *same, "--calls",
        str(args.calls),
    )  # fmt: skip
    folder = shlex.join(("mkdir", "-p", str(out)))
    return [f"{folder} && {shlex.join(command)}" for command in (ncu, nsys)]

"""Where the time of one case goes: its operators or kernels, and a trace to look at.

The case is the first that fits; its results are checked before it is profiled. With `--only-calls`
it runs for profilers of NVIDIA; docs/benchmarks.md has their command lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import profile

from benchmarks.command import outputs
from benchmarks.command.options import device_arguments, full_fp32, to_path, use_threads
from benchmarks.measure.plan import Case, Options, dry_run, plan, selection_arguments
from benchmarks.measure.runner import Runner

WARM_UP, CALLS, ROWS = 3, 10, 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks profile`."""
    selection_arguments(parser)
    device_arguments(parser, measured=True)
    parser.add_argument(
        "--only-calls", type=int, metavar="N",
        help="for ncu and nsys: N calls between cudaProfilerStart and Stop, no other profiler",
    )  # fmt: skip
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/profile-<case>")


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises RuntimeError if the case cannot be computed here, or comes out wrong."""
    options = Options.of(args)
    use_threads(args.threads)
    full_fp32()
    cuda = options.device.startswith("cuda")
    if args.only_calls and not cuda:
        raise ValueError(f"--only-calls is for profilers of a GPU; the device is {options.device}")
    if not options.providers:
        options = replace(options, providers=("triton" if cuda else "torch",))
    first, *others = plan(options)
    case = replace(first, modes=first.modes[:1], providers=first.providers[:1])
    name = f"{case.label} {case.modes[0]} {case.providers[0]}"
    more = f" (the first of {len(others) + 1} cases)" if others else ""
    console.print(f"{name} on {options.device}{more}")
    if args.dry_run:
        lines = dry_run([case], torch.device(options.device))
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        return 0
    out = args.out or outputs.fresh(Path(f"benchmark-results/profile-{name}".replace(" ", "-")))
    outputs.writable(out, "trace.json")
    runner = Runner(options)
    with runner.stream():
        call = _checked(runner, case)
        for _ in range(WARM_UP):
            call()
        if args.only_calls:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            for _ in range(args.only_calls):
                call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            return 0
        with profile(record_shapes=True) as prof:
            for _ in range(CALLS):
                call()
            if cuda:
                torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(out / "trace.json"))
    own = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    table = prof.key_averages().table(sort_by=own, row_limit=ROWS, max_name_column_width=60)
    console.print(f"{CALLS} calls:\n{table}", markup=False, soft_wrap=True)
    trace = f"trace for chrome://tracing or ui.perfetto.dev: {out}/trace.json"
    console.print(trace, markup=False, soft_wrap=True)
    return 0


def _checked(runner: Runner, case: Case) -> Callable[[], Any]:
    """The call, once its results were found right."""
    (provider,), (mode,) = case.providers, case.modes
    prepared = runner.prepare(case)
    prepared.check(provider)
    calls = prepared.calls(mode, [provider])
    row = prepared.rows[provider, mode]
    if row.status != "ok":
        raise RuntimeError(f"{case.label} {mode} {provider}: {row.status}: {row.reason}")
    return calls[provider][0]

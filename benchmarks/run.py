"""Check, measure, and write a folder of results: records, report, plots."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases.common.op import DTYPES
from benchmarks.command import outputs
from benchmarks.command.options import device_arguments, full_fp32, to_path, use_threads
from benchmarks.machines import calibrate
from benchmarks.measure.launches import cost_of
from benchmarks.measure.plan import (
    Case,
    Options,
    dry_run,
    plan,
    remaining,
    selection_arguments,
)
from benchmarks.measure.record import Record, Writer, environment, read
from benchmarks.measure.resume import AGAIN, Again, Journal
from benchmarks.measure.runner import Runner
from benchmarks.providers.provider import TUNED
from benchmarks.reporting import report
from equiseg_fast.kernels import _tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks run`."""
    selection_arguments(parser)
    device_arguments(parser, measured=True)
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/<device>-<date>")
    parser.add_argument(
        "--calibration", type=to_path, metavar="FILE",
        help="limits of the device, of `calibrate`; without such a file they are measured",
    )  # fmt: skip
    parser.add_argument("--tuned", metavar="FILE", help="configurations of the provider tuned")
    parser.add_argument(
        "--largest-first", action="store_true", help="cases with the most bytes first"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on in --out where another process ended"
    )
    parser.add_argument(
        "--patience", type=int, metavar="SECONDS",
        help="end the process, to be resumed, if one step of one case takes longer",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="records only: no report, plots")


def main(args: argparse.Namespace, console: Console, started: float) -> int:
    """Exit status 1 if a case ended by an error of its own, `AGAIN` if the same command with
    --resume goes on. started: when the process did, by `perf_counter`."""
    options = Options.of(args)
    if args.tuned:
        _tuned.read(Path(args.tuned))  # what is wrong with it is said before anything runs
        os.environ[TUNED] = args.tuned
    cases = plan(options)
    if args.largest_first:
        cases.sort(key=_bytes, reverse=True)
    device = torch.device(options.device)
    if args.dry_run:
        further = () if args.no_report else ("then: report and plots",)
        console.print("\n".join(dry_run(cases, device, further)), markup=False, soft_wrap=True)
        return 0
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run that ended")
    use_threads(args.threads)
    full_fp32()
    seconds = {"imports": perf_counter() - started}
    out = _folder(args, device)
    begun = perf_counter()
    limits = None
    if args.calibration:
        with suppress(FileNotFoundError):
            limits = calibrate.read(args.calibration)
    dtypes = {case.dtype: DTYPES[case.dtype] for case in cases}
    limits = limits or calibrate.device_limits(device, dtypes)
    seconds["device limits"] = perf_counter() - begun
    env = environment(device, asdict(limits))
    if args.resume and (out / "env.json").is_file():
        before = outputs.read_json(out / "env.json").get("device")
        if before != env["device"]:
            raise ValueError(
                f"--resume goes on where it was measured, on {before}; this is {env['device']}"
            )
    outputs.write(out / "env.json", json.dumps(env, indent=1) + "\n")

    # Written as it goes: an interrupted run keeps what it has.
    results = Writer(out, args.resume)
    journal = Journal(out, args.resume, args.patience)
    args.kept = f"what was measured is in {out}; with --resume --out {out} it goes on there"
    runner = Runner(options, limits, journal=journal)
    waiting = remaining(cases, read(out)) if args.resume else cases
    broken: list[str] = []

    def keep(rows: list[Record]) -> None:
        for row in rows:
            row.env_id = env["env_id"]
        results.add(rows)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(waiting))
        for case in waiting:
            try:
                runner.run(case, lambda text: progress.update(task, description=text), keep)
            except Again as again:
                console.print(f"{again}: to be run again with --resume", markup=False)
                return AGAIN
            except outputs.NotWritten:
                raise
            except Exception:  # the other cases are worth more than this one
                traceback.print_exc()
                broken.append(case.label)
            progress.advance(task)
    journal.close()
    args.kept = f"all records are in {out}; `report {out}` makes a report of them"
    if broken:
        console.print(f"ended by an error of their own: {', '.join(broken)}", markup=False)
    seconds |= runner.seconds
    if not args.no_report:
        begun = perf_counter()
        rows = read(out)
        report.write(rows, env, out)
        report.show(rows, console)
        seconds["report and plots"] = perf_counter() - begun
    shown = "; ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    console.print(
        f"seconds: {shown}\ntotal {perf_counter() - started:.1f} s ({process_time():.0f} s of CPU "
        f"time on {torch.get_num_threads()} threads); written to {out}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    return 1 if broken else 0


def _bytes(case: Case) -> float:
    return cost_of(case.op, case.shape, DTYPES[case.dtype].itemsize).fwd_bytes


def _folder(args: argparse.Namespace, device: torch.device) -> Path:
    """Where a run writes, which holds nothing of another."""
    if args.resume:
        return outputs.writable(args.out)
    if args.out:
        hint = "; --resume goes on with that"
        return outputs.writable(args.out, "results.jsonl", "env.json", "plots", hint=hint)
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    folder = Path("benchmark-results") / f"{name}-{datetime.now():%Y-%m-%d-%H%M}"
    return outputs.writable(outputs.fresh(folder))

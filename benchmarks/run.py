"""Check, measure, and write a folder of results: records, report, plots."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.op import DTYPES
from benchmarks.command import outputs
from benchmarks.command.options import device_arguments, full_fp32, to_path, use_threads
from benchmarks.machines import calibrate
from benchmarks.measure.plan import Options, dry_run, plan, selection_arguments
from benchmarks.measure.record import FILE, Writer, environment, read, write_jsonl
from benchmarks.measure.resume import AGAIN, Again
from benchmarks.measure.runner import Runner
from benchmarks.providers.provider import TUNED
from benchmarks.reporting import report
from equiseg_fast.kernels import _tuned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks run`."""
    selection_arguments(parser)
    device_arguments(parser, measured=True)
    parser.add_argument("--out", type=to_path, help="default: benchmark-results/<device>-<date>")
    parser.add_argument("--tuned", metavar="FILE", help="configurations of the provider tuned")
    parser.add_argument(
        "--resume", action="store_true", help="go on in --out where another process ended"
    )
    parser.add_argument(
        "--patience", type=int, default=0, metavar="SECONDS",
        help="end the process, to be resumed, if one step of one case takes longer",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="records only: no report, plots")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status `AGAIN` if the same command with --resume goes on."""
    started = perf_counter()
    options = Options.of(args)
    if args.tuned:
        _tuned.read(Path(args.tuned))  # what is wrong with it is said before anything runs
        os.environ[TUNED] = args.tuned
    cases = plan(options)
    device = torch.device(options.device)
    if args.dry_run:
        console.print("\n".join(dry_run(cases, device)), markup=False, soft_wrap=True)
        return 0
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run that ended")
    use_threads(args.threads)
    full_fp32()
    out = args.out or outputs.fresh(
        Path("benchmark-results") / f"{device.type}-{datetime.now():%Y-%m-%d-%H%M}"
    )
    there = () if args.resume else (FILE, "env.json", "plots")
    outputs.writable(out, *there, hint="; --resume goes on with that")
    before = outputs.read_json(out / "env.json") if (out / "env.json").is_file() else {}
    dtypes = {case.dtype: DTYPES[case.dtype] for case in cases}
    limits = before.get("limits", {"peak": {}})
    if not dtypes.keys() <= limits["peak"].keys():
        limits = asdict(calibrate.device_limits(device, dtypes))
    env = environment(device, limits)
    if (name := before.get("device", env["device"])) != env["device"]:
        raise ValueError(
            f"--resume goes on where it was measured, on {name}; this is {env['device']}"
        )
    outputs.write(out / "env.json", json.dumps(env, indent=1) + "\n")

    # Written as it goes: an interrupted run keeps what it has.
    writer = Writer(out, args.resume, env_id=env["env_id"], patience=args.patience)
    args.kept = f"what was measured is in {out}; with --resume --out {out} it goes on there"
    runner = Runner(options, Limits.read(limits), writer=writer)
    try:
        for case in track(cases, "measuring", console=console, transient=True):
            runner.run(case)
    except Again as again:
        console.print(f"{again}: to be run again with --resume", markup=False)
        return AGAIN
    args.kept = f"all records are in {out}; `report {out}` makes a report of them"
    rows = read(out)
    write_jsonl(rows, out / FILE)  # each measurement once
    if not args.no_report:
        report.write(rows, env, out)
        report.show(rows, console)
    total = f"total {perf_counter() - started:.1f} s; written to {out}"
    console.print(total, markup=False, soft_wrap=True)
    return 0

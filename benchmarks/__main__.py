"""`python -m benchmarks`: see `--help`. What fails while measured becomes a row, no exit code.

Exit status: 0; 1 for what was found wrong (failures, regressions under --fail, what is stale under
--check); 2 for what cannot be done as asked, read or written; 75 if the same command with --resume
goes on in a new process; 130 if interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

# ruff: noqa: E402 (the clock includes the imports below)
STARTED = perf_counter()

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import readme
from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, unavailable
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, to_path, to_threads
from benchmarks.machines import calibrate, predictions, roofline, tune
from benchmarks.measure import host, profiling
from benchmarks.measure import record as records_of
from benchmarks.measure.launches import cost_of
from benchmarks.measure.plan import (
    Case,
    Options,
    dry_run,
    has_breakdown,
    plan,
    remaining,
    selection_arguments,
)
from benchmarks.measure.resume import AGAIN, Again, Journal
from benchmarks.measure.runner import Phases, Runner
from benchmarks.measure.suites import SUITES
from benchmarks.miniature import run as miniature
from benchmarks.offline import dry, exercise, resources
from benchmarks.providers.provider import PROVIDERS, TUNED
from benchmarks.reporting import report, terminal
from benchmarks.versions import against, compare
from benchmarks.visiting import visit
from equiseg_fast.kernels import _tuned

INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, see above; 2 is raised as SystemExit."""
    parser = _parser()
    args = parser.parse_args(arguments)
    # A pipe has no width; the table needs this much.
    console = Console(width=None if sys.stdout.isatty() else 165, highlight=False)
    try:
        with _terminable():
            return args.run(args, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {args.kept}", markup=False, soft_wrap=True)
        return INTERRUPTED
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # a full disk, a missing file: the place says more than a traceback
        where = f"{error.filename}: " if error.filename else ""
        parser.error(f"{where}{error.strerror or error}; {args.kept}")
    except RuntimeError as error:  # of PyTorch or Triton, perhaps: where it came from matters
        traceback.print_exc()
        parser.error(str(error))


@contextmanager
def _terminable() -> Iterator[None]:
    """Being terminated, or losing the terminal, ends the block as Ctrl-C does, so that nothing is
    left, nor goes on."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt

    hangup = getattr(signal, "SIGHUP", None)  # not on Windows; ignored under nohup
    heeded = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    signals = (signal.SIGTERM, hangup) if heeded else (signal.SIGTERM,)
    before = {number: signal.signal(number, terminated) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # What is said when a command is interrupted or the disk is full; some know more.
    parser.set_defaults(kept="the same command starts anew")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="operations, their costs, providers and suites")
    listing.set_defaults(run=_list)

    run = commands.add_parser("run", help="check, measure, and write a folder of results")
    run.add_argument("--suite", choices=tuple(SUITES), default="quick")
    selection_arguments(run)
    run.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    run.add_argument(
        "--method", choices=("graph", "eager"), default="graph", help="how a GPU is timed"
    )
    run.add_argument("--out", type=to_path, help="default: benchmark-results/<device>-<date>")
    run.add_argument(
        "--threads", type=to_threads, help="of PyTorch on the CPU; default: its own choice"
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--calibration", type=to_path, metavar="FILE",
        help="limits of the device, of `calibrate`; without such a file they are measured",
    )  # fmt: skip
    run.add_argument("--tuned", metavar="FILE", help="configurations of the provider tuned")
    run.add_argument("--largest-first", action="store_true", help="cases with the most bytes first")
    run.add_argument(
        "--resume", action="store_true", help="go on in --out where another process ended"
    )
    run.add_argument(
        "--patience", type=int, metavar="SECONDS",
        help="end the process, to be resumed, if one step of one case takes longer",
    )  # fmt: skip
    run.add_argument(
        "--no-report", action="store_true", help="records only: no breakdown, report, plots"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would run, and who is left out and why",
    )
    run.set_defaults(run=_run)

    again = commands.add_parser("report", help="reports and plots again, from results.jsonl")
    again.add_argument("results", type=to_path, help="results.jsonl or its folder")
    again.set_defaults(run=_report, kept="the records are as they were")

    for module, name, text in (
        (compare, "compare", "what became slower between two runs"),
        (against, "against", "the working tree beside another revision, measured in turn"),
        (profiling, "profile", "the operators or kernels of one case, and a trace"),
        (host, "host", "how long the host works for a call, and on what"),
        (exercise, "exercise", "every kernel once on small shapes, for compute-sanitizer"),
        (visit, "visit", "all that a few minutes on a GPU machine should bring home"),
        (dry, "dry", "bind and compile for a GPU that is not there, or fill a cache of binaries"),
        (tune, "tune", "search faster launch configurations on a GPU"),
        (calibrate, "calibrate", "what this device can do at most"),
        (roofline, "roofline", "predicted floors on a GPU, without having one"),
        (predictions, "predict", "what a GPU should take for everything that is timed there"),
        (miniature, "miniature", "what the parts of EQUISeg are worth when sensors fail"),
        (readme, "readme", "the numbers of README.md from the results that are committed"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)

    compiled = commands.add_parser("resources", help="what every kernel needs, without a GPU")
    resources.add_arguments(compiled)
    compiled.set_defaults(run=lambda args, console: resources.main(args))

    env = commands.add_parser("env", help="the environment record of this machine")
    env.set_defaults(run=_env)
    return parser


def _list(args: argparse.Namespace, console: Console) -> int:
    for name, op in operations().items():
        providers = [p for p in PROVIDERS if not unavailable(op, p, torch.device("cpu"))]
        console.print(f"[bold]{name}[/]: {op.formula}; on a CPU: {', '.join(providers)}")
    for name, suite in SUITES.items():
        cases = plan(Options(suite=name))
        console.print(
            f"suite [bold]{name}[/]: {len(cases)} cases, {sum(len(c.modes) for c in cases)} with "
            f"their modes; dtypes {', '.join(suite.dtypes)}"
        )
    for name, text in PROVIDERS.items():
        console.print(f"provider [bold]{name}[/]: {text}")
    return 0


def _env(args: argparse.Namespace, console: Console) -> int:
    console.print_json(json.dumps(records_of.environment(choose_device(None))))
    return 0


def _run(args: argparse.Namespace, console: Console) -> int:
    device = choose_device(args.device, needed=not args.dry_run)
    options = Options(
        args.suite, args.op, args.provider, args.dtype, args.mode, str(device), args.method,
        args.seed, args.shape, args.at,
    )  # fmt: skip
    if args.tuned:
        _tuned.read(Path(args.tuned))  # what is wrong with it is said before anything runs
        os.environ[TUNED] = args.tuned
    cases = plan(options)
    if args.largest_first:
        cases.sort(key=_bytes, reverse=True)
    breakdown = not args.no_report and has_breakdown(options, cases)
    if args.dry_run:
        further = ["then: breakdown: times of the parts of the model"] if breakdown else []
        further += [] if args.no_report else ["then: report and plots"]
        console.print("\n".join(dry_run(cases, device, further)), markup=False, soft_wrap=True)
        return 0
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run that ended")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # Every provider multiplies fp32 in fp32, whatever cuDNN would like.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    phases = Phases()
    phases.seconds["imports"] = perf_counter() - STARTED
    out = _folder(args, device)
    with phases.phase("device limits"):
        dtypes = {case.dtype: DTYPES[case.dtype] for case in cases}
        limits = None
        if args.calibration:
            with suppress(FileNotFoundError):
                limits = calibrate.read(args.calibration)
        limits = limits or calibrate.device_limits(device, dtypes)
    env = records_of.environment(device, asdict(limits))
    if args.resume and (out / "env.json").is_file():
        before = outputs.read_json(out / "env.json")
        if before.get("device") != env["device"]:
            raise ValueError(
                f"--resume goes on where it was measured, on {before.get('device')}; this is "
                f"{env['device']}"
            )
    outputs.write(out / "env.json", json.dumps(env, indent=1) + "\n")

    # Written as it goes: an interrupted run keeps what it has.
    results = records_of.Writer(out, args.resume)
    journal = Journal(out, args.resume, args.patience)
    args.kept = f"what was measured is in {out}; with --resume --out {out} it goes on there"
    runner = Runner(options, limits, phases, journal=journal)
    waiting = remaining(cases, records_of.read(out)) if args.resume else cases

    broken: list[str] = []

    def keep(rows: list[records_of.Record]) -> None:
        for row in rows:
            row.env_id = env["env_id"]
        results.add(rows)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(waiting) + breakdown)
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
        rows = records_of.read(out)
        args.kept = f"all records are in {out}; `report {out}` makes a report of them"
        if broken:
            console.print(f"ended by an error of their own: {', '.join(broken)}", markup=False)
        if args.no_report:
            console.print(_closing(phases, out), markup=False, soft_wrap=True)
            return 1 if broken else 0
        if breakdown:
            progress.update(task, description="times of the parts of the model")
            try:
                _breakdown(rows, device, out, args.seed, phases)
            except RuntimeError as error:  # out of memory, for one; the rows are worth their report
                console.print(f"no breakdown: {error}", markup=False)
            progress.advance(task)
    with phases.phase("report and plots"):
        report.write(rows, env, out)
    terminal.show(rows, console)
    console.print(_closing(phases, out), markup=False, soft_wrap=True)
    return 1 if broken else 0


def _bytes(case: Case) -> float:
    itemsize = DTYPES[case.dtype].itemsize
    return cost_of(case.op, case.shape, itemsize).fwd_bytes


def _closing(phases: Phases, out: Path) -> str:
    shown = "; ".join(f"{name} {seconds:.1f}" for name, seconds in phases.seconds.items())
    return (
        f"seconds: {shown}\ntotal {perf_counter() - STARTED:.1f} s ({process_time():.0f} s of CPU "
        f"time on {torch.get_num_threads()} threads); written to {out}"
    )


def _breakdown(
    rows: Sequence[records_of.Record], device: torch.device, out: Path, seed: int, phases: Phases
) -> None:
    """`breakdown.json`, of the first whole model that was measured."""
    measured = [r for r in rows if r.op == "model" and r.p50_us is not None]
    if not measured:
        return
    from benchmarks.measure import breakdown

    with phases.phase("breakdown"):
        first = measured[0]
        providers = [r.provider for r in measured if r.group == first.group]
        found = breakdown.measure(first.shape, first.dtype, device, providers, seed)
    outputs.write(out / "breakdown.json", json.dumps(found, indent=1) + "\n")


def _report(args: argparse.Namespace, console: Console) -> int:
    rows = records_of.read(args.results)
    folder = args.results if args.results.is_dir() else args.results.parent
    outputs.writable(folder)
    report.write(rows, records_of.read_environment(args.results), folder)
    terminal.show(rows, console)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())

"""A time-boxed session on a new GPU machine: everything it can tell, in the order of its worth.

Every kernel once, whole models against the strongest others, parity tests on the GPU, single
operations, memory checks, compilers. Each step has its share of the time and is killed when that is
over; results are written as they come, and packed into one archive after every step. The same
command goes on with what is not done. Needs no network and installs nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.command import outputs
from benchmarks.command.options import ROOT, choose_device, to_path
from benchmarks.command.table import FittedTable
from benchmarks.visiting import orphans
from benchmarks.visiting.archive import pack
from benchmarks.visiting.budget import State, Step, Visit, share
from benchmarks.visiting.simulate import simulate
from benchmarks.visiting.steps import PYTHON, steps
from benchmarks.visiting.summary import brought, failed, table, unfinished, write_summary

OPTIONAL = {
    "transformers": "no provider transformers, its tests are skipped",
    "hypothesis": "property tests are not run",
    "pytest_timeout": "a test that hangs takes its whole step's time",
    "xdist": "parity tests cannot be run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks visit`."""
    parser.add_argument("--minutes", type=float, help="for everything; default: 9, on a CPU 4")
    parser.add_argument(
        "--out", type=to_path, default=Path("benchmark-results/visit"),
        help="folder of results, and of a resumed visit; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=to_path, metavar="FILE", help="default: the folder's name with .tar.gz"
    )
    parser.add_argument(
        "--cache", type=to_path, metavar="FOLDER",
        help="binaries compiled beforehand, by `dry --what visit --cache FOLDER` with the Python "
        "and Triton of that machine; default: triton-cache in --out",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu rehearses everything; default: cuda if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")
    parser.add_argument(
        "--simulate", type=lambda text: [float(x) for x in text.split(",")], metavar="M,M",
        help="run nothing: what would be home if all ended after so many minutes, by estimates",
    )  # fmt: skip


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 if a command failed by itself, which includes a failed test, or a step of a
    rehearsal brought nothing; on a GPU what was cut off or cannot be done is no failure."""
    started = time.monotonic()
    pretending = args.dry_run or args.simulate
    device = choose_device("cuda" if args.simulate else args.device, needed=not pretending)
    rehearsal = device.type != "cuda"
    minutes = args.minutes if args.minutes is not None else 4 if rehearsal else 9
    if not minutes > 0:
        raise ValueError(f"--minutes must be positive; got {minutes}")
    folder = args.out.resolve()
    cache = (args.cache or folder / "triton-cache").resolve()
    # Printed as it was given.
    home = args.archive or args.out.parent / f"{folder.name}.tar.gz"
    archive = home.resolve()
    planned = steps(folder, device, cache)
    if args.simulate:
        for after in args.simulate:
            console.print(_simulated(planned, minutes, after))
        return 0
    if args.dry_run:
        _print_plan(planned, 60 * minutes, console)
        return 0
    for package, lacking in OPTIONAL.items():
        if not find_spec(package):
            console.print(f"without {package}: {lacking}")
    outputs.writable(folder)
    outputs.writable_file(archive, option="--archive")
    (folder / "parity").mkdir(parents=True, exist_ok=True)
    args.kept = f"what came home is in {args.out}; the same command goes on there"
    state = State(folder / "visit.json")

    def keep() -> None:
        """Nothing that goes wrong here may end the visit."""
        for what, call in (
            ("summary", partial(write_summary, planned, state, folder)),
            ("archive", partial(pack, folder, archive)),
        ):
            try:
                call()
            except Exception as error:
                console.print(f"no {what}: {type(error).__name__}: {error}", markup=False)

    state.changed = keep
    if ended := orphans.end(str(folder)):
        console.print(f"ended {ended} processes that an earlier visit had left running")

    def said(text: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {text}", markup=False)

    visit = Visit(
        planned, state, folder, ROOT, started + 60 * minutes, progress=said, tick=keep,
        environment={"TRITON_CACHE_DIR": str(cache), "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    with orphans.ended_with_this_process(str(folder)):
        visit.run()
    keep()
    console.print(table(planned, state, folder))
    left = [t.name for s in planned for t in s.tasks if unfinished(state, t)]
    if left:
        console.print(f"did not fit: {', '.join(left)}; the same command goes on there")
    console.print(f"{time.monotonic() - started:.0f} s; all of it in {home}")
    wrong = any(failed(state, task) for step in planned for task in step.tasks)
    empty = [s.name for s in planned if not s.impossible and not brought(s, state, folder)]
    if rehearsal and empty:
        console.print(f"brought nothing: {', '.join(empty)}")
    return 1 if wrong or (rehearsal and empty) else 0


def _simulated(planned: Sequence[Step], minutes: float, cut: float) -> FittedTable:
    title = f"after {cut:g} of {minutes:g} minutes, by estimates"
    columns = ("command", "state", "home", "missing")
    shown = FittedTable(columns, words=columns, title=title)
    for found in simulate(planned, minutes, cut):
        shown.add_row(
            found.task, found.state, f"{len(found.done)} of {len(found.done + found.missing)}",
            found.missing[0] + (", .." if len(found.missing) > 1 else "") if found.missing else "",
        )  # fmt: skip
    return shown


def _print_plan(planned: Sequence[Step], seconds: float, console: Console) -> None:
    possible = [step for step in planned if not step.impossible]
    for step in planned:
        limit = f"not possible: {step.impossible}"
        if not step.impossible:
            own = share(possible, seconds)
            possible, seconds = possible[1:], seconds - own
            limit = f"{own:.0f} s, or more if others leave time"
        console.print(f"[bold]{step.name}[/]: {step.what}; {limit}")
        for task in step.tasks:
            set_ = [f"{k}={v}" if v is not None else f"-u {k}" for k, v in task.variables.items()]
            prefix = " ".join(["env", *sorted(set_)]) + " " if set_ else ""
            words = ["python" if word == PYTHON else word for word in task.command]
            console.print(f"  {prefix}{' '.join(words)}", markup=False, soft_wrap=True)
    console.print("nothing was run")

"""The command: small models, trained with and without the parts of EQUISeg, and their report.

Every run is two of the library's own commands, which go on where they were stopped: so does this,
piece by piece (`experiment`).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.command.options import ROOT, to_path
from benchmarks.miniature import experiment
from benchmarks.miniature.experiment import SETTINGS, Run, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=to_path, default=Path("miniature"), help="default: miniature")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument(
        "--setting", action="append", choices=tuple(SETTINGS), help="only this; may be repeated"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default: CPU cores, 1 on a GPU")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")


def main(args: argparse.Namespace, console: Console) -> int:
    wanted = runs(args.out, args.setting or ())
    if args.dry_run:
        for run in wanted:
            state = "done" if run.done else "to do"
            console.print(f"{run.setting}, seed {run.seed}: {state} ({run.folder})")
        return 0
    args.kept = f"what is finished is in {args.out}; the same command goes on"
    failed = _work([run for run in wanted if not run.done], args, console)
    done = [run for run in runs(args.out) if run.done]
    if done:
        from benchmarks.miniature import report  # the data and their libraries, for this alone

        report.write(done, args.out)
        console.print(f"{args.out / 'report.md'} is of {len(done)} runs")
    left = sum(not run.done for run in wanted)
    for run, log in failed:
        console.print(f"failed: {run.setting}, seed {run.seed}; see {log}", markup=False)
    if left:
        console.print(f"{left} of {len(wanted)} runs are left; the same command goes on")
    return 1 if failed else 0


def _work(
    wanted: Sequence[Run], args: argparse.Namespace, console: Console
) -> list[tuple[Run, Path]]:
    """Do the runs, some at a time, until the minutes are over; which failed, with their logs."""
    on_gpu = torch.cuda.is_available() if args.device is None else args.device != "cpu"
    jobs = args.jobs or (1 if on_gpu else os.cpu_count() or 1)
    ends = None if args.minutes is None else monotonic() + 60 * args.minutes
    stop = threading.Event()
    failed: list[tuple[Run, Path]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        whole = progress.add_task("runs", total=len(wanted))

        def one(run: Run) -> None:
            if stop.is_set():
                return
            run.prepare()
            title = f"{run.setting}, seed {run.seed}"
            task = progress.add_task(title, total=experiment.TRAINING["steps"])
            for mark, command in run.commands(args.device):
                log = run.folder / f"{mark}.log"
                status = _call(
                    command, log, stop, jobs, lambda: progress.update(task, completed=run.steps())
                )
                if status is None:
                    break
                if status:
                    failed.append((run, log))
                    break
                run.mark(mark)
            progress.remove_task(task)
            progress.advance(whole, run.done)

        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(one, run) for run in wanted]
            try:
                while not all(x.done() for x in waiting):
                    if ends is not None and monotonic() > ends:
                        stop.set()
                    threading.Event().wait(0.5)
            finally:
                stop.set()
        for x in waiting:
            x.result()
    return failed


def _call(
    command: list[str], log: Path, stop: threading.Event, jobs: int, look: Callable[[], object]
) -> int | None:
    """The exit status of a command; None if it was stopped, or not begun, to go on later."""
    if stop.is_set():
        return None
    share = max(1, (os.cpu_count() or 1) // jobs)
    env = os.environ | {"OMP_NUM_THREADS": str(share), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    with log.open("w") as file:
        # Ctrl-C reaches all processes of a terminal, and a second signal ends a training at once.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        asked = False
        while process.poll() is None:
            if stop.is_set() and not asked:
                process.send_signal(signal.SIGTERM)
                asked = True
            look()
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                continue
    return None if asked and process.returncode else process.returncode

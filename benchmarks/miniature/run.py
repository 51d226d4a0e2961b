"""The claim of EQUISeg in miniature: small models, trained with and without its parts on synthetic
scenes, and how well they do when sensors fail.

Every run is two of the library's own commands, `equiseg_fast.train` and `equiseg_fast.evaluate`,
which go on where they were stopped: so does this. What is trained is in `experiment.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

from rich.console import Console

from benchmarks.command import outputs
from benchmarks.command.options import ROOT, to_path
from benchmarks.miniature import experiment
from benchmarks.miniature.experiment import Run, runs
from equiseg_fast._files import to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=to_path, default=Path("miniature"), help="default: miniature")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")


def main(args: argparse.Namespace, console: Console) -> int:
    wanted = runs(args.out)
    if args.dry_run:
        for run in wanted:
            console.print(f"{run}: {'done' if run.done else 'to do'} ({run.folder})")
        return 0
    args.kept = f"what is finished is in {args.out}; the same command goes on"
    ends = float("inf") if args.minutes is None else monotonic() + 60 * args.minutes
    failed = 0
    for run in wanted:
        if run.done or monotonic() >= ends:
            continue
        log, status = _train_and_evaluate(run, args.device, ends)
        if status == 0:
            outputs.write(run.folder / "evaluated", run.facts)
            console.print(f"done: {run}", markup=False)
        elif status is not None:
            failed += 1
            console.print(f"failed: {run}; see {log}", markup=False, soft_wrap=True)
    if done := [run for run in wanted if run.done]:
        from benchmarks.miniature import report  # the data and their libraries, for this alone

        report.write(done, args.out)
        console.print(f"{args.out / 'report.md'} is of {len(done)} runs")
    if left := len(wanted) - len(done):
        console.print(f"{left} of {len(wanted)} runs are left; the same command goes on")
    return 1 if failed else 0


def commands(run: Run, device: str | None) -> dict[str, list[str]]:
    """Name of the log -> command; the training refuses to go on with another configuration."""
    trained, evaluation = run.folder / "run", run.folder / "evaluation"
    given: dict[str, list[object]] = {
        "train": [run.folder / "train.yaml"],
        "evaluate": [
            trained / "model", trained / "config.yaml", "--limit", experiment.SCENES,
            "--batch-size", 10, "--out", evaluation,
        ],
    }  # fmt: skip
    chosen = [] if device is None else ["--device", device]
    return {
        name: [sys.executable, "-m", f"equiseg_fast.{name}", *map(str, words), *chosen]
        for name, words in given.items()
    }


def _train_and_evaluate(run: Run, device: str | None, ends: float) -> tuple[Path, int | None]:
    """The last log, and the exit status; None if the time was over."""
    config = run.config | {"out": str(run.folder / "run")}
    outputs.write(run.folder / "train.yaml", to_yaml(config))
    for name, command in commands(run, device).items():
        log = run.folder / f"{name}.log"
        # Ctrl-C reaches all processes of a terminal, and a second signal ends a training at once.
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
            )  # fmt: skip
        try:
            status = process.wait(ends - monotonic())
        except subprocess.TimeoutExpired:
            return log, None
        finally:
            process.terminate()
            process.wait()
        if status:
            break
    return log, status

"""The claim of EQUISeg in miniature: small models, trained with and without its parts on synthetic
scenes, and how well they do when sensors fail.

Every run is two of the library's own commands, `equiseg_fast.train` and `equiseg_fast.evaluate`,
which go on where they were stopped: so does this, piece by piece. What all runs have in common is
`TRAINING`, what tells them apart `SETTINGS`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.command import outputs
from benchmarks.command.options import ROOT, to_path
from equiseg_fast._files import to_yaml

# Ten epochs.
TRAINING: dict[str, Any] = {
    "data": {"kind": "synthetic", "size": [96, 128], "length": 400},
    "model": {"variant": "nano"},
    "steps": 1000,
    "batch_size": 4,
    "crop": [96, 128],
    "scale": [0.75, 1.5],
    "lr": 1e-3,
    # The last weights count, not those that do best on what is reported.
    "validate_on": "none",
    "log_every": 50,
    "save_every": 100,
    "workers": 0,
}
SEEDS = (0, 1, 2)
SCENES = 100
"""Of split val, for every condition."""


@dataclass(frozen=True)
class Setting:
    """A way to train. what: for readers; fields: of `EQUISegConfig`, other than the defaults."""

    what: str
    fields: dict[str, Any]


WITHOUT = {"gate": False, "sgm_weight": 0.0}
DROPOUT = {"modality_dropout": 0.5}
BLANKS = DROPOUT | {"missing": "zero"}
SETTINGS = {
    "mean": Setting("the mean of the encoded sensors", WITHOUT | {"cross_modal": False}),
    "no SGM": Setting("cross-modal block, then the mean", WITHOUT),
    "gate": Setting("of the SGM the gate alone", {"sgm_weight": 0.0}),
    "loss": Setting("of the SGM the loss alone", {"gate": False}),
    "SGM": Setting("gate and loss: EQUISeg as it is", {}),
    "no SGM, dropout": Setting("masked sensors in training", WITHOUT | DROPOUT),
    "SGM, dropout": Setting("masked sensors in training", DROPOUT),
    "no SGM, blanks": Setting("blank sensors in training", WITHOUT | BLANKS),
    "gate, blanks": Setting("blank sensors in training", BLANKS | {"sgm_weight": 0.0}),
    "SGM 0.1, blanks": Setting(
        "blank sensors in training, a tenth of the loss", BLANKS | {"sgm_weight": 0.1}
    ),
    "SGM, blanks": Setting("blank sensors in training", BLANKS),
}
CHOSEN = ("gate, blanks", "SGM 0.1, blanks")
"""Settings that are here because they did well with the first seed."""
FIELDS = {
    "sharp gate": Setting("temperature of the gate 0.1", BLANKS | {"gate_tau": 0.1}),
    "late gate": Setting("gates in stages 3 and 4", BLANKS | {"gate_stages": [3, 4]}),
    "weight 10": Setting("ten times the loss", BLANKS | {"sgm_weight": 10.0}),
    "sharp loss": Setting("temperature of the loss 0.1", BLANKS | {"sgm_tau": 0.1}),
    "encoded": Setting(
        "prototypes before the cross-modal block", BLANKS | {"sgm_source": "encoded"}
    ),
}
"""What "SGM, blanks" becomes with other values of single fields, of the first seed alone."""
SETTINGS |= FIELDS


@dataclass(frozen=True)
class Run:
    """One training and its evaluation, in a folder of their own."""

    setting: str
    seed: int
    folder: Path

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation" / "evaluation.json"

    @property
    def done(self) -> bool:
        return self.has("evaluated")

    @property
    def content(self) -> dict[str, Any]:
        """The configuration of the training, but for where its results are."""
        fields = TRAINING["model"] | SETTINGS[self.setting].fields
        return TRAINING | {"seed": self.seed, "model": fields}

    @property
    def facts(self) -> str:
        """What results depend on."""
        return to_yaml(self.content | {"evaluated on": SCENES})

    def has(self, mark: str) -> bool:
        """Whether a part is done, and of what this run is today."""
        path = self.folder / mark
        return path.exists() and path.read_text() == self.facts

    def mark(self, mark: str) -> None:
        """A part is done."""
        outputs.write(self.folder / mark, self.facts)

    def logged(self) -> dict[str, Any]:
        """The last line in the log of the training; OSError or IndexError where there is none."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return dict(json.loads(lines[-1]))

    def commands(self, device: str | None) -> list[tuple[str, list[str]]]:
        """What is left to do, each with the name of the file that says it is done."""
        chosen = [] if device is None else ["--device", device]
        train, trained = [str(self.folder / "train.yaml")], self.folder / "run"
        evaluate = [
            str(trained / "model"), str(trained / "config.yaml"), "--out",
            str(self.evaluation.parent), "--limit", str(SCENES), "--batch-size", "10",
        ]  # fmt: skip
        found = [("trained", "train", train), ("evaluated", "evaluate", evaluate)]
        return [
            (mark, [sys.executable, "-m", f"equiseg_fast.{name}", *arguments, *chosen])
            for mark, name, arguments in found
            if not self.has(mark)
        ]

    def prepare(self) -> None:
        """Write the configuration of the training, which refuses to go on with another one."""
        content = self.content | {"out": str(self.folder / "run")}
        outputs.write(self.folder / "train.yaml", to_yaml(content))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=to_path, default=Path("miniature"), help="default: miniature")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument(
        "--setting", action="append", choices=tuple(SETTINGS), help="only this; may be repeated"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default: CPU cores, 1 on a GPU")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")


def runs(out: Path, settings: Sequence[str] = ()) -> list[Run]:
    """All runs of these settings, or of all, seed by seed, so that what is there first is a
    comparison, and last those of one seed."""
    found = [
        Run(name, seed, out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
        for seed in SEEDS
        for name in settings or SETTINGS
        if seed == SEEDS[0] or name not in FIELDS
    ]
    return sorted(found, key=lambda run: run.setting in FIELDS)


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
        from benchmarks.miniature import report as miniature

        miniature.write(done, args.out)
        console.print(f"{args.out / 'report.md'} is of {len(done)} runs")
    left = sum(not run.done for run in wanted)
    for run, log in failed:
        console.print(f"failed: {run.setting}, seed {run.seed}; see {log}", markup=False)
    if left:
        console.print(f"{left} of {len(wanted)} runs are left; the same command goes on")
    return 1 if failed else 0


def _work(wanted: Sequence[Run], args: argparse.Namespace, console: Console) -> list[Any]:
    """Do the runs, some at a time, until the minutes are over; returns those that failed."""
    import torch

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
            task = progress.add_task(f"{run.setting}, seed {run.seed}", total=TRAINING["steps"])
            for mark, command in run.commands(args.device):
                log = run.folder / f"{mark}.log"
                status = _call(
                    command, log, stop, jobs, lambda: progress.update(task, completed=_step(run))
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


def _step(run: Run) -> int:
    """How many steps the log of a training has."""
    try:
        return int(run.logged()["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0

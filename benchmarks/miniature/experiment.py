"""The claim of EQUISeg in miniature: small models, trained with and without its parts on synthetic
scenes, and how well they do when sensors fail.

Every run is two of the library's own commands, `equiseg_fast.train` and `equiseg_fast.evaluate`,
which go on where they were stopped: so does this, piece by piece. What all runs have in common is
`TRAINING`, what tells them apart `SETTINGS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import outputs
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

    def steps(self) -> int:
        """How many steps the log of the training has."""
        try:
            return int(self.logged()["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return 0

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

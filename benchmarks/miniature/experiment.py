"""What is trained, in `experiment.json`, and the runs that come of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import outputs
from equiseg_fast._files import to_yaml

EXPERIMENT = outputs.read_json(Path(__file__).with_name("experiment.json"))
TRAINING: dict[str, Any] = EXPERIMENT["training"]
"""Ten epochs. The last weights count, not those that do best on what is reported."""
SEEDS: list[int] = EXPERIMENT["seeds"]
SCENES: int = EXPERIMENT["scenes"]
"""Of split val, for every condition."""
FIELDS: dict[str, dict[str, Any]] = EXPERIMENT["single fields"]
"""What "SGM, blanks" becomes with other values of single fields, of the first seed alone."""
SETTINGS: dict[str, dict[str, Any]] = EXPERIMENT["settings"] | FIELDS
"""Ways to train. what: for readers; model: fields of `EQUISegConfig`, other than the defaults."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation, in a folder of their own."""

    setting: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        """Of the training, but for where its results are."""
        fields = TRAINING["model"] | SETTINGS[self.setting]["model"]
        return TRAINING | {"seed": self.seed, "model": fields}

    @property
    def facts(self) -> str:
        """What results depend on; in the file `evaluated` once they are there."""
        return to_yaml(self.config | {"evaluated on": SCENES})

    @property
    def done(self) -> bool:
        path = self.folder / "evaluated"
        return path.exists() and path.read_text() == self.facts


def runs(out: Path) -> list[Run]:
    """Seed by seed, so that what is there first is a comparison, and last those of one seed."""
    found = [
        Run(name, seed, out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
        for seed in SEEDS
        for name in SETTINGS
        if seed == SEEDS[0] or name not in FIELDS
    ]
    return sorted(found, key=lambda run: run.setting in FIELDS)

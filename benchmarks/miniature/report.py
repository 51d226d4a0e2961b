"""What came out of the runs of `benchmarks.miniature`: results.json, report.md and two pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.command import outputs
from benchmarks.miniature import experiment as miniature
from benchmarks.miniature import plots
from benchmarks.miniature.experiment import CHOSEN, FIELDS, SEEDS, SETTINGS, Run
from equiseg_fast.data import collate
from equiseg_fast.data.samples import Cached
from equiseg_fast.data.spec import DataConfig
from equiseg_fast.models import EQUISeg
from equiseg_fast.robustness import CLEAN, Condition, Conditioned

GATES = ("SGM", "SGM, blanks", "SGM 0.1, blanks")
"""The settings whose gates are looked at, first seed."""

Row = Mapping[str, Any]
Column = Callable[[Row], float | None]


def _blank(setting: str) -> bool:
    """Whether an absent sensor is a blank one, so that masking is EMM again."""
    return SETTINGS[setting].fields.get("missing") == "zero"


def _masked(row: Row) -> float | None:
    return None if _blank(row["setting"]) else row["summary"]["masked_Avg"]


def _dead(row: Row) -> float:
    """The mean over the sensors, each of which delivers nothing while the others do."""
    names = [name for name in row["summary"]["degradations"] if name.startswith("dead_")]
    whole = [Condition("degradations", amount=1.0, name=name) for name in names]
    return fmean(row["scores"][str(condition)] for condition in whole)


COLUMNS: dict[str, Column] = {
    "clean": lambda row: row["summary"]["clean"],
    "EMM": lambda row: row["summary"]["EMM_Avg"],
    "masked": _masked,
    "RMM 0.5": lambda row: row["summary"]["RMM_Avg"]["0.5"],
    "NM low": lambda row: row["summary"]["NM"]["low"],
    "NM high": lambda row: row["summary"]["NM"]["high"],
    "degradations": lambda row: fmean(row["summary"]["degradations"].values()),
    "dead": _dead,
}
LOSSES: dict[str, Column] = {
    "seg": lambda row: row["losses"]["seg"],
    "sgm": lambda row: row["losses"]["sgm"],
}


def write(done: Sequence[Run], out: Path) -> None:
    """Everything, from the evaluations of the runs that are done."""
    rows = [_row(run) for run in done]
    first = {run.setting: run for run in done if run.seed == SEEDS[0]}
    gates = [contributions(first[name]) for name in GATES if name in first]
    sensors = [sensor.name for sensor in _data().sensors or ()]
    content = {
        "training": miniature.TRAINING,
        "scenes": miniature.SCENES,
        "gates": gates,
        "runs": rows,
    }
    names = [plots.draw_gates(gates, out / "gate.png")] if gates else []
    blank = [name for name in SETTINGS if _blank(name)]
    names.append(plots.draw_severity(rows, sensors, blank, out / "severity.png"))
    # A line for each run, and for all else.
    lines = [f'"{key}": {json.dumps(value)}' for key, value in content.items() if key != "runs"]
    lines.append('"runs": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    outputs.write(out / "results.json", "{\n" + ",\n".join(lines) + "\n}\n")
    outputs.write(out / "report.md", report(content, names))


def _row(run: Run) -> dict[str, Any]:
    """One run: its averages, the mIoU under every condition, and where the losses ended."""
    content = json.loads(run.evaluation.read_text())
    last = run.logged()
    scores = {str(Condition(**x["condition"])): x["miou"] for x in content["results"]}
    summary = content["summary"]["miou"]
    return {
        "setting": run.setting,
        "seed": run.seed,
        "losses": {name: last[name] for name in LOSSES},
        "summary": summary,
        "scores": scores,
    }


def _data() -> DataConfig:
    return DataConfig.from_dict(miniature.TRAINING["data"])


def contributions(run: Run, scenes: int = 50) -> dict[str, Any]:
    """With which weight each sensor goes into the fused map of every stage, the mean over channels
    and scenes, under some conditions: name -> `[4][M]`."""
    model = EQUISeg.from_pretrained(run.folder / "run" / "model")
    sensors = model.config.modalities
    dataset = Cached(_data().open("val"))
    looks = {"all well": CLEAN}
    for name in sensors:
        looks[f"{name} blank"] = Condition("emm", (name,))
    found = {}
    for title, condition in looks.items():
        seen = Conditioned(dataset, condition, limit=scenes)
        batch = collate([seen[i] for i in range(len(seen))])
        with torch.no_grad():
            stages = model.stages(batch.images)
        found[title] = [stage.contributions.mean(dim=(1, 2)).tolist() for stage in stages]
    return {"setting": run.setting, "seed": run.seed, "sensors": list(sensors), "shares": found}


def report(content: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The tables and what they mean, as Markdown."""
    rows = content["runs"]
    first = [row for row in rows if row["seed"] == SEEDS[0]]
    fields = [row for row in first if _blank(row["setting"])]
    degradations: dict[str, Column] = {
        name.replace("_", " "): lambda row, name=name: row["summary"]["degradations"][name]  # type: ignore[misc]
        for name in rows[0]["summary"]["degradations"]
    }
    lines = [
        "# EQUISeg in miniature: what its parts are worth when sensors fail",
        "",
        "Written by `python -m benchmarks miniature`.",
        "",
        overview(content),
        "",
        f'Blank sensors in training, and "SGM, blanks" with other values of single fields: seed '
        f"{SEEDS[0]} alone, with which {' and '.join(CHOSEN)} were chosen.",
        "",
        *_table(fields, COLUMNS),
        "",
        f"Losses of the last {content['training']['log_every']} steps: of segmentation, and of the "
        "self-guided module before it is weighted, also where the weight is 0.",
        "The latter compares what has the same `sgm_tau` and `sgm_source` and the same sensors in "
        "training.",
        "",
        *_table(rows, LOSSES, times=1, form=".3f", what=False),
        "",
        "Every degradation, the mean over its severities 0.25, 0.5, 0.75 and 1:",
        "",
        *_table([row for row in rows if row["setting"] not in FIELDS], degradations),
        "",
        *(f"![{name}]({name})" for name in pictures),
    ]
    return "\n".join(lines) + "\n"


def overview(content: Mapping[str, Any]) -> str:
    """What was trained, and the table of averages, as Markdown."""
    training = content["training"]
    rows = [row for row in content["runs"] if row["setting"] not in FIELDS]
    seeds = sorted({row["seed"] for row in rows})
    fewer = len(rows) < len(seeds) * len({row["setting"] for row in rows})
    least = min(row["summary"]["clean"] for row in rows)
    which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    lines = [
        f"EQUISeg-{training['model']['variant']}, {training['steps']} steps of "
        f"{training['batch_size']} of {training['data']['length']} scenes of "
        f"{' x '.join(map(str, training['data']['size']))} (`SyntheticScenes`), from scratch,",
        f"{which}{' (some settings fewer)' if fewer else ''}. mIoU in % over {content['scenes']} "
        "scenes not trained on: the mean over seeds (the least to the",
        f"most). No run ended below {100 * least:.1f} % clean.",
        "",
        "- EMM: sensors are zeros, which is their mean value, and the model is not told; the mean "
        "over all subsets but the whole",
        "- masked: the same, but the model is told (`present`); a dash where it takes masked "
        "sensors as blank ones",
        "- RMM: half of their elements are zeros; NM: noise on all sensors",
        "- degradations: the mean over all of them, at severities 0.25 to 1; dead: of those, one "
        "sensor delivers nothing",
        "",
        *_table(rows, COLUMNS),
    ]
    return "\n".join(lines)


def _table(
    rows: Sequence[Row], columns: Mapping[str, Column], *, times: float = 100, form: str = ".1f",
    what: bool = True,
) -> list[str]:  # fmt: skip
    """Lines of a table with a row for every setting that has some. what: and what it is."""
    titles = [*columns, *["what"] * what]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "--:|" * len(columns) + "---|" * what]
    for name, setting in SETTINGS.items():
        if own := [row for row in rows if row["setting"] == name]:
            cells = [_cell([value(row) for row in own], times, form) for value in columns.values()]
            cells += [setting.what] * what
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float | None], times: float, form: str) -> str:
    """The mean, and the least to the most of several; a dash where there is nothing."""
    there = [times * x for x in values if x is not None]
    if not there:
        return "-"
    spread = f" ({min(there):{form}} to {max(there):{form}})" if len(there) > 1 else ""
    return f"{fmean(there):{form}}{spread}"

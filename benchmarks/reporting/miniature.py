"""What came out of the runs of `benchmarks.miniature`: results.json, report.md and two pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import miniature, outputs
from benchmarks.miniature import Run
from benchmarks.reporting.plots import miniature as plots
from equiseg_fast.data import collate
from equiseg_fast.data.spec import DataConfig
from equiseg_fast.models import EQUISeg
from equiseg_fast.robustness import CLEAN, Condition, Conditioned

GATE = "SGM, dropout"
"""The setting whose gate is looked at, first seed."""

COLUMNS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "clean": lambda s: s["clean"],
    "EMM": lambda s: s["EMM_Avg"],
    "masked": lambda s: s["masked_Avg"],
    "RMM 0.5": lambda s: s["RMM_Avg"]["0.5"],
    "NM low": lambda s: s["NM"]["low"],
    "NM high": lambda s: s["NM"]["high"],
    "degradations": lambda s: fmean(s["degradations"].values()),
}


def write(done: Sequence[Run], out: Path) -> None:
    """Everything, from the evaluations of the runs that are done."""
    rows = [_row(run) for run in done]
    content: dict[str, Any] = {
        "training": miniature.TRAINING,
        "scenes": miniature.SCENES,
        "runs": rows,
    }
    looked_at = [run for run in done if run.setting == GATE]
    names = []
    if looked_at:
        content["gate"] = contributions(looked_at[0])
        names.append(plots.draw_gate(content["gate"], out / "gate.png"))
    names.append(plots.draw_severity(rows, out / "severity.png"))
    outputs.write(out / "results.json", json.dumps(content, indent=1) + "\n")
    outputs.write(out / "report.md", report(content, names))


def _row(run: Run) -> dict[str, Any]:
    """One run: its averages, and the mIoU under every condition."""
    content = json.loads(run.evaluation.read_text())
    scores = [{**x["condition"], "miou": x["miou"]} for x in content["results"]]
    return {
        "setting": run.setting,
        "seed": run.seed,
        "summary": content["summary"]["miou"],
        "scores": scores,
    }


def contributions(run: Run, scenes: int = 50) -> dict[str, Any]:
    """What each sensor contributes to the fused map of every stage, the mean over channels and
    scenes, under some conditions: name -> `[4][M]`, None where a sensor is absent."""
    model = EQUISeg.from_pretrained(run.folder / "run" / "model")
    sensors = model.config.modalities
    dataset = DataConfig.from_dict(miniature.TRAINING["data"]).open("val")
    looks = {"all well": CLEAN, "night": Condition("degradations", amount=1.0, name="night")}
    for name in sensors:
        looks[f"{name} blank"] = Condition("emm", (name,))
    looks[f"{sensors[0]} absent"] = Condition("masked", (sensors[0],))
    found = {}
    for title, condition in looks.items():
        seen = Conditioned(dataset, condition, limit=scenes)
        batch = collate([seen[i] for i in range(len(seen))])
        with torch.no_grad():
            stages = model.stages(batch.images, present=batch.mask)
        table = [stage.contributions.mean(dim=(1, 2)).tolist() for stage in stages]
        there = batch.present[:, 0].tolist()
        found[title] = [
            [x if is_there else None for x, is_there in zip(row, there, strict=True)]
            for row in table
        ]
    return {"setting": run.setting, "seed": run.seed, "sensors": list(sensors), "shares": found}


def report(content: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The tables and what they mean, as Markdown."""
    degradations = list(content["runs"][0]["summary"]["degradations"])
    lines = [
        "# EQUISeg in miniature: what its parts are worth when sensors fail",
        "",
        "Written by `python -m benchmarks miniature`.",
        "",
        overview(content),
        "",
        "Every degradation, the mean over its severities 0.25, 0.5, 0.75 and 1:",
        "",
        "| | " + " | ".join(d.replace("_", " ") for d in degradations) + " |",
        "|---|" + "--:|" * len(degradations),
    ]
    for name, own in _by_setting(content).items():
        cells = [_cell([row["summary"]["degradations"][d] for row in own]) for d in degradations]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join(lines) + "\n"


def overview(content: Mapping[str, Any]) -> str:
    """What was trained, and the table of averages, as Markdown."""
    training = content["training"]
    seeds = sorted({row["seed"] for row in content["runs"]})
    least = min(row["summary"]["clean"] for row in content["runs"])
    lines = [
        f"EQUISeg-{training['model']['variant']}, {training['steps']} steps of "
        f"{training['batch_size']} of {training['data']['length']} scenes of "
        f"{' x '.join(map(str, training['data']['size']))} (`SyntheticScenes`), from scratch,",
        f"seeds {', '.join(map(str, seeds))}. mIoU in % over {content['scenes']} scenes not "
        "trained on: the mean over seeds (the least to the most). No run",
        f"ended below {100 * least:.1f} % clean. EMM: sensors are zeros and the model is not told, "
        "the mean over all subsets of them;",
        "masked: the model is told (`present`); RMM: half of the elements are zeros; NM: noise on "
        "all sensors;",
        "degradations: the mean of 11, at severities 0.25 to 1.",
        "",
        "| | " + " | ".join(COLUMNS) + " | what |",
        "|---|" + "--:|" * len(COLUMNS) + "---|",
    ]
    for name, own in _by_setting(content).items():
        cells = [_cell([f(row["summary"]) for row in own]) for f in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {miniature.SETTINGS[name].what} |")
    return "\n".join(lines)


def _by_setting(content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Runs of every setting that has some, in the order of the settings."""
    found = {
        name: [row for row in content["runs"] if row["setting"] == name]
        for name in miniature.SETTINGS
    }
    return {name: rows for name, rows in found.items() if rows}


def _cell(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    spread = f" ({100 * low:.1f} to {100 * high:.1f})" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"

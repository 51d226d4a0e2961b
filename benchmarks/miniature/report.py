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
from benchmarks.reporting.plots import panels, save
from equiseg_fast.data import collate
from equiseg_fast.data.samples import Cached
from equiseg_fast.data.spec import DataConfig
from equiseg_fast.models import EQUISeg
from equiseg_fast.robustness import CLEAN, SEVERITIES, Condition, Conditioned, proper_subsets

GATES = ("SGM", "SGM, blanks", "SGM 0.1, blanks")
"""The settings whose gates are looked at, first seed."""
LINES = ("mean", "no SGM", "SGM", "SGM, dropout", "SGM 0.1, blanks")
"""Settings that have a line in the picture: more would hide one another."""
COLOURS = ("#8c8c8c", "#4c72b0", "#dd8452", "#55a868", "#c44e52")

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], float | None]]


def _blank(row: Row) -> bool:
    """Whether an absent sensor is a blank one, so that masking is EMM again."""
    return miniature.SETTINGS[row["setting"]]["model"].get("missing") == "zero"


def _dead(row: Row) -> float:
    """The mean over the sensors, each of which delivers nothing while the others do."""
    names = [name for name in row["summary"]["degradations"] if name.startswith("dead_")]
    whole = [Condition("degradations", amount=1.0, name=name) for name in names]
    return fmean(row["scores"][str(condition)] for condition in whole)


def _degradation(row: Row, name: str) -> dict[float, float]:
    """Severity -> mIoU, from 0, where nothing happens."""
    at = {x: str(Condition("degradations", amount=x, name=name)) for x in SEVERITIES}
    return {0.0: row["scores"]["clean"]} | {x: row["scores"][title] for x, title in at.items()}


def _failures(row: Row, protocol: str, sensors: Sequence[str]) -> dict[float, float]:
    """How many sensors fail -> mIoU, the mean over which do."""
    found: dict[float, list[float]] = {0: [row["scores"]["clean"]]}
    for subset in proper_subsets(sensors)[1:]:
        score = row["scores"][str(Condition(protocol, subset))]
        found.setdefault(len(subset), []).append(score)
    return {count: fmean(scores) for count, scores in found.items()}


COLUMNS: Columns = {
    "clean": lambda row: row["summary"]["clean"],
    "EMM": lambda row: row["summary"]["EMM_Avg"],
    "masked": lambda row: None if _blank(row) else row["summary"]["masked_Avg"],
    "RMM 0.5": lambda row: row["summary"]["RMM_Avg"]["0.5"],
    "NM low": lambda row: row["summary"]["NM"]["low"],
    "NM high": lambda row: row["summary"]["NM"]["high"],
    "degradations": lambda row: fmean(row["summary"]["degradations"].values()),
    "dead": _dead,
}
LOSSES: Columns = {
    "seg": lambda row: row["losses"]["seg"],
    "sgm": lambda row: row["losses"]["sgm"],
}


def write(done: Sequence[miniature.Run], out: Path) -> None:
    """Everything, from the evaluations of the runs that are done."""
    first = {run.setting: run for run in done if run.seed == miniature.SEEDS[0]}
    content: dict[str, Any] = {
        "training": miniature.TRAINING,
        "scenes": miniature.SCENES,
        "gates": [_contributions(first[name]) for name in GATES if name in first],
        "runs": [_row(run) for run in done],
    }
    outputs.write(out / "results.json", json.dumps(content) + "\n")
    outputs.write(out / "report.md", report(content))
    draw_severity(content["runs"], out / "severity.png")
    if content["gates"]:
        draw_gates(content["gates"], out / "gate.png")


def _row(run: miniature.Run) -> dict[str, Any]:
    """One run: its averages, the mIoU under every condition, and where the losses ended."""
    found = json.loads((run.folder / "evaluation" / "evaluation.json").read_text())
    last = json.loads((run.folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "setting": run.setting,
        "seed": run.seed,
        "losses": {"seg": last["seg"], "sgm": last["sgm"]},
        "summary": found["summary"]["miou"],
        "scores": {str(Condition(**x["condition"])): x["miou"] for x in found["results"]},
    }


def _contributions(run: miniature.Run, scenes: int = 50) -> dict[str, Any]:
    """With which weight each sensor goes into the fused map of every stage, the mean over channels
    and scenes, under some conditions: name -> `[4][M]`."""
    model = EQUISeg.from_pretrained(run.folder / "run" / "model")
    sensors = model.config.modalities
    dataset = Cached(DataConfig.from_dict(miniature.TRAINING["data"]).open("val"))
    looks = {"all well": CLEAN} | {f"{name} blank": Condition("emm", (name,)) for name in sensors}
    found = {}
    for title, condition in looks.items():
        seen = Conditioned(dataset, condition, limit=scenes)
        batch = collate([seen[i] for i in range(len(seen))])
        with torch.no_grad():
            stages = model.stages(batch.images)
        found[title] = [stage.contributions.mean(dim=(1, 2)).tolist() for stage in stages]
    return {"setting": run.setting, "seed": run.seed, "sensors": list(sensors), "shares": found}


REPORT = """# EQUISeg in miniature: what its parts are worth when sensors fail

Written by `python -m benchmarks miniature`; what the columns mean is in docs/failing-sensors.md.

{overview}

Seed {seed} alone, with which "gate, blanks" and "SGM 0.1, blanks" were chosen, and "SGM, blanks"
with other values of single fields. seg and sgm: 100 times the losses of the last {log_every} steps,
of segmentation, and of the self-guided module before it is weighted, also where the weight is 0;
the latter compares what has the same `sgm_tau` and `sgm_source` and the same sensors in training.

{table}

![gate.png](gate.png)
![severity.png](severity.png)
"""
OVERVIEW = """\
EQUISeg-{variant}, {steps} steps of {batch_size} of {length} scenes of {height} x {width} \
(`SyntheticScenes`), from scratch,
seeds {seeds}. mIoU in % over {scenes} scenes not trained on: the mean over seeds (the least to the
most). No run ended below {least:.1f} % clean.

{table}"""


def report(content: Mapping[str, Any]) -> str:
    """The tables and what they mean, as Markdown."""
    rows = [row for row in content["runs"] if row["seed"] == miniature.SEEDS[0]]
    return REPORT.format(
        **content["training"], overview=overview(content), seed=miniature.SEEDS[0],
        table=_table(rows, {**COLUMNS, **LOSSES}),
    )  # fmt: skip


def overview(content: Mapping[str, Any]) -> str:
    """What was trained, and the table of averages, as Markdown."""
    training = content["training"]
    height, width = training["data"]["size"]
    rows = [row for row in content["runs"] if row["setting"] not in miniature.FIELDS]
    return OVERVIEW.format(
        **training, variant=training["model"]["variant"], length=training["data"]["length"],
        height=height, width=width, seeds=", ".join(map(str, sorted({r["seed"] for r in rows}))),
        scenes=content["scenes"], least=100 * min(r["summary"]["clean"] for r in rows),
        table=_table(rows, COLUMNS),
    )  # fmt: skip


def _table(rows: Sequence[Row], columns: Columns) -> str:
    """A row for every setting that has some; 100 times each value, the mean, and of several the
    least to the most."""
    lines = [f"| | {' | '.join(columns)} | what |", "|---|" + "--:|" * len(columns) + "---|"]
    for name, setting in miniature.SETTINGS.items():
        own = [row for row in rows if row["setting"] == name]
        cells = []
        for value in columns.values():
            values = [100 * x for x in map(value, own) if x is not None]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{spread}" if values else "-")
        if own:
            lines.append(f"| {name} | {' | '.join(cells)} | {setting['what']} |")
    return "\n".join(lines)


def draw_severity(rows: Sequence[Row], path: Path) -> None:
    """One panel for sensors that are blank, one for masked ones, and one per degradation: mIoU over
    how many or how severe, a line per setting, its seeds as a band."""
    degradations = list(rows[0]["summary"]["degradations"])
    sensors = [name.removeprefix("dead_") for name in degradations if name.startswith("dead_")]
    protocols = {"emm": "blank sensors", "masked": "masked sensors"}
    figure, axes = panels(len(degradations) + 2, 3.1, 2.7, columns=5)
    highest = 100 * max(max(row["scores"].values()) for row in rows)
    for axis, name in zip(axes, [*protocols, *degradations], strict=True):
        for setting, colour in zip(LINES, COLOURS, strict=True):
            own = [row for row in rows if row["setting"] == setting]
            if not own or (name == "masked" and _blank(own[0])):
                continue
            if name in protocols:
                curves = [_failures(row, name, sensors) for row in own]
            else:
                curves = [_degradation(row, name) for row in own]
            columns = [[100 * curve[x] for curve in curves] for x in curves[0]]
            at, means = list(curves[0]), [fmean(column) for column in columns]
            axis.plot(at, means, color=colour, marker=".", label=setting)
            bounds = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(at, *bounds, color=colour, alpha=0.15, lw=0)
        axis.set_title(protocols.get(name, name.replace("_", " ")))
        axis.set_ylim(0, 1.05 * highest)
        axis.set_xlabel(f"how many of {len(sensors)}" if name in protocols else "severity")
    for axis in axes[::5]:
        axis.set_ylabel("mIoU, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)


def draw_gates(found: Sequence[Row], path: Path) -> None:
    """A row per setting, a panel per condition, one stacked bar per stage: the weights of the
    sensors in the fused map."""
    sensors, titles = found[0]["sensors"], list(found[0]["shares"])
    figure, axes = panels(len(found) * len(titles), 2.7, 2.7, columns=len(titles))
    looks = [(title, x["shares"][title]) for x in found for title in titles]
    for axis, (title, table) in zip(axes, looks, strict=True):
        bottom = [0.0] * len(table)
        for m, (sensor, colour) in enumerate(zip(sensors, COLOURS[1:], strict=False)):
            part = [100 * row[m] for row in table]
            bars = axis.bar(range(1, 5), part, bottom=bottom, color=colour, label=sensor)
            axis.bar_label(bars, fmt="%.0f", label_type="center", color="white", fontsize=9)
            bottom = [a + b for a, b in zip(bottom, part, strict=True)]
        axis.set_title(title)
        axis.set_ylim(0, 100)
        axis.set_yticks([0, 50, 100])
        axis.set_xticks(range(1, 5))
        axis.set_xlabel("stage")
    for axis, x in zip(axes[:: len(titles)], found, strict=True):
        axis.set_ylabel(f"{x['setting']}\nmean weight, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(sensors), frameon=False)
    save(figure, path)

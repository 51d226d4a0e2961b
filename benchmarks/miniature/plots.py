"""Pictures of the runs in miniature: mIoU over what fails, and how gates weigh the sensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.reporting.plots import panels, pyplot, save
from equiseg_fast.robustness import SEVERITIES, Condition, proper_subsets

LINES = {
    "mean": "#8c8c8c",
    "no SGM": "#4c72b0",
    "SGM": "#dd8452",
    "SGM, dropout": "#55a868",
    "SGM 0.1, blanks": "#c44e52",
}
"""Settings that have a line, with its colour: more would hide one another."""
SENSORS = ("#4c72b0", "#55a868", "#dd8452", "#8172b3")

Row = Mapping[str, Any]
Curve = dict[float, float]


def draw_severity(
    rows: Sequence[Row], sensors: Sequence[str], without_mask: Collection[str], path: Path
) -> str:
    """One panel for sensors that are blank, one for masked ones, and one per degradation: mIoU over
    how many or how severe, a line per setting, its seeds as a band.

    without_mask: settings to which absent sensors are blank ones.
    """
    names = list(rows[0]["summary"]["degradations"])
    figure, axes = panels(len(names) + 2, 3.1, 2.7, columns=5)
    used = [name for name in LINES if any(row["setting"] == name for row in rows)]
    highest = 100 * max(s for row in rows for s in row["scores"].values())
    protocols = {"emm": "blank sensors", "masked": "masked sensors"}
    for axis, name in zip(axes, [*protocols, *names], strict=True):
        for setting in used:
            own = [row for row in rows if row["setting"] == setting]
            if name == "masked" and setting in without_mask:
                continue
            if name in protocols:
                curves = [_failures(row, name, sensors) for row in own]
            else:
                curves = [_degradation(row, name) for row in own]
            at = list(curves[0])
            columns = [[100 * curve[x] for curve in curves] for x in at]
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            colour = LINES[setting]
            axis.plot(at, [fmean(c) for c in columns], color=colour, marker=".", label=setting)
            axis.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_title(protocols.get(name, name.replace("_", " ")))
        axis.set_ylim(0, 1.05 * highest)
        axis.set_xlabel(f"how many of {len(sensors)}" if name in protocols else "severity")
    for axis in axes[::5]:
        axis.set_ylabel("mIoU, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(used), frameon=False)
    return save(figure, path)


def _failures(row: Row, protocol: str, sensors: Sequence[str]) -> Curve:
    """How many sensors fail -> mIoU, the mean over which do."""
    found: dict[float, list[float]] = {0: [row["scores"]["clean"]]}
    for subset in proper_subsets(sensors):
        if subset:
            score = row["scores"][str(Condition(protocol, subset))]
            found.setdefault(len(subset), []).append(score)
    return {count: fmean(scores) for count, scores in found.items()}


def _degradation(row: Row, name: str) -> Curve:
    """Severity -> mIoU, from 0, where nothing happens."""
    found = {0.0: row["scores"]["clean"]}
    for severity in SEVERITIES:
        condition = Condition("degradations", amount=severity, name=name)
        found[severity] = row["scores"][str(condition)]
    return found


def draw_gates(found: Sequence[Mapping[str, Any]], path: Path) -> str:
    """A row per setting, a panel per condition, one stacked bar per stage: the weights of the
    sensors in the fused map."""
    sensors, titles = found[0]["sensors"], list(found[0]["shares"])
    figure, axes = panels(len(found) * len(titles), 2.7, 2.7, columns=len(titles))
    looks = [(title, x["shares"][title]) for x in found for title in titles]
    for axis, (title, table) in zip(axes, looks, strict=True):
        bottom = [0.0] * len(table)
        for m, colour in enumerate(SENSORS[: len(sensors)]):
            part = [row[m] for row in table]
            axis.bar(range(1, 5), part, bottom=bottom, color=colour, width=0.8)
            for stage, (value, start) in enumerate(zip(part, bottom, strict=True), start=1):
                if value > 0.04:
                    axis.text(
                        stage, start + value / 2, f"{100 * value:.0f}", ha="center", va="center",
                        color="white", fontsize=9,
                    )  # fmt: skip
            bottom = [a + b for a, b in zip(bottom, part, strict=True)]
        axis.set_title(title)
        axis.set_ylim(0, 1)
        axis.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        axis.set_xticks(range(1, 5))
        axis.set_xlabel("stage")
    for axis, x in zip(axes[:: len(titles)], found, strict=True):
        axis.set_ylabel(f"{x['setting']}\nmean weight, %")
    handles = [pyplot().Rectangle((0, 0), 1, 1, color=c) for c in SENSORS[: len(sensors)]]
    figure.legend(handles, sensors, loc="outside lower center", ncols=len(sensors), frameon=False)
    return save(figure, path)

"""Pictures of the runs in miniature: mIoU over severity, and what sensors contribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import miniature
from benchmarks.reporting.plots.style import panels, pyplot, save

LINES = (
    "#8c8c8c", "#4c72b0", "#64b5cd", "#8172b3", "#dd8452", "#55a868", "#c44e52", "#937860",
    "#000000",
)  # fmt: skip
"""Colours of the settings, in their order."""
SENSORS = ("#4c72b0", "#55a868", "#dd8452", "#8172b3")


def draw_severity(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """One panel per degradation: mIoU over severity, a line per setting, its seeds as a band."""
    degraded = [s["name"] for s in rows[0]["scores"] if s["protocol"] == "degradations"]
    names = list(dict.fromkeys(degraded))
    figure, axes = panels(len(names), 3.6, 2.9, columns=4)
    names_of_rows = {row["setting"] for row in rows}
    used = [name for name in list(miniature.SETTINGS)[: len(LINES)] if name in names_of_rows]
    highest = 100 * max(s["miou"] for row in rows for s in row["scores"])
    for axis, degradation in zip(axes, names, strict=True):
        for name in used:
            colour = LINES[list(miniature.SETTINGS).index(name)]
            curves = [_curve(row, degradation) for row in rows if row["setting"] == name]
            severities = sorted(curves[0])
            columns = [[100 * curve[s] for curve in curves] for s in severities]
            axis.plot(severities, [fmean(c) for c in columns], color=colour, marker=".", label=name)
            axis.fill_between(
                severities, [min(c) for c in columns], [max(c) for c in columns], color=colour,
                alpha=0.15, lw=0,
            )  # fmt: skip
        axis.set_title(degradation.replace("_", " "))
        axis.set_ylim(0, 1.05 * highest)
        axis.set_xlabel("severity")
    for axis in axes[::4]:
        axis.set_ylabel("mIoU, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(used), frameon=False)
    return save(figure, path)


def _curve(row: Mapping[str, Any], degradation: str) -> dict[float, float]:
    """Severity -> mIoU, from 0, where nothing happens."""
    clean = next(s["miou"] for s in row["scores"] if s["protocol"] == "clean")
    return {0.0: clean} | {
        s["amount"]: s["miou"] for s in row["scores"] if s["name"] == degradation
    }


def draw_gate(found: Mapping[str, Any], path: Path) -> str:
    """One panel per condition, one stacked bar per stage: who contributes to the fused map."""
    sensors, shares = found["sensors"], found["shares"]
    figure, axes = panels(len(shares), 3.4, 2.9, columns=4)
    for axis, (title, table) in zip(axes, shares.items(), strict=True):
        bottom = [0.0] * len(table)
        for m, colour in enumerate(SENSORS[: len(sensors)]):
            part = [row[m] or 0.0 for row in table]
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
        axis.set_xticks(range(1, 5), [f"stage {s}" for s in range(1, 5)])
    for axis in axes[::4]:
        axis.set_ylabel("share of the fused map, %")
    handles = [pyplot().Rectangle((0, 0), 1, 1, color=c) for c in SENSORS[: len(sensors)]]
    figure.legend(handles, sensors, loc="outside lower center", ncols=len(sensors), frameon=False)
    return save(figure, path)

"""Bars of real shapes: one panel per operation, everything relative to the eager baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command.table import milliseconds, significant
from benchmarks.measure.record import Record
from benchmarks.reporting.analysis import grouped
from benchmarks.reporting.plots.style import colour, legend, pyplot, save

GROUPS_PER_PANEL = 8
PANELS_PER_PAGE = 12
GAP = 0.6


Panel = tuple[str, list[list[Record]]]


def pages(stem: str, records: Sequence[Record], field: str) -> dict[str, list[Panel]]:
    """Panels by file name: one page for a quick run, otherwise pages of each operation."""
    rows = [r for r in records if getattr(r, field) is not None]
    panels = _panels(rows)
    if len(panels) <= PANELS_PER_PAGE:
        return {stem: panels} if panels else {}
    found = {}
    for op in dict.fromkeys(op for op, _ in panels):
        own = [panel for panel in panels if panel[0] == op]
        for i in range(0, len(own), PANELS_PER_PAGE):
            number = f"-{i // PANELS_PER_PAGE + 1}" if len(own) > PANELS_PER_PAGE else ""
            found[f"{stem}-{op}{number}"] = own[i : i + PANELS_PER_PAGE]
    return found


def _panels(records: Sequence[Record]) -> list[Panel]:
    """(operation, groups of providers), with at most GROUPS_PER_PANEL groups each."""
    by_op: dict[str, list[list[Record]]] = {}
    for group in grouped(records):
        by_op.setdefault(group[0].op, []).append(group)
    return [
        (op, groups[i : i + GROUPS_PER_PANEL])
        for op, groups in by_op.items()
        for i in range(0, len(groups), GROUPS_PER_PANEL)
    ]


def draw(panels: Sequence[Panel], field: str, unit: str, title: str, path: Path) -> str:
    """Horizontal bars relative to the eager baseline, each with its absolute value; returns the
    file name."""
    columns = min(2, len(panels))
    needed = [sum(len(g) + GAP for g in groups) for _, groups in panels]
    heights = [max(needed[i : i + columns]) for i in range(0, len(panels), columns)]
    inches = [0.75 + 0.23 * height for height in heights]
    figure, axes = pyplot().subplots(
        len(heights),
        columns,
        figsize=(5.8 * columns, 1.1 + sum(inches)),
        height_ratios=inches,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, (op, groups)) in enumerate(zip(axes.flat, panels, strict=False)):
        _panel(axis, op, groups, field, heights[i // columns])
    legend(figure, {r.provider for _, groups in panels for group in groups for r in group})
    sample = panels[0][1][0][0]
    note = "whiskers: p20 to p80, " if field == "p50_us" else ""
    figure.suptitle(
        f"{title} ({unit}), relative to the eager baseline\n"
        f"suite {sample.suite}; {note}shorter is better",
        fontsize=12,
    )
    return save(figure, path)


def _panel(axis: Any, op: str, groups: Sequence[list[Record]], field: str, rows: float) -> None:
    y = 0.0
    ticks, labels = [], []
    widest = 0.0
    for group in groups:
        base = next((r for r in group if r.provider == "baseline"), group[0])
        scale = getattr(base, field) or 1.0
        start = y
        for record in group:
            value = getattr(record, field)
            error = None
            if field == "p50_us":
                low, high = value - record.p20_us, record.p80_us - value
                error = [[low / scale], [high / scale]]
            axis.barh(
                y, value / scale, height=0.85, color=colour(record.provider),
                xerr=error, error_kw={"lw": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            end = (record.p80_us if field == "p50_us" else value) / scale
            widest = max(widest, end)
            text = milliseconds(value) if field == "p50_us" else significant(value)
            axis.annotate(
                text,
                (end, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            y += 1
        ticks.append((start + y - 1) / 2)
        labels.append(_tick(group[0], groups))
        y += GAP
    axis.axvline(1.0, color="#8c8c8c", lw=0.8, ls=":")
    axis.set_xlim(0, 1.22 * widest)
    axis.set_yticks(ticks, labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(rows - GAP, -0.6)
    axis.set_title(op, loc="left")
    axis.set_xlabel("x eager baseline")


def _tick(record: Record, groups: Sequence[list[Record]]) -> str:
    """What tells this group from the others of the panel."""
    shape = record.shape
    shapes = {g[0].shape for g in groups}
    parts = []
    if len({(s.variant, s.height, s.width, s.batch, s.modalities) for s in shapes}) > 1:
        parts.append(shape.label)
    elif shape.stage:
        parts.append(f"stage {shape.stage}")
    if len({g[0].dtype for g in groups}) > 1:
        parts.append(record.dtype)
    return "\n".join([*parts, record.mode])

"""Bars of real shapes, one panel per operation, relative to the eager baseline; and where the time
of a model goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command.table import milliseconds, significant
from benchmarks.measure.breakdown import REST
from benchmarks.measure.record import Record
from benchmarks.reporting.analysis import grouped
from benchmarks.reporting.plots.style import colour, in_order, legend, pyplot, save

GROUPS_PER_PANEL = 8
PANELS_PER_PAGE = 12
GAP = 0.6
PART_COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd", "#ccb974",
    "#da8bc3",
)  # fmt: skip
REST_COLOUR = "#b5b5b5"
NARROW = 0.05
"""A share of the longest bar that is too narrow for its number."""

Panel = tuple[str, list[list[Record]]]


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def pages(stem: str, records: Sequence[Record], field: str) -> dict[str, list[Panel]]:
    """Panels by file name: one page for a quick run, otherwise pages of each operation."""
    by_op: dict[str, list[list[Record]]] = {}
    for group in grouped(r for r in records if getattr(r, field) is not None):
        by_op.setdefault(group[0].op, []).append(group)
    panels = {op: [(op, c) for c in _chunks(g, GROUPS_PER_PANEL)] for op, g in by_op.items()}
    everything = [panel for own in panels.values() for panel in own]
    if len(everything) <= PANELS_PER_PAGE:
        return {stem: everything} if everything else {}
    found = {}
    for op, own in panels.items():
        chunks = _chunks(own, PANELS_PER_PAGE)
        for i, chunk in enumerate(chunks, start=1):
            found[f"{stem}-{op}" + (f"-{i}" if len(chunks) > 1 else "")] = chunk
    return found


def draw(panels: Sequence[Panel], field: str, unit: str, title: str, path: Path) -> str:
    """Horizontal bars relative to the eager baseline, each with its absolute value; returns the
    file name."""
    columns = min(2, len(panels))
    needed = [sum(len(g) + GAP for g in groups) for _, groups in panels]
    heights = [max(row) for row in _chunks(needed, columns)]
    inches = [0.75 + 0.23 * height for height in heights]
    figure, axes = pyplot().subplots(
        len(heights), columns, figsize=(5.8 * columns, 1.1 + sum(inches)), height_ratios=inches,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, (op, groups)) in enumerate(zip(axes.flat, panels, strict=False)):
        _panel(axis, op, groups, field, heights[i // columns])
    records = [r for _, groups in panels for group in groups for r in group]
    legend(figure, {r.provider for r in records})
    note = "whiskers: p20 to p80, " if field == "p50_us" else ""
    figure.suptitle(
        f"{title} ({unit}), relative to the eager baseline\n"
        f"suite {records[0].suite}; {note}shorter is better",
        fontsize=12,
    )
    return save(figure, path)


def _panel(axis: Any, op: str, groups: Sequence[list[Record]], field: str, rows: float) -> None:
    timed = field == "p50_us"
    y = widest = 0.0
    ticks = {}
    for group in groups:
        base = next((r for r in group if r.provider == "baseline"), group[0])
        scale = getattr(base, field) or 1.0
        ticks[y + (len(group) - 1) / 2] = _tick(group[0], groups)
        for record in group:
            value = getattr(record, field)
            band = (value - record.p20_us, record.p80_us - value) if timed else (0.0, 0.0)
            axis.barh(
                y, value / scale, height=0.85, color=colour(record.provider),
                xerr=[[x / scale] for x in band] if timed else None,
                error_kw={"lw": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            end = (value + band[1]) / scale
            widest = max(widest, end)
            axis.annotate(
                milliseconds(value) if timed else significant(value), (end, y), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
            y += 1
        y += GAP
    axis.axvline(1.0, color="#8c8c8c", lw=0.8, ls=":")
    axis.set_xlim(0, 1.22 * widest)
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(rows - GAP, -0.6)
    axis.set_title(op, loc="left")
    axis.set_xlabel("x eager baseline")


def _tick(record: Record, groups: Sequence[list[Record]]) -> str:
    """What tells this group from the others of the panel."""
    shape = record.shape
    parts = [f"stage {shape.stage}"] if shape.stage else []
    if len({g[0].shape.label.replace(f" s{g[0].shape.stage} ", " ") for g in groups}) > 1:
        parts = [shape.label]
    if len({g[0].dtype for g in groups}) > 1:
        parts.append(record.dtype)
    return "\n".join([*parts, record.mode])


def draw_breakdown(breakdown: Mapping[str, Any], path: Path) -> str:
    """The parts of a model stacked, a bar per provider; breakdown: see `measure.breakdown`. Returns
    the file name."""
    found: Mapping[str, Mapping[str, float]] = breakdown["providers"]
    providers = in_order(found)
    parts = list(dict.fromkeys(part for name in providers for part in found[name]))
    colours = dict(zip(parts, PART_COLOURS, strict=False)) | {REST: REST_COLOUR}
    longest = max(1e3 * sum(found[name].values()) for name in providers)
    figure, axis = pyplot().subplots(
        figsize=(11, 1.9 + 0.75 * len(providers)), layout="constrained"
    )
    for y, name in enumerate(providers):
        left = 0.0
        for part in parts:
            width, label = 1e3 * found[name].get(part, 0.0), part if y == 0 else None
            axis.barh(y, width, left=left, height=0.7, color=colours[part], label=label)
            if width > NARROW * longest:
                middle = left + width / 2
                axis.text(middle, y, significant(width), ha="center", va="center", color="w")
            left += width
        axis.text(left, y, f" {significant(left)} ms", va="center", fontweight="bold")
    axis.set_yticks(range(len(providers)), providers)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * longest)
    axis.set_xlabel("ms")
    axis.set_title(f"Time of {breakdown['label']} by part", loc="left")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return save(figure, path)

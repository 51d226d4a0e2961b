"""Where the time of a model goes: stacked bars of its parts, one bar per provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.command.table import significant
from benchmarks.measure.breakdown import REST
from benchmarks.reporting.plots.style import in_order, pyplot, save

PART_COLOURS = (
    "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#64b5cd", "#ccb974",
    "#da8bc3",
)  # fmt: skip
REST_COLOUR = "#b5b5b5"
NARROW = 0.05
"""A share of the longest bar that is too narrow for its number."""


def draw(breakdown: Mapping[str, Any], path: Path) -> str:
    """breakdown: see `measure.breakdown`. Returns the file name."""
    providers = in_order(breakdown["providers"])
    parts = list(dict.fromkeys(p for name in providers for p in breakdown["providers"][name]))
    figure, axis = pyplot().subplots(
        figsize=(11, 1.9 + 0.75 * len(providers)), layout="constrained"
    )
    colours = dict(zip(parts, PART_COLOURS, strict=False)) | {REST: REST_COLOUR}
    longest = max(sum(breakdown["providers"][name].values()) for name in providers)
    for y, name in enumerate(providers):
        left = 0.0
        for part in parts:
            width = 1e3 * breakdown["providers"][name].get(part, 0.0)
            axis.barh(
                y, width, left=left, height=0.7, color=colours[part], label=part if y == 0 else None
            )
            if width > NARROW * 1e3 * longest:
                axis.text(
                    left + width / 2, y, significant(width), ha="center", va="center", color="w"
                )
            left += width
        axis.text(left, y, f" {significant(left)} ms", va="center", fontweight="bold")
    axis.set_yticks(range(len(providers)), providers)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1e3 * longest)
    axis.set_xlabel("ms")
    axis.set_title(f"Time of {breakdown['label']} by part", loc="left")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return save(figure, path)

"""All pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.record import Record
from benchmarks.reporting.plots import bars, curves

QUANTITIES = (
    ("latency", "p50_us", "ms", "Time per call"),
    ("memory", "peak_mib", "MiB", "Peak memory allocated by a call"),
)


def draw(
    records: Sequence[Record],
    folder: Path,
    limits: Mapping[str, Any] | None = None,
    breakdown: Mapping[str, Any] | None = None,
) -> list[str]:
    """Bars of what was measured, lines where three or more sizes were, the roofline if the limits
    of the device (of `env.json`) are given, and the parts of the model if they were measured.
    Returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [r for r in records if r.p50_us is not None]
    sweeps = curves.sweeps(rows)
    names = [] if breakdown is None else [bars.draw_breakdown(breakdown, folder / "breakdown.png")]
    for stem, field, unit, title in QUANTITIES:
        for page, chosen in bars.pages(stem, rows, field).items():
            names.append(bars.draw(chosen, field, unit, title, folder / f"{page}.png"))
        for variable in dict.fromkeys(sweep.variable for sweep in sweeps):
            chosen = [s for s in sweeps if s.variable == variable]
            path = folder / f"{stem}-over-{variable}.png"
            names.append(curves.draw_lines(chosen, field, unit, title, path))
    if limits is not None and any(r.gbps for r in rows):
        names.append(curves.draw_roofline(rows, limits, folder / "roofline.png"))
    return names

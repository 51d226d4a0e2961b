"""Pictures of a run. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command.table import milliseconds, significant
from benchmarks.measure.record import Record
from benchmarks.providers.provider import PROVIDERS

GROUPS = 12
"""As many of an operation have bars; all are in the tables."""
GAP = 0.6


def draw(groups: Sequence[Sequence[Record]], folder: Path) -> list[str]:
    """Bars of time and of memory, of what is compared with one another. Returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, field, title in (
        ("latency.png", "p50_us", "Time per call (ms)"),
        ("memory.png", "peak_mib", "Peak memory allocated by a call (MiB)"),
    ):
        by_op: dict[str, list[list[Record]]] = {}
        for group in groups:
            rows = [r for r in group if r.p50_us is not None and getattr(r, field) is not None]
            if rows:
                by_op.setdefault(rows[0].op, []).append(rows)
        if by_op:
            names.append(draw_bars(by_op, field, title, folder / name))
    return names


def draw_bars(by_op: dict[str, list[list[Record]]], field: str, title: str, path: Path) -> str:
    """A panel per operation, bars relative to the eager baseline, each with its absolute value."""
    shown = {op: groups[:GROUPS] for op, groups in by_op.items()}
    lengths = [sum(len(group) + GAP for group in groups) for groups in shown.values()]
    rows = [max(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    inches = [0.75 + 0.23 * row for row in rows]
    height = sum(inches) / len(inches)
    figure, axes = panels(len(shown), 5.8, height, columns=2, height_ratios=inches)
    for i, (axis, (op, groups)) in enumerate(zip(axes, shown.items(), strict=True)):
        y, ticks = 0.0, {}
        for group in groups:
            r = group[0]
            ticks[y + (len(group) - 1) / 2] = f"{r.shape.label}\n{r.dtype} {r.mode}"
            _bars(axis, y, group, field)
            y += len(group) + GAP
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(rows[i // 2] - GAP, -0.6)
        axis.margins(x=0.2)
        axis.axvline(1.0, color="#8c8c8c", lw=0.8, ls=":")
        axis.set_title(op, loc="left")
        axis.set_xlabel("x eager baseline")
    used = {r.provider for groups in shown.values() for group in groups for r in group}
    names = [name for name in PROVIDERS if name in used]
    handles = [pyplot().Rectangle((0, 0), 1, 1, color=PROVIDERS[name].colour) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    whiskers = "whiskers: p20 to p80; " if field == "p50_us" else ""
    cut = f"; the first {GROUPS} cases of each" if shown != by_op else ""
    figure.suptitle(f"{title}, relative to the eager baseline\n{whiskers}shorter is better{cut}")
    return save(figure, path)


def _bars(axis: Any, y: float, group: Sequence[Record], field: str) -> None:
    base = next((r for r in group if r.provider == "baseline"), group[0])
    scale = getattr(base, field) or 1.0
    for place, r in enumerate(group):
        value = end = getattr(r, field)
        text = significant(value)
        axis.barh(y + place, value / scale, height=0.85, color=PROVIDERS[r.provider].colour)
        if field == "p50_us":
            end, text = r.p80_us, milliseconds(value)
            axis.hlines(y + place, r.p20_us / scale, end / scale, color="#333333", lw=0.8)
        axis.text(end / scale, y + place, f"  {text}", va="center", fontsize=9)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titlesize": 11, "axes.titleweight": "bold"})
    return plt


def panels(
    count: int, width: float, height: float, columns: int = 3, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure with so many axes of that size in inches, row by row; options: of `subplots`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.9), squeeze=False,
        layout="constrained", **options,
    )  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def save(figure: Any, path: Path) -> str:
    """Write and forget the figure; returns the file name. A palette makes files of lines and bars
    a third as large."""
    from PIL import Image  # matplotlib needs it, too

    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    return path.name

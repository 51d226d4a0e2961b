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


def draw_times(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """Medians with whiskers from p20 to p80; see `_draw`."""
    _draw(groups, "p50_us", "Time per call (ms)", "whiskers: p20 to p80; ", path)


def draw_memory(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """Peaks of what a call allocates; see `_draw`."""
    _draw(groups, "peak_mib", "Peak memory allocated by a call (MiB)", "", path)


def _draw(
    groups: Sequence[Sequence[Record]], field: str, title: str, note: str, path: Path
) -> None:
    """A panel per operation; of each group, whose records are compared, a bar per provider relative
    to the eager baseline, with its value."""
    by_op: dict[str, list[list[Record]]] = {}
    for group in groups:
        rows = [r for r in group if getattr(r, field)]
        if rows:
            by_op.setdefault(rows[0].op, []).append(rows)
    shown = {op: own[:GROUPS] for op, own in by_op.items()}
    lengths = [sum(len(group) + GAP for group in own) for own in shown.values()]
    rows = [max(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    inches = [0.75 + 0.23 * row for row in rows]
    height = sum(inches) / len(inches)
    figure, axes = panels(len(shown), 5.8, height, columns=2, height_ratios=inches)
    for i, (axis, (op, own)) in enumerate(zip(axes, shown.items(), strict=True)):
        y, ticks = 0.0, {}
        for group in own:
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
    used = {r.provider for own in shown.values() for group in own for r in group}
    names = [name for name in PROVIDERS if name in used]
    handles = [pyplot().Rectangle((0, 0), 1, 1, color=PROVIDERS[name].colour) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    cut = f"; the first {GROUPS} cases of each" if shown != by_op else ""
    figure.suptitle(f"{title}, relative to the eager baseline\n{note}shorter is better{cut}")
    save(figure, path)


def _bars(axis: Any, y: float, group: Sequence[Record], field: str) -> None:
    scale = getattr(next((r for r in group if r.provider == "baseline"), group[0]), field)
    for i, r in enumerate(group):
        end = getattr(r, field) / scale
        axis.barh(y + i, end, height=0.85, color=PROVIDERS[r.provider].colour)
        shown = significant(getattr(r, field))
        if field == "p50_us":
            shown, end = milliseconds(r.p50_us), r.p80_us / scale
            axis.hlines(y + i, r.p20_us / scale, end, color="#333333", lw=0.8)
        axis.text(end, y + i, f"  {shown}", va="center", fontsize=9)


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

"""What all pictures share. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.providers.provider import PROVIDERS

DPI = 130
PALETTE = 128


def colour(provider: str) -> str:
    """The same in every picture."""
    return PROVIDERS[provider].colour


def in_order(providers: Iterable[str]) -> list[str]:
    """As they are declared."""
    used = set(providers)
    return [name for name in PROVIDERS if name in used]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
    }
    plt.rcParams.update(style)
    return plt


def legend(figure: Any, providers: Iterable[str]) -> None:
    """Below the figure, at most six in a row."""
    names = in_order(providers)
    rectangle = pyplot().Rectangle
    handles = [rectangle((0, 0), 1, 1, color=colour(name)) for name in names]
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False
    )


def panels(count: int, width: float, height: float, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with so many axes of that size in inches, row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.9), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def save(figure: Any, path: Any) -> str:
    """Write and forget the figure; returns the file name. A palette makes files of lines and bars
    a third as large."""
    from PIL import Image  # matplotlib needs it, too

    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    Image.open(path).convert("RGB").quantize(PALETTE).save(path, optimize=True)
    return path.name

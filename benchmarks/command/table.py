"""The one kind of table that commands print, and how numbers are written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table


class FittedTable(Table):
    """A table that a narrow terminal shows with fewer columns, not with cut ones.

    words: columns that hold words, which may wrap; the others hold numbers. spare: columns that are
    left out, first first, as long as the terminal is too narrow; a line below says which. more: of
    `Table`.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        words: Collection[str],
        spare: Sequence[str] = (),
        **more: Any,
    ) -> None:
        looks = {"title_justify": "left", "caption_justify": "left", "header_style": "bold"}
        super().__init__(box=SIMPLE_HEAD, padding=(0, 1), **looks, **more)
        for name in columns:
            if name in words:
                self.add_column(name, overflow="fold")
            else:
                self.add_column(name, justify="right", no_wrap=True)
        self.spare = [name for name in spare if name in columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole, left_out = self.columns, []
        unlimited = options.update(max_width=10_000)
        for name in self.spare:
            if Measurement.get(console, unlimited, self).maximum <= options.max_width:
                break
            self.columns = [column for column in self.columns if column.header != name]
            left_out.append(name)
        yield from super().__rich_console__(console, options)
        self.columns = whole
        if left_out:
            yield f"[dim]not shown at this width: {', '.join(left_out)}[/]"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with about three significant digits and no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 1:
        return f"{value:.{max(digits - len(str(int(abs(value)))), 0)}f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def milliseconds(us: float | None) -> str:
    return "" if us is None else significant(us / 1e3)


def times(value: float | None) -> str:
    """A ratio, e.g. "1.68x"."""
    return "" if value is None else f"{significant(value)}x"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A Markdown table; so many of the first columns hold words, the others numbers."""
    rule = "|" + "---|" * words + "--:|" * (len(columns) - words)
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, rule, *lines])

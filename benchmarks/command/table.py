"""The one kind of table that commands print: narrow terminals get fewer columns, not cut ones; and
how numbers are written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table


class FittedTable:
    """A table of words and numbers, to be printed by a `rich` console.

    words: the columns that hold words; those wrap where nothing else helps. The others hold numbers
    and are never cut. spare: columns that are left out, first first, as long as the terminal is too
    narrow for all; a line below says which. notes: what columns mean, below those that are shown.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        words: Collection[str],
        spare: Sequence[str] = (),
        title: str = "",
        caption: str = "",
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.columns = columns
        self.words = words
        self.spare = [name for name in spare if name in columns]
        self.title = title
        self.caption = caption
        self.notes = notes
        self.rows: list[tuple[Sequence[str], str, bool]] = []

    def add_row(self, *cells: str, style: str = "") -> None:
        """Cells in the order of the columns; those that are missing at the end are empty."""
        self.rows.append((cells, style, False))

    def end_section(self) -> None:
        """A line behind the last row."""
        if self.rows:
            self.rows[-1] = (*self.rows[-1][:2], True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=10_000)
        for count in range(len(self.spare) + 1):
            left_out = self.spare[:count]
            table = self._table(left_out)
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                break
        yield table
        if left_out:
            yield f"[dim]not shown at this width: {', '.join(left_out)}[/]"

    def _table(self, left_out: Collection[str]) -> Table:
        notes = (f"{name}: {text}" for name, text in self.notes.items() if name not in left_out)
        caption = "\n".join(filter(None, (self.caption, *notes)))
        table = Table(
            title=self.title or None, title_justify="left", caption=caption or None,
            caption_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1),
        )  # fmt: skip
        kept = [i for i, name in enumerate(self.columns) if name not in left_out]
        for i in kept:
            if (name := self.columns[i]) in self.words:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for cells, style, end_section in self.rows:
            shown = (cells[i] for i in kept if i < len(cells))
            table.add_row(*shown, style=style, end_section=end_section)
        return table


def significant(value: float | None, digits: int = 3) -> str:
    """A number with about three significant digits and no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if magnitude:
        return f"{value:.{max(digits - magnitude, 0)}f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def milliseconds(us: float | None) -> str:
    return "" if us is None else significant(us / 1e3)


def percent(value: float | None) -> str:
    return "" if value is None else f"{significant(value)} %"


def times(value: float | None) -> str:
    """A ratio, e.g. "1.68x"."""
    return "" if value is None else f"{significant(value)}x"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A Markdown table; so many of the first columns hold words, the others numbers."""
    rule = "|" + "---|" * words + "--:|" * (len(columns) - words)
    return "\n".join([_line(columns), rule, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

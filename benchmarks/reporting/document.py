"""What a report is made of, and how it looks as Markdown; `html` is the other rendering.

Text may hold **strong** words and `code`, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """value: what the column is sorted by, None for the text itself. best: the winner of its group;
    warn: worth a second look."""

    text: str
    value: float | None = None
    best: bool = False
    warn: bool = False


@dataclass(frozen=True)
class Table:
    """The first `names` columns hold words, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int


@dataclass(frozen=True)
class Card:
    """One number that should be seen first. tone: "good", "bad" or ""."""

    number: str
    title: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Picture:
    """path: relative to the folder of the report."""

    path: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).stem


Block = Text | Bullets | Table | Cards | Picture


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """blocks come before the first section."""

    title: str
    blocks: list[Block]
    sections: list[Section]


def markdown(document: Document) -> str:
    """The document as one Markdown page."""
    lines = [f"# {document.title}", ""]
    for block in document.blocks:
        lines += [*_lines(block), ""]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_lines(block), ""]
    return "\n".join(lines)


def _lines(block: Block) -> list[str]:
    match block:
        case Text():
            return [block.text]
        case Bullets():
            return [f"- {line}" for line in block.lines]
        case Cards():
            return [f"- **{c.number}** {c.title}: {c.note}" for c in block.cards]
        case Picture():
            return [f"![{block.name}]({block.path})"]
        case Table():
            head = f"| {' | '.join(block.columns)} |"
            numbers = len(block.columns) - block.names
            rule = "|" + "---|" * block.names + "--:|" * numbers
            rows = [f"| {' | '.join(_bold(cell) for cell in row)} |" for row in block.rows]
            return [head, rule, *rows]


def _bold(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.best else cell.text

"""A report as one HTML page that needs nothing else: style, pictures and sorting are inside."""

from __future__ import annotations

import base64
import re
from html import escape
from io import BytesIO
from pathlib import Path

from benchmarks.reporting.document import (
    Block,
    Bullets,
    Cards,
    Cell,
    Document,
    Picture,
    Section,
    Table,
    Text,
)

LARGE = 300_000
"""Bytes of a picture from which it is embedded as JPEG: it has photographs in it."""

WIDE = 8
"""A table of fewer columns does not take the whole width."""

STYLE = """
:root { --ink: #1d2433; --dim: #667085; --line: #e3e7ee; --good: #1a7f4b; --bad: #b42318;
  --soft: #f6f8fb; --accent: #2a5bd7; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1480px; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { max-width: 75ch; margin: .5rem 0; }
li { max-width: 100ch; }
nav { display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin: 0 0 1rem; font-size: 13px; }
nav a { color: var(--accent); text-decoration: none; padding: .1rem .55rem; border-radius: 1rem;
  background: var(--soft); border: 1px solid var(--line); }
nav a:hover { border-color: var(--accent); }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px; font-size: .92em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem;
  margin: .5rem 0 1.2rem; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--dim); border-radius: 6px;
  padding: .7rem .9rem; }
.card.good { border-left-color: var(--good); } .card.bad { border-left-color: var(--bad); }
.card b { display: block; font-size: 1.9rem; line-height: 1.15; }
.card.good b { color: var(--good); } .card.bad b { color: var(--bad); }
.card span { display: block; font-weight: 600; }
.card small { color: var(--dim); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; max-height: 80vh; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.wide.narrow { width: fit-content; min-width: min(100%, 34rem); max-width: 100%; }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; background: #fff; }
th { position: sticky; top: 0; white-space: normal; vertical-align: bottom; cursor: pointer;
  background: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line);
  user-select: none; z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; }
th:first-child { z-index: 2; }
th:hover { color: var(--accent); }
th[data-order="up"]::after { content: " \\25b2"; }
th[data-order="down"]::after { content: " \\25bc"; }
td { border-bottom: 1px solid #f0f2f6; }
tr.lead td { border-top: 1px solid #b8c1d1; }
tbody tr:hover td { background: #f4f7ff; }
.name { text-align: left; }
td.best { font-weight: 700; color: var(--good); } td.warn { color: var(--bad); }
figure { margin: 1rem 0; } figcaption { color: var(--dim); font-size: 13px; }
img { max-width: 100%; height: auto; display: block; }
@media print { nav { display: none; } .wide { max-height: none; overflow: visible; } }
"""

SORT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.dataset.order !== "up";
    heads.forEach(other => delete other.dataset.order);
    head.dataset.order = up ? "up" : "down";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
      return (up ? 1 : -1) * (x - y || (isNaN(x - y) ? x.localeCompare(y) : 0));
    });
    rows.forEach(row => row.classList.remove("lead"));
    table.tBodies[0].append(...rows);
  }));
}
"""


def page(document: Document, folder: Path) -> str:
    """The document; folder: where the paths of its pictures start."""
    links = [f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in document.sections]
    parts = [
        f"<h1>{escape(document.title)}</h1>",
        f"<nav>{' '.join(links)}</nav>",
        *(_block(block, folder) for block in document.blocks),
    ]
    for section in document.sections:
        parts.append(f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>')
        parts += [_block(block, folder) for block in section.blocks]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower())


def _block(block: Block, folder: Path) -> str:
    match block:
        case Text():
            return f"<p>{_inline(block.text)}</p>"
        case Bullets():
            items = "\n".join(f"<li>{_inline(line)}</li>" for line in block.lines)
            return f"<ul>\n{items}\n</ul>"
        case Cards():
            return _cards(block)
        case Picture():
            source = data_uri(folder / block.path)
            name = escape(block.name)
            image = f'<img src="{source}" alt="{name}">'
            return f"<figure>{image}<figcaption>{name}</figcaption></figure>"
        case Table():
            return _table(block)


def _inline(text: str) -> str:
    """Escaped, with **strong**, *emphasis* and `code`."""
    text = escape(text, quote=False)
    for pattern, tag in ((r"\*\*(.+?)\*\*", "strong"), (r"\*(.+?)\*", "em"), ("`(.+?)`", "code")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


def _cards(block: Cards) -> str:
    cards = "\n".join(
        f'<div class="card {card.tone}"><b>{escape(card.number)}</b>'
        f"<span>{escape(card.title)}</span><small>{escape(card.note)}</small></div>"
        for card in block.cards
    )
    return f'<div class="cards">\n{cards}\n</div>'


def _table(table: Table) -> str:
    heads = "".join(
        f"<th{_name(i, table)}>{escape(column)}</th>" for i, column in enumerate(table.columns)
    )
    rows, before = [], None
    for row in table.rows:
        # A line above every new group, which is what all names but the last are.
        group = [cell.text for cell in row[: table.names - 1]]
        lead = ' class="lead"' if before is not None and group != before else ""
        cells = "".join(_cell(cell, _name(i, table)) for i, cell in enumerate(row))
        rows.append(f"<tr{lead}>{cells}</tr>")
        before = group
    body = "\n".join(rows)
    narrow = " narrow" if len(table.columns) < WIDE else ""
    return (
        f'<div class="wide{narrow}"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _name(column: int, table: Table) -> str:
    return ' class="name"' if column < table.names else ""


def _cell(cell: Cell, name: str) -> str:
    mark = "best" if cell.best else "warn" if cell.warn else ""
    attributes = f' class="{mark}"' if mark else name
    if cell.value is not None:
        attributes += f' data-value="{cell.value:.6g}"'
    return f"<td{attributes}>{_inline(cell.text)}</td>"


def data_uri(path: Path) -> str:
    """A PNG as an address that holds it; large ones, which are photographs, as JPEG."""
    content, kind = path.read_bytes(), "png"
    if len(content) > LARGE:
        from PIL import Image  # matplotlib needs it, too

        smaller = BytesIO()
        Image.open(path).convert("RGB").save(smaller, "JPEG", quality=85, optimize=True)
        content, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

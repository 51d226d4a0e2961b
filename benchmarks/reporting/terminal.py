"""Records as one table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.command.table import FittedTable, milliseconds, percent, significant, times
from benchmarks.measure.record import Record
from benchmarks.reporting.analysis import contention, fastest, grouped, ratios, skipped, spread

if TYPE_CHECKING:
    from rich.console import Console

NUMBERS = (
    "ms", "CPU ms", "spread", "vs eager", "vs best other", "floor", "peak MiB", "saved MiB",
    "budget",
)  # fmt: skip
SPARE = ("budget", "saved MiB", "CPU ms", "floor", "spread", "peak MiB", "vs best other")
NOTES = {
    "floor": "the least time that the declared bytes, FLOPs and exponentials need here, over the "
    "median",
    "budget": "the largest share of its tolerance that an error used",
}


def show(records: Sequence[Record], console: Console) -> None:
    """The fastest of each group in bold, noise in yellow."""
    configurations = dict.fromkeys((replace(r.shape, stage=0).label, r.dtype) for r in records)
    common = " ".join(next(iter(configurations))) if len(configurations) == 1 else ""
    words = ("op", "stage" if common else "case", "mode", "provider")
    table = FittedTable(
        (*words, *NUMBERS),
        words=words,
        spare=SPARE,
        title=f"median per call, {common}".rstrip(", "),
        notes=NOTES,
    )
    for group in grouped(records):
        shown = [r for r in group if r.status != "unsupported"]
        winner = fastest(group)
        for i, record in enumerate(shown):
            case = f"{record.shape.label} {record.dtype}"
            if common:
                case = str(record.shape.stage or "all")
            first = record.op, case, record.mode
            lead = first if i == 0 else ("", "", "")
            table.add_row(
                *lead,
                *_cells(record, group),
                style="bold" if record is winner else "",
            )
        table.end_section()
    console.print(table)
    for line in (*skipped(records), *contention(records)):
        console.print(line)


def _cells(record: Record, group: Sequence[Record]) -> list[str]:
    if record.p50_us is None:
        return [record.provider, f"[red]{record.status if record.final else 'not timed'}[/]"]
    baseline, other = ratios(record, group)
    band = spread(record)
    return [
        record.provider,
        milliseconds(record.p50_us),
        milliseconds(record.cpu_us),
        f"[yellow]{band}[/]" if record.noisy else band,
        times(baseline),
        times(other),
        percent(record.roofline_pct),
        significant(record.peak_mib),
        significant(record.saved_mib),
        f"{100 * record.budget:.0f} %" if record.budget is not None else "",
    ]

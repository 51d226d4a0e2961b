"""Records as one table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.command.table import FittedTable, milliseconds, percent, significant, times
from benchmarks.measure.record import Record
from benchmarks.reporting.analysis import contention, fastest, grouped, ratios, skipped

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
    title = f"median per call, {common}".rstrip(", ")
    table = FittedTable((*words, *NUMBERS), words=words, spare=SPARE, title=title, notes=NOTES)
    for group in grouped(records):
        winner, r = fastest(group), group[0]
        case = str(r.shape.stage or "all") if common else f"{r.shape.label} {r.dtype}"
        lead = r.op, case, r.mode
        for record in group:
            if record.status != "unsupported":
                style = "bold" if record is winner else ""
                table.add_row(*lead, *_cells(record, group), style=style)
                lead = "", "", ""
        table.end_section()
    console.print(table)
    for line in (*skipped(records), *contention(records)):
        console.print(line)


def _cells(record: Record, group: Sequence[Record]) -> list[str]:
    if record.p50_us is None:
        return [record.provider, f"[red]{record.status if record.final else 'not timed'}[/]"]
    baseline, other = ratios(record, group)
    band = f"{100 * (record.p80_us - record.p20_us) / record.p50_us:.0f} %"
    return [
        record.provider, milliseconds(record.p50_us), milliseconds(record.cpu_us),
        f"[yellow]{band}[/]" if record.noisy else band, times(baseline), times(other),
        percent(record.roofline_pct), significant(record.peak_mib), significant(record.saved_mib),
        f"{100 * record.budget:.0f} %" if record.budget is not None else "",
    ]  # fmt: skip

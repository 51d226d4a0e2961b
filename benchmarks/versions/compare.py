"""Two runs side by side: what became slower, what became faster, and what is only noise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from benchmarks.command.options import to_path
from benchmarks.command.table import FittedTable, milliseconds
from benchmarks.measure import record
from benchmarks.measure.record import Record
from benchmarks.reporting.report import contention, label

COLOURS = {"slower": "red", "lost": "red", "faster": "green", "same": ""}
COLUMNS = ("verdict", "case", "provider", "base ms", "new ms", "change")
OF_A_RUN = {"utc", "load", "limits", "env_id", "package", "git_sha", "git_dirty"}
"""What always differs between two records of the environment."""


class Change(NamedTuple):
    """One measurement in both runs. ratio: median of new over that of base. verdict: a key of
    `COLOURS`; "lost" if new tried it without success (incorrect, out of memory, ..)."""

    base: Record
    new: Record
    ratio: float
    verdict: str


def compare(
    base: Sequence[Record], new: Sequence[Record], *, threshold: float, atol_us: float
) -> list[Change]:
    """Joins on operation, case, mode, provider and dtype; worst first. What only one run tried, and
    what base has no numbers of, is left out.

    A change counts if the medians differ by more than `threshold` (a fraction of base) and by more
    than `atol_us` microseconds, and the p20 to p80 bands do not overlap.
    """
    known = {row.key: row for row in base if row.p50_us is not None}
    changes = []
    for b, n in [(known[row.key], row) for row in new if row.key in known]:
        ratio, verdict = math.inf, "lost"
        if n.p50_us is not None:
            ratio, verdict = n.p50_us / b.p50_us, "same"
            large = abs(n.p50_us - b.p50_us) > max(threshold * b.p50_us, atol_us)
            if large and (n.p20_us > b.p80_us or n.p80_us < b.p20_us):
                verdict = "slower" if ratio > 1 else "faster"
        changes.append(Change(b, n, ratio, verdict))
    return sorted(changes, key=lambda change: -change.ratio)


def judge(
    base: Sequence[Record], new: Sequence[Record], args: argparse.Namespace, console: Console
) -> int:
    """Prints all changes and what casts doubt on them; exit status 1 under --fail if anything is
    slower or lost."""
    changes = compare(base, new, threshold=args.threshold, atol_us=args.atol_us)
    table = FittedTable(COLUMNS, words=COLUMNS[:3], spare=COLUMNS[3:5], title="p50 (p20 to p80)")
    for c in changes:
        lost = c.verdict == "lost"
        after, change = ("", "") if lost else (_band(c.new), f"{100 * (c.ratio - 1):+.1f} %")
        cells = c.verdict, label(c.new), c.new.provider, _band(c.base), after, change
        table.add_row(*cells, style=COLOURS[c.verdict])
    console.print(table)
    for name, rows, others in (("base", base, new), ("new", new, base)):
        timed = {r.key for r in others if r.p50_us is not None}
        for r in (r for r in rows if r.p50_us is None and r.key in timed):
            reason = escape(f"{r.status}, {r.reason}")
            console.print(f"{name} has no {label(r)} {r.provider}: {reason}")
        for line in contention(rows):
            console.print(f"{name}: {line}")
    same = [c for c in changes if c.verdict == "same"]
    wide = sum(r.p80_us - r.p20_us > args.threshold * r.p50_us for c in same for r in c[:2])
    if wide:
        console.print(
            f"{wide} bands p20 to p80 of what is the same are wider than "
            f"{100 * args.threshold:g} %: a change of that size could hide there"
        )
    counts = {name: sum(c.verdict == name for c in changes) for name in COLOURS}
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"{len(changes)} compared: {shown}")
    return 1 if args.fail and counts["slower"] + counts["lost"] else 0


def _band(row: Record) -> str:
    low, high = milliseconds(row.p20_us), milliseconds(row.p80_us)
    return f"{milliseconds(row.p50_us)} ({low} to {high})"


def verdict_arguments(parser: argparse.ArgumentParser) -> None:
    """What `judge` needs to know."""
    least = "least relative change that counts; default: 0.05"
    parser.add_argument("--threshold", type=float, default=0.05, help=least)
    least = "least absolute change that counts, in microseconds; default: 30"
    parser.add_argument("--atol-us", type=float, default=30.0, help=least)
    parser.add_argument("--fail", action="store_true", help="exit with 1 on what is slower or lost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks compare`."""
    what = "results.jsonl or its folder"
    parser.add_argument("base", type=to_path, help=what)
    parser.add_argument("new", type=to_path, help=what)
    verdict_arguments(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    """Raises ValueError on results of different devices, and on what is no time."""
    base, new = (record.read_environment(path) for path in (args.base, args.new))
    if base.get("device") != new.get("device"):
        raise ValueError(f"base was measured on {base.get('device')}, new on {new.get('device')}")
    rows = []
    for path in (args.base, args.new):
        rows.append(record.read(path))
        for r in (r for r in rows[-1] if r.p50_us is not None):
            if r.p20_us is None or r.p80_us is None or not r.p20_us <= r.p50_us <= r.p80_us:
                case = f"{path}: {label(r)} {r.provider}"
                raise ValueError(f"{case}: times must be p20_us <= p50_us <= p80_us")
    if not {row.key for row in rows[0]} & {row.key for row in rows[1]}:
        raise ValueError("no case, mode, provider and dtype was measured in both")
    for key in sorted((base.keys() | new.keys()) - OF_A_RUN):
        if base.get(key) != new.get(key):
            console.print(escape(f"not the same: {key}: {base.get(key)} -> {new.get(key)}"))
    return judge(*rows, args, console)

"""Two runs side by side: what became slower, what became faster, and what is only noise."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks.command.options import to_path, verdict_arguments
from benchmarks.command.table import FittedTable, markdown_table, milliseconds
from benchmarks.measure import record
from benchmarks.measure.record import Record
from benchmarks.reporting import analysis

MATTERS = (
    "torch", "triton", "cuda", "cudnn", "python", "cores", "threads", "tf32", "variables",
    "nvidia_smi", "seed",
)  # fmt: skip
"""Of the environment record: what changes numbers, though the device is the same."""

STYLES = {"slower": "red", "lost": "red", "faster": "green", "same": ""}


@dataclass(frozen=True)
class Change:
    """One measurement in both runs; verdict: "slower", "faster", "same", or "lost" if new tried it
    without success (incorrect, out of memory, ..) and has no numbers."""

    base: Record
    new: Record
    verdict: str

    @property
    def ratio(self) -> float | None:
        """Median of new over that of base."""
        if self.base.p50_us is None or self.new.p50_us is None:
            return None
        return self.new.p50_us / self.base.p50_us


def verdict(base: Record, new: Record, threshold: float, atol_us: float) -> str:
    """A change counts if the medians differ by more than `threshold` (a fraction of base) and by
    more than `atol_us` microseconds, and the p20 to p80 bands do not overlap."""
    difference = new.p50_us - base.p50_us
    large = abs(difference) > max(threshold * base.p50_us, atol_us)
    apart = new.p20_us > base.p80_us or new.p80_us < base.p20_us
    if not (large and apart):
        return "same"
    return "slower" if difference > 0 else "faster"


def compare(
    base: Sequence[Record], new: Sequence[Record], *, threshold: float, atol_us: float
) -> list[Change]:
    """Joins on operation, case, mode, provider and dtype; worst first. What only one run tried, and
    what base has no numbers of, is left out."""
    known = {r.key: r for r in base if r.p50_us is not None}
    changes = []
    for after in new:
        if before := known.get(after.key):
            lost = after.p50_us is None
            found = "lost" if lost else verdict(before, after, threshold, atol_us)
            changes.append(Change(before, after, found))
    return sorted(changes, key=lambda c: float("-inf") if c.ratio is None else -c.ratio)


COLUMNS = ("verdict", "op", "case", "mode", "provider", "base ms", "new ms", "change")


def table(changes: Sequence[Change], title: str) -> FittedTable:
    """Medians with their bands, in milliseconds."""
    shown = FittedTable(COLUMNS, words=COLUMNS[:5], spare=("base ms", "new ms"), title=title)
    for change in changes:
        shown.add_row(*map(escape, _cells(change)), style=STYLES[change.verdict])
    return shown


def _cells(change: Change) -> list[str]:
    new = change.new
    after = new.status if change.ratio is None else _band(new)
    difference = "" if change.ratio is None else f"{100 * (change.ratio - 1):+.1f} %"
    case = f"{new.shape.label} {new.dtype}"
    return [
        change.verdict, new.op, case, new.mode, new.provider, _band(change.base), after, difference,
    ]  # fmt: skip


def _band(row: Record) -> str:
    low, high = milliseconds(row.p20_us), milliseconds(row.p80_us)
    return f"{milliseconds(row.p50_us)} ({low} to {high})"


def markdown(changes: Sequence[Change], title: str) -> str:
    """The table for a file."""
    shown = markdown_table(COLUMNS, map(_cells, changes), words=5)
    ends = [*(f"- {line}" for line in lost(changes)), summary(changes)]
    return "\n".join([f"# {title}", "", shown, "", *ends, ""])


def summary(changes: Sequence[Change]) -> str:
    """How many of each verdict."""
    verdicts = [change.verdict for change in changes]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("slower", "lost", "faster", "same"))
    return f"{len(changes)} compared: {counts}"


def lost(changes: Sequence[Change]) -> list[str]:
    """Why the new run has no numbers where base has."""
    return [
        f"lost: {row.op} {row.shape.label} {row.dtype} {row.mode} {row.provider}: {row.status}, "
        f"{row.reason}"
        for row in (change.new for change in changes if change.verdict == "lost")
    ]


def notes(
    base: Sequence[Record], new: Sequence[Record], changes: Sequence[Change], threshold: float
) -> list[str]:
    """What was lost; a warning for each run during which others had the CPU, and if bands are so
    wide that a change of the size of `threshold` fits into them."""
    lines = lost(changes)
    for name, rows in (("base", base), ("new", new)):
        lines += [f"{name}: {line}" for line in analysis.contention(rows)]
    same = [(change.base, change.new) for change in changes if change.verdict == "same"]
    wide = sum(any(r.p80_us - r.p20_us > threshold * r.p50_us for r in pair) for pair in same)
    if wide:
        lines.append(
            f"{wide} of {len(same)} that are the same have a band p20 to p80 wider than "
            f"{100 * threshold:g} %: a change of that size could hide there"
        )
    return lines


def failed(changes: Sequence[Change]) -> bool:
    """Whether `--fail` makes this an error."""
    return any(change.verdict in ("slower", "lost") for change in changes)


def differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changes numbers and is not the same in the two environments."""
    changed = [key for key in MATTERS if base.get(key) != new.get(key)]
    return [f"{key}: {base.get(key)} -> {new.get(key)}" for key in changed]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks compare`."""
    what = "results.jsonl or its folder"
    parser.add_argument("base", type=to_path, help=what)
    parser.add_argument("new", type=to_path, help=what)
    verdict_arguments(parser)
    parser.add_argument("--all", action="store_true", help="show also what stayed the same")
    parser.add_argument("--force", action="store_true", help="even on different devices")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 under --fail if anything is slower or lost. Raises ValueError on results of
    different devices, on results that have nothing in common, and on what is no time."""
    envs = [record.read_environment(path) for path in (args.base, args.new)]
    devices = [env.get("device", "an unknown device") for env in envs]
    if devices[0] != devices[1] and not args.force:
        raise ValueError(
            f"base was measured on {devices[0]}, new on {devices[1]}; --force compares anyway"
        )
    rows = [_timed(path) for path in (args.base, args.new)]
    changes = compare(*rows, threshold=args.threshold, atol_us=args.atol_us)
    if not changes:
        raise ValueError("no case, mode, provider and dtype was measured in both")
    for line in differences(*envs):
        console.print(f"[yellow]not the same:[/] {line}")
    shown = changes if args.all else [c for c in changes if c.verdict != "same"]
    if shown:
        console.print(table(shown, "median per call (p20 to p80)"))
    for line in notes(*rows, changes, args.threshold):
        console.print(line, markup=False)
    console.print(summary(changes))
    return 1 if args.fail and failed(changes) else 0


def _timed(path: Path) -> list[Record]:
    rows = record.read(path)
    for row in rows:
        quantiles = (row.p20_us, row.p50_us, row.p80_us)
        there = None not in quantiles and sorted(quantiles) == list(quantiles)
        if row.p50_us is not None and not there:
            raise ValueError(
                f"{path}: {' '.join(row.key)}: p20_us, p50_us and p80_us must be there, in this "
                f"order; got {', '.join(map(str, quantiles))}"
            )
    return rows

"""What records say: who is compared with whom, how much faster ours is, and where it is not; as a
table on the terminal, and as `report.md` with its plots beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from benchmarks.cases.common import data
from benchmarks.command import outputs
from benchmarks.command.options import to_path
from benchmarks.command.table import FittedTable, markdown_table, milliseconds, significant, times
from benchmarks.measure import breakdown, record
from benchmarks.measure.record import Key, Record
from benchmarks.measure.timing import FEWEST, WIDEST
from benchmarks.providers.provider import OURS, PROVIDERS
from benchmarks.reporting import plots

COLUMNS = (
    "case", "provider", "median ms", "vs eager", "vs best other", "p20 to p80", "% roofline",
    "peak MiB", "saved MiB", "floor ms", "CPU ms", "budget", "n",
)  # fmt: skip
"""As they matter: a narrow terminal shows the first ones."""
OVERVIEW = """\
| | case | fwd: other | here | ratio | step: other | here | ratio | MiB: other | here |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def label(r: Record) -> str:
    """What was measured, whoever the provider."""
    return f"{r.op} {r.mode} {r.shape.label} {r.dtype}"


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """Records that are compared with one another, in the order in which they came."""
    groups: dict[Key, list[Record]] = {}
    for r in records:
        groups.setdefault(r.group, []).append(r)
    return list(groups.values())


def fastest(records: Iterable[Record]) -> Record | None:
    measured = (r for r in records if r.p50_us is not None)
    return min(measured, key=lambda r: r.p50_us, default=None)


def ratios(record: Record, group: Iterable[Record]) -> list[float | None]:
    """How many times faster than the eager baseline, and than the fastest other provider, which for
    one of ours is none of ours."""
    own = OURS if record.provider in OURS else (record.provider,)
    rivals = [r for r in group if r.provider not in own]
    pair = fastest(r for r in rivals if r.provider == "baseline"), fastest(rivals)
    return [other and other.p50_us / record.p50_us for other in pair]


class Contest(NamedTuple):
    """The best of ours in one group beside the strongest other provider."""

    ours: Record
    other: Record

    @property
    def ratio(self) -> float:
        return self.other.p50_us / self.ours.p50_us

    @property
    def settled(self) -> bool:
        """Whether it may be a headline."""
        return self.ours.settled and self.other.settled

    @property
    def clear(self) -> bool:
        """Whether their p20 to p80 bands do not overlap."""
        slow, fast = sorted((self.ours, self.other), key=lambda r: -r.p50_us)
        return fast.p80_us < slow.p20_us

    @property
    def label(self) -> str:
        return label(self.ours)


def contests(records: Iterable[Record]) -> list[Contest]:
    """One per group in which one of ours and somebody else were measured."""
    found = []
    for group in grouped(records):
        ours = fastest(r for r in group if r.provider in OURS)
        other = fastest(r for r in group if r.provider not in OURS)
        if ours and other:
            found.append(Contest(ours, other))
    return found


def losses(records: Iterable[Record]) -> list[str]:
    """Where the best of ours is slower than somebody else, worst first."""
    return [
        f"{c.label}: {c.ours.provider} takes {times(1 / c.ratio)} the time of {c.other.provider}"
        + ("" if c.clear else " (their p20 to p80 bands overlap)")
        for c in sorted(contests(records), key=lambda c: c.ratio)
        if c.ratio < 1
    ]


def contention(records: Iterable[Record]) -> list[str]:
    """A warning if other processes had the CPU while calls were timed."""
    medians = [r.contended for r in records if r.p50_us is not None]
    if not any(medians):
        return []
    return [
        f"Busy machine: during {sum(medians)} of {len(medians)} medians others had more than 10 % "
        "of the CPU time of our threads. Believe no ratio of wall times here; the CPU times are "
        "closer to it. On a shared machine --threads 1 disturbs least."
    ]


def skipped(records: Iterable[Record]) -> list[str]:
    """What has no numbers, once per provider and reason."""
    where: dict[str, dict[str, None]] = {}
    for r in records:
        if r.status != "ok":
            where.setdefault(f"{r.provider}: {r.status}, {r.reason}", {})[r.op] = None
    return [f"{what} ({', '.join(ops)})" for what, ops in where.items()]


def cells(r: Record, group: Iterable[Record]) -> list[str]:
    """What `COLUMNS` say of a record beside those it is compared with."""
    if r.p50_us is None:
        missing = r.status if r.final else "not timed"
        return [label(r), r.provider, missing, *[""] * (len(COLUMNS) - 3)]
    eager, other = ratios(r, group)
    noisy = " (noisy)" if r.noisy else ""
    floor_us = None if r.roofline_pct is None else r.roofline_pct * r.p50_us / 100
    return [
        label(r), r.provider, milliseconds(r.p50_us), times(eager), times(other),
        f"{milliseconds(r.p20_us)} to {milliseconds(r.p80_us)}{noisy}",
        significant(r.roofline_pct), significant(r.peak_mib), significant(r.saved_mib),
        milliseconds(floor_us), milliseconds(r.cpu_us),
        "" if r.budget is None else f"{100 * r.budget:.0f} %", str(r.n),
    ]  # fmt: skip


def rows_of(records: Iterable[Record]) -> list[list[tuple[list[str], bool]]]:
    """Of each group the `cells` of every provider, and whether it is the fastest."""
    return [
        [(cells(r, group), r is fastest(group)) for r in group if r.status != "unsupported"]
        for group in grouped(records)
    ]


def show(records: Sequence[Record], console: Console) -> None:
    """A table on the terminal, the fastest of each group in bold."""
    table = FittedTable(COLUMNS, words=COLUMNS[:2], spare=COLUMNS[:3:-1], title="per call")
    for group in rows_of(records):
        for row, won in group:
            table.add_row(*row, style="bold" if won else "")
        table.add_section()
    console.print(table)
    for line in (*skipped(records), *contention(records)):
        console.print(escape(line))


def write(records: Sequence[Record], env: Mapping[str, Any], folder: Path) -> None:
    """`report.md` and plots of the results in a folder, which may hold `breakdown.json`, too."""
    more = []
    if any(r.p50_us is not None for r in records):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        plots.draw_times(grouped(records), folder / "plots" / "latency.png")
        more.append("![latency](plots/latency.png)")
    if any(r.peak_mib for r in records):
        plots.draw_memory(grouped(records), folder / "plots" / "memory.png")
        more.append("![memory](plots/memory.png)")
    if (path := folder / breakdown.FILE).is_file():
        parts = outputs.read_json(path)
        more += [f"## Time of {parts['label']} by part", _breakdown(parts["providers"])]
    outputs.write(folder / "report.md", markdown(records, env, more))


def markdown(records: Sequence[Record], env: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """The whole report; more: blocks to be inserted before the table of all measurements."""
    suites = ", ".join(dict.fromkeys(r.suite for r in records))
    used = {r.provider for r in records if r.status != "unsupported"}
    page = [
        f"# Benchmarks of equiseg_fast: suite {suites} on {env.get('device', 'an unknown device')}",
        *contention(records),
        *("## Headline", _headline(contests(records))),
        "## Where ours is not the fastest",
        _bullets(losses(records)) or "Nowhere in this run.",
        *more,
        *("## All measurements", _table(records), _bullets(skipped(records))),
        "What the columns say, and how it is measured, is in docs/benchmarks.md.",
        data.WHAT,
        _bullets(f"**{p.name}** {p.what}" for p in PROVIDERS.values() if p.name in used),
        *("## Environment", f"```json\n{json.dumps(env, indent=1)}\n```"),
    ]
    return "\n\n".join(filter(None, page)) + "\n"


def _breakdown(providers: Mapping[str, Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for parts in providers.values() for name in parts)
    rows = [
        [name, *(significant(1e3 * parts.get(name, 0.0)) for parts in providers.values())]
        for name in names
    ]
    return markdown_table(["ms", *providers], rows, words=1)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _headline(found: Sequence[Contest]) -> str:
    if not found:
        return "No case was measured both with ours and with somebody else's."
    clear = [c.ratio > 1 for c in found if c.settled and c.clear]
    return (
        f"Of {len(found)} comparisons with the strongest other provider ours is faster in "
        f"{sum(clear)} and slower in {len(clear) - sum(clear)}. In the others p20 to p80 bands "
        f"overlap (in brackets) or nothing is decided (†): fewer than {FEWEST} samples, a band "
        f"wider than {100 * WIDEST:.0f} % of the median, or a busy machine. At the first shapes, "
        f"medians in ms:\n\n{overview(found)}"
    )


def overview(found: Iterable[Contest]) -> str:
    """A table of the first shape that every operation was measured at with each number of
    modalities, and whole networks of each variant; medians in ms."""
    first: dict[Any, str] = {}
    rows: dict[tuple[str, str], dict[str, Contest]] = {}
    for contest in found:
        r, shape = contest.ours, contest.ours.shape
        op = "model" if r.op == "training" else r.op  # which is the step of the model: one row
        kind = op, shape.modalities, "" if shape.stage else shape.variant
        if shape.label == first.setdefault(kind, shape.label):
            rows.setdefault((op, f"{shape.label} {r.dtype}"), {})[r.mode] = contest
    lines = [f"| {' | '.join([*names, *_modes(modes)])} |" for names, modes in rows.items()]
    return "\n".join([OVERVIEW, *lines])


def _modes(modes: Mapping[str, Contest]) -> list[str]:
    shown = []
    for contest in (modes.get("fwd"), modes.get("step")):
        if contest is None:
            shown += ["", "", ""]
            continue
        provider = contest.other.provider
        named = "" if provider == "baseline" else f" {provider}"
        shown += [milliseconds(contest.other.p50_us) + named, milliseconds(contest.ours.p50_us)]
        ratio = times(contest.ratio) if contest.clear else f"({times(contest.ratio)})"
        shown.append(ratio if contest.settled else f"{ratio} †")
    last = modes.get("step") or next(iter(modes.values()))
    return [*shown, significant(last.other.peak_mib), significant(last.ours.peak_mib)]


def _table(records: Sequence[Record]) -> str:
    rows = [
        [*row[:2], f"**{row[2]}**" if won else row[2], *row[3:]]
        for group in rows_of(records)
        for row, won in group
    ]
    # Columns in which nobody has a number are left out.
    kept = [i for i in range(len(COLUMNS)) if i < 2 or any(row[i] for row in rows)]
    shown = ([row[i] for i in kept] for row in rows)
    return markdown_table([COLUMNS[i] for i in kept], shown, words=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks report`."""
    parser.add_argument("results", type=to_path, help="results.jsonl or its folder")
    parser.set_defaults(kept="the records are as they were")


def main(args: argparse.Namespace, console: Console) -> int:
    rows = record.read(args.results)
    folder = args.results if args.results.is_dir() else args.results.parent
    outputs.writable(folder)
    write(rows, record.read_environment(args.results), folder)
    show(rows, console)
    return 0

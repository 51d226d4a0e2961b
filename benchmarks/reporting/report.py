"""Records as `report.md`, with its plots beside it."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common import data
from benchmarks.command import outputs
from benchmarks.command.options import to_path
from benchmarks.command.table import markdown_table, milliseconds, significant, times
from benchmarks.measure import breakdown, record
from benchmarks.measure.record import Record
from benchmarks.measure.timing import FEWEST, WIDEST
from benchmarks.providers.provider import PROVIDERS
from benchmarks.reporting import plots, terminal
from benchmarks.reporting.analysis import (
    OURS,
    Contest,
    contention,
    contests,
    fastest,
    grouped,
    losses,
    ratios,
    skipped,
)

HOW = """\
A provider is timed only after it passes the parity check in the same run: operations against the \
reference in fp64 under the tolerance policy of `equiseg_fast.testing`, models against the \
reference in fp32. *budget* is the largest share of an allowance that an error used. *vs eager* \
and *vs best other* are the median of the eager baseline, and of the fastest other provider, over \
that of the row: above 1 the row is faster. For {ours} and the reference, which are ours, another \
provider is somebody else's. A band p20 to p80 wider than 10 % of the median is called noisy; \
*CPU* is the CPU time of all threads.

*GB/s*, *TFLOP/s* and *floor* use the declared minimal bytes, FLOPs and exponentials of the \
operation, the same for every provider: the floor is the least time they need with the bandwidth \
and peaks measured in the same run, each pass as the slowest of memory, matrix products, other \
arithmetic and exponentials, and of a network the sum over its parts. *% roofline* is that floor \
over the median; above 100 the peaks, which are those of one size, were measured too low.

*peak* is what a call allocates above the state before it, *saved* what its forward keeps for the \
backward, parameters and inputs not counted. Times by {method}. TF32 is off for all. A training \
step is loss and gradients of all parameters, without an optimiser.

{images}"""
METHODS = {
    "wall": "wall clock",
    "events": "CUDA events around single calls, L2 flushed",
    "graph": "CUDA events around replays of a CUDA graph over rotating inputs",
}
COLUMNS = (
    "case", "dtype", "mode", "provider", "median ms", "p20 to p80", "CPU ms", "n", "vs eager",
    "vs best other", "GB/s", "TFLOP/s", "floor ms", "% roofline", "peak MiB", "saved MiB", "budget",
)  # fmt: skip


def write(records: Sequence[Record], env: Mapping[str, Any], folder: Path) -> None:
    """`report.md` and plots of the results in a folder, which may hold `breakdown.json`, too."""
    parts = outputs.read_json(path) if (path := folder / breakdown.FILE).is_file() else None
    drawn = plots.draw(records, folder / "plots", env.get("limits"), parts)
    images = [f"plots/{name}" for name in drawn]
    (folder / "report.md").write_text(markdown(records, env, images))


def markdown(
    records: Sequence[Record],
    env: Mapping[str, Any],
    images: Sequence[str],
) -> str:
    """The whole report. images: file names next to it."""
    sections = {
        "Headline": _headline(contests(records)),
        "Where ours is not the fastest": [_bullets(losses(records)) or "Nowhere in this run."],
        "Environment": [_environment(env), _providers(records)],
    }
    for op in dict.fromkeys(r.op for r in records):
        sections[op] = _operation(op, [r for r in records if r.op == op])
    if images:
        sections["Pictures"] = [f"![{Path(name).stem}]({name})" for name in images]
    methods = "; ".join(dict.fromkeys(METHODS[r.method] for r in records if r.method))
    how = HOW.format(method=methods or "nothing", ours=", ".join(OURS), images=data.WHAT)
    sections["How to read this"] = [how]
    suites = ", ".join(dict.fromkeys(r.suite for r in records))
    device = env.get("device", "an unknown device")
    page = [f"# Benchmarks of equiseg_fast: suite {suites} on {device}", *contention(records)]
    for title, blocks in sections.items():
        page += [f"## {title}", *filter(None, blocks)]
    return "\n\n".join(page) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _headline(everything: Sequence[Contest]) -> list[str]:
    if not everything:
        return ["No case was measured both with ours and with somebody else's."]
    found = [contest for contest in everything if contest.settled]
    left_out = len(everything) - len(found)
    note = (
        f"{left_out} of {len(everything)} comparisons are left out here: fewer than {FEWEST} "
        f"samples, a band p20 to p80 wider than {100 * WIDEST:.0f} % of the median, or a busy "
        "machine. All are in the tables below."
    )
    if not found:
        return [note]
    best, worst = max(found, key=lambda c: c.ratio), min(found, key=lambda c: c.ratio)
    cards = [f"**{times(best.ratio)}** best against the strongest other: {_sentence(best)}"]
    if with_eager := [c for c in found if c.eager is not None]:
        eager = max(with_eager, key=lambda c: c.eager)
        cards.append(f"**{times(eager.eager)}** best against eager: {_alone(eager)}")
    cards += [
        f"**{times(worst.ratio)}** worst against the same: {_sentence(worst)}",
        f"**{sum(c.ratio > 1 for c in found)} of {len(found)}** cases that ours wins: by medians",
    ]
    return [_bullets(cards), note if left_out else "", _summary(found)]


def _alone(contest: Contest) -> str:
    return f"{contest.label}: {contest.ours.provider} {milliseconds(contest.ours.p50_us)} ms"


def _sentence(contest: Contest) -> str:
    other = f"{contest.other.provider} {milliseconds(contest.other.p50_us)} ms"
    return f"{_alone(contest)}, {other}" + ("" if contest.clear else "; the bands overlap")


def _summary(found: Sequence[Contest]) -> str:
    """One row per operation, mode and dtype: the best of ours over all its cases."""
    groups: dict[tuple[str, str, str], list[Contest]] = {}
    for contest in found:
        r = contest.ours
        groups.setdefault((r.op, r.mode, r.dtype), []).append(contest)
    columns = (
        "operation", "mode", "dtype", "strongest other", "cases", "won", "worst", "median", "best",
        "median vs eager",
    )  # fmt: skip
    rows = []
    for names, members in groups.items():
        values = sorted(c.ratio for c in members)
        eager = [c.eager for c in members if c.eager is not None]
        rows.append([
            *names, ", ".join(dict.fromkeys(c.other.provider for c in members)), str(len(members)),
            str(sum(v > 1 for v in values)), times(values[0]), times(statistics.median(values)),
            times(values[-1]), times(statistics.median(eager) if eager else None),
        ])  # fmt: skip
    return markdown_table(columns, rows, words=4)


def _environment(env: Mapping[str, Any]) -> str:
    dirty = ", with uncommitted changes" if env.get("git_dirty") else ""
    rows = {
        "equiseg_fast": f"{env.get('package')} (git {str(env.get('git_sha'))[:10]}{dirty})",
        "torch": env.get("torch"),
        "triton": env.get("triton") or "not installed",
        "python": env.get("python"),
        "device": env.get("device"),
        "CPU": f"{env.get('cpu')}, {env.get('threads')} threads",
        "CUDA, cuDNN": ", ".join(str(env[k]) for k in ("cuda", "cudnn") if k in env),
        "driver, clocks, power, MIG": env.get("nvidia_smi"),
        "time": env.get("utc"),
        "record": f"`{env.get('env_id')}`",
    }
    if limits := env.get("limits"):
        rows["measured copy"] = f"{limits['bandwidth'] / 1e9:.0f} GB/s"
        for name, rate in limits["peak"].items():
            rows[f"measured matrix product {name}"] = f"{rate / 1e12:.3g} TFLOP/s"
        if limits.get("exps"):
            rows["measured exponentials"] = f"{limits['exps'] / 1e9:.3g} G/s"
    shown = [[name, str(value)] for name, value in rows.items() if value]
    return markdown_table(("what", "value"), shown, words=2)


def _providers(records: Iterable[Record]) -> str:
    used = {r.provider for r in records if r.status != "unsupported"}
    return _bullets(f"**{p.name}** {p.what}" for p in PROVIDERS.values() if p.name in used)


def _operation(op: str, rows: Sequence[Record]) -> list[str]:
    declared = operations().get(op)
    minimum = ""
    if declared is not None and declared.scope == "operation":
        minimum = f"Minimum: {declared.formula}."
    elif declared is not None:
        minimum = (
            f"{declared.formula}. Minimum: that of its calls, as counted, one after the other."
        )
    return [minimum, _table(rows), _bullets(skipped(rows))]


def _table(records: Sequence[Record]) -> str:
    rows = []
    for group in grouped(records):
        winner = fastest(group)
        for r in group:
            if r.status != "unsupported":
                numbers = [r.status] if r.p50_us is None else _numbers(r, group, r is winner)
                rows.append([r.shape.label, r.dtype, r.mode, r.provider, *numbers])
    # Columns of numbers are left out where nobody has one.
    kept = [i for i in range(len(COLUMNS)) if i < 4 or any(row[i : i + 1] > [""] for row in rows)]
    cells = [["".join(row[i : i + 1]) for i in kept] for row in rows]
    return markdown_table([COLUMNS[i] for i in kept], cells, words=4)


def _numbers(r: Record, group: Sequence[Record], winner: bool) -> list[str]:
    baseline, other = ratios(r, group)
    median = milliseconds(r.p50_us)
    band = f"{milliseconds(r.p20_us)} to {milliseconds(r.p80_us)}"
    floor_us = None if r.roofline_pct is None else r.roofline_pct * r.p50_us / 100
    show: Callable[[float | None], str] = significant
    return [
        f"**{median}**" if winner else median, band + (" (noisy)" if r.noisy else ""),
        milliseconds(r.cpu_us), str(r.n), times(baseline), times(other), show(r.gbps),
        show(r.tflops), milliseconds(floor_us), show(r.roofline_pct), show(r.peak_mib),
        show(r.saved_mib), "" if r.budget is None else f"{100 * r.budget:.0f} %",
    ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks report`."""
    parser.add_argument("results", type=to_path, help="results.jsonl or its folder")
    parser.set_defaults(kept="the records are as they were")


def main(args: argparse.Namespace, console: Console) -> int:
    rows = record.read(args.results)
    folder = args.results if args.results.is_dir() else args.results.parent
    outputs.writable(folder)
    write(rows, record.read_environment(args.results), folder)
    terminal.show(rows, console)
    return 0

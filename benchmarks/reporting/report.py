"""Records as a report: one document, written as `report.md` and as `report.html`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import operations
from benchmarks.cases.common import data
from benchmarks.command.table import milliseconds, significant, times
from benchmarks.measure import host
from benchmarks.measure.record import Record, write_table
from benchmarks.measure.timing import FEWEST, WIDEST
from benchmarks.providers.provider import PROVIDERS
from benchmarks.reporting import document
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
from benchmarks.reporting.document import (
    Bullets,
    Card,
    Cards,
    Cell,
    Document,
    Picture,
    Section,
    Table,
    Text,
)

if TYPE_CHECKING:
    from benchmarks.measure.launches import Row

HOW = """\
Nothing is timed that was not found correct in the same run: operations against the reference in \
fp64 under the tolerance policy of `equiseg_fast.testing`, models against the reference in fp32. \
*budget* is the largest share of an allowance that an error used. *vs eager* and *vs best other* \
are the median of the eager baseline, and of the fastest other provider, over that of the row: \
above 1 the row is faster. For {ours} and the reference, which are ours, another provider is \
somebody else's. A band p20 to p80 wider than 10 % of the median is called noisy; *CPU* is the CPU \
time of all threads.

*GB/s*, *TFLOP/s* and *floor* use the declared minimal bytes, FLOPs and exponentials of the \
operation, the same for every provider: the floor is the least time they need with the bandwidth \
and peaks measured in the same run, each pass as the slowest of memory, matrix products, other \
arithmetic and exponentials, and of a network the sum over its parts. *% roofline* is that floor \
over the median; above 100 the peaks, which are those of one size, were seen too low.

*peak* is what a call allocates above the state before it, *saved* what its forward keeps for the \
backward, parameters and inputs not counted. Times by {method}. TF32 is off for all. A training \
step is loss and gradients of all parameters, without an optimiser.

{images}"""
METHODS = {
    "wall": "wall clock",
    "events": "CUDA events around single calls, L2 flushed",
    "graph": "CUDA events around replays of a CUDA graph over rotating inputs",
}


def write(records: Sequence[Record], env: Mapping[str, Any], folder: Path) -> None:
    """`report.md`, `report.html`, `results.csv` and the plots of the results in a folder, which may
    also hold `breakdown.json` and `host.json`."""
    from benchmarks.reporting import html, plots

    launches = []
    if find_spec("triton") and any(row.op in ("model", "training") for row in records):
        from benchmarks.measure.launches import cross_modal_blocks

        launches = cross_modal_blocks()
    path = folder / "breakdown.json"
    breakdown = json.loads(path.read_text()) if path.is_file() else None
    write_table(records, folder / "results.csv")
    drawn = plots.draw(records, folder / "plots", env.get("limits"), breakdown)
    images = [f"plots/{name}" for name in drawn]
    path = folder / host.FILE
    host_times = host.read(path) if path.is_file() else []
    report = build(records, env, images, launches, host_times)
    (folder / "report.md").write_text(document.markdown(report))
    (folder / "report.html").write_text(html.page(report, folder))


def markdown(
    records: Sequence[Record],
    env: Mapping[str, Any],
    images: Sequence[str],
    launches: Sequence[Row] = (),
) -> str:
    """The whole report; arguments as for `build`."""
    return document.markdown(build(records, env, images, launches))


def build(
    records: Sequence[Record],
    env: Mapping[str, Any],
    images: Sequence[str],
    launches: Sequence[Row] = (),
    host_times: Sequence[host.HostTime] = (),
) -> Document:
    """images: file names next to the report; launches: rows of `launches.cross_modal_blocks`;
    host_times: of `host`."""
    suites = ", ".join(dict.fromkeys(r.suite for r in records))
    found = contests(records)
    sections = [
        Section("Headline", _headline(found)),
        Section("Where ours is not the fastest", [_losses(records)]),
        Section("Environment", [_environment(env), _providers(records)]),
    ]
    ops: dict[str, list[Record]] = {}
    for record in records:
        ops.setdefault(record.op, []).append(record)
    sections += [Section(op, _operation(op, rows)) for op, rows in ops.items()]
    if images:
        sections.append(Section("Pictures", [Picture(name) for name in images]))
    if launches:
        sections.append(_launches(launches))
    if host_times:
        rows = [[Cell(text) for text in host.cells(time)] for time in host_times]
        sections.append(Section(host.title(host_times), [Table(host.COLUMNS, rows, names=2)]))
    methods = dict.fromkeys(METHODS[r.method] for r in records if r.method)
    how = HOW.format(method="; ".join(methods) or "nothing", ours=", ".join(OURS), images=data.WHAT)
    sections.append(Section("How to read this", [Text(part) for part in how.split("\n\n")]))
    title = (
        f"Benchmarks of equiseg_fast: suite {suites} on {env.get('device', 'an unknown device')}"
    )
    return Document(title, [Text(line) for line in contention(records)], sections)


def _headline(everything: Sequence[Contest]) -> list[document.Block]:
    if not everything:
        return [Text("No case was measured both with ours and with somebody else's.")]
    found = [contest for contest in everything if contest.settled]
    notes = []
    if unsettled := len(everything) - len(found):
        notes.append(
            Text(
                f"{unsettled} of {len(everything)} comparisons are left out here: fewer than "
                f"{FEWEST} samples, a band p20 to p80 wider than {100 * WIDEST:.0f} % of the "
                "median, or a busy machine. All are in the tables below."
            )
        )
    if not found:
        return notes
    best, worst = max(found, key=lambda c: c.ratio), min(found, key=lambda c: c.ratio)
    won = sum(c.ratio > 1 for c in found)
    cards = [
        Card(times(best.ratio), "best against the strongest other", _sentence(best), _tone(best)),
        Card(times(worst.ratio), "worst against the same", _sentence(worst), _tone(worst)),
        Card(f"{won} of {len(found)}", "cases that ours wins", "by medians"),
    ]
    with_eager = [c for c in found if c.eager is not None]
    if with_eager:
        eager = max(with_eager, key=lambda c: c.eager)
        tone = "good" if eager.eager > 1 else "bad"
        cards.insert(1, Card(times(eager.eager), "best against eager", _alone(eager), tone))
    return [Cards(cards), *notes, _summary(found)]


def _alone(contest: Contest) -> str:
    return f"{contest.label}: {contest.ours.provider} {milliseconds(contest.ours.p50_us)} ms"


def _sentence(contest: Contest) -> str:
    other = f"{contest.other.provider} {milliseconds(contest.other.p50_us)} ms"
    return f"{_alone(contest)}, {other}" + ("" if contest.clear else "; the bands overlap")


def _tone(contest: Contest) -> str:
    return "good" if contest.ratio > 1 else "bad"


def _summary(found: Sequence[Contest]) -> Table:
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
        others = ", ".join(dict.fromkeys(c.other.provider for c in members))
        values = sorted(c.ratio for c in members)
        eager = [c.eager for c in members if c.eager is not None]
        rows.append(
            [
                *(Cell(name) for name in (*names, others)),
                _number(len(members), str),
                _number(sum(v > 1 for v in values), str),
                *(
                    Cell(times(v), v, warn=v < 1)
                    for v in (values[0], statistics.median(values), values[-1])
                ),
                _number(statistics.median(eager) if eager else None, times),
            ]
        )
    return Table(columns, rows, names=4)


def _losses(records: Sequence[Record]) -> document.Block:
    found = losses(records)
    return Bullets(found) if found else Text("Nowhere in this run.")


def _environment(env: Mapping[str, Any]) -> Table:
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
        rows |= {
            f"measured matrix product {name}": f"{rate / 1e12:.3g} TFLOP/s"
            for name, rate in limits["peak"].items()
        }
        if limits.get("exps"):
            rows["measured exponentials"] = f"{limits['exps'] / 1e9:.3g} G/s"
    shown = [[Cell(name), Cell(str(value))] for name, value in rows.items() if value]
    return Table(("what", "value"), shown, names=2)


def _providers(records: Iterable[Record]) -> Bullets:
    used = {r.provider for r in records if r.status != "unsupported"}
    return Bullets([f"**{name}** {text}" for name, text in PROVIDERS.items() if name in used])


def _operation(op: str, rows: Sequence[Record]) -> list[document.Block]:
    blocks: list[document.Block] = []
    declared = operations().get(op)
    if declared is not None and declared.function:
        blocks.append(Text(f"Minimum: {declared.formula}."))
    elif declared is not None:
        parts = (
            "that of its calls, one after the other, as counted (`benchmarks/measure/launches.py`)"
        )
        blocks.append(Text(f"{declared.formula}. Minimum: {parts}."))
    blocks.append(_table(rows))
    if why := skipped(rows):
        blocks.append(Bullets(why))
    return blocks


COLUMNS = (
    "case", "dtype", "mode", "provider", "median ms", "p20 to p80", "CPU ms", "n", "vs eager",
    "vs best other", "GB/s", "TFLOP/s", "floor ms", "% roofline", "peak MiB", "saved MiB", "budget",
)  # fmt: skip


def _table(rows: Sequence[Record]) -> Table:
    cells = []
    for group in grouped(rows):
        winner = fastest(group)
        for r in group:
            if r.status == "unsupported":
                continue
            head = [Cell(text) for text in (r.shape.label, r.dtype, r.mode, r.provider)]
            if r.p50_us is None:
                blank = [Cell("")] * (len(COLUMNS) - 5)
                cells.append([*head, Cell(r.status, warn=True), *blank])
            else:
                cells.append([*head, *_numbers(r, group, r is winner)])
    return _without_empty_columns(Table(COLUMNS, cells, names=4))


def _without_empty_columns(table: Table) -> Table:
    """Names are kept in any case."""
    columns, rows, names = table.columns, table.rows, table.names
    kept = [i for i in range(len(columns)) if i < names or any(row[i].text for row in rows)]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], names)


def _numbers(r: Record, group: Sequence[Record], winner: bool) -> list[Cell]:
    baseline, other = ratios(r, group)
    band = f"{milliseconds(r.p20_us)} to {milliseconds(r.p80_us)}"
    floor_us = None if r.roofline_pct is None else r.roofline_pct * r.p50_us / 100
    return [
        Cell(milliseconds(r.p50_us), r.p50_us, best=winner),
        Cell(band + (" (noisy)" if r.noisy else ""), r.p80_us - r.p20_us),
        _number(r.cpu_us, milliseconds),
        _number(r.n, str),
        _number(baseline, times),
        Cell(times(other), other, warn=other is not None and other < 1 and r.provider in OURS),
        _number(r.gbps),
        _number(r.tflops),
        _number(floor_us, milliseconds),
        _number(r.roofline_pct),
        _number(r.peak_mib),
        _number(r.saved_mib),
        _number(r.budget, lambda value: f"{100 * value:.0f} %"),
    ]


def _number(value: float | None, show: Any = significant) -> Cell:
    return Cell("") if value is None else Cell(show(value), value)


def _launches(rows: Sequence[Row]) -> Section:
    """Kernels per forward of the cross-modal blocks and gates, ours beside the baseline's."""
    text = (
        "What one forward of EQUISeg-B0 with four modalities gives to a GPU, whatever the size of "
        "the images: launches of our kernels plus calls of stock operators that are more than a "
        "view. Counted, not measured (`benchmarks/measure/launches.py`)."
    )
    columns = ("stage", "part", "provider", "our kernels", "stock operators", "all")
    cells = [
        [
            *(Cell(str(x)) for x in (r.stage, r.part, r.provider)),
            *(_number(x, str) for x in (r.fused, r.stock, r.total)),
        ]
        for r in rows
    ]
    table = Table(columns, cells, names=3)
    return Section("Kernels per cross-modal block", [Text(text), table])

"""Records as tables: on the terminal, and in `report.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import data
from benchmarks.record import Key, Record
from benchmarks.registry import PROVIDERS, operations

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.launches import Row

OURS = ("triton", "torch")
BUDGET = "budget: the largest share of its tolerance that an error used"


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """Records that are compared with one another, in the order in which they came."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def measured(group: Iterable[Record]) -> list[Record]:
    return [record for record in group if record.p50_us is not None]


def ratios(record: Record, group: Iterable[Record]) -> tuple[float | None, float | None]:
    """How many times faster than the eager baseline, and than the strongest other provider."""
    if record.p50_us is None:
        return None, None
    others = [r for r in measured(group) if r is not record]
    baseline = [r.p50_us for r in others if r.provider == "baseline" and r.p50_us]
    strongest = min((r.p50_us for r in others if r.p50_us), default=None)
    return (
        baseline[0] / record.p50_us if baseline else None,
        strongest / record.p50_us if strongest else None,
    )


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


def spread(record: Record) -> str:
    """Width of the p20 to p80 band in percent of the median."""
    if record.p50_us is None:
        return ""
    return f"{100 * (record.p80_us - record.p20_us) / record.p50_us:.0f} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{significant(value)}x"


def terminal(records: Sequence[Record], console: Console) -> None:
    """One table for the whole run; the fastest of each group in bold, noise in yellow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    configurations = dict.fromkeys((replace(r.shape, stage=0).label, r.dtype) for r in records)
    common = " ".join(next(iter(configurations))) if len(configurations) == 1 else ""
    table = Table(
        title=f"median per call, {common}".rstrip(", "),
        title_justify="left",
        caption=BUDGET,
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for name in ("op", "stage" if common else "case", "mode", "provider"):
        table.add_column(name, no_wrap=True)
    numbers = ("ms", "CPU ms", "spread", "vs eager", "vs best other")
    for name in (*numbers, "peak MiB", "saved MiB", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in grouped(records):
        shown = [r for r in group if r.status != "unsupported"]
        fastest = min(measured(group), key=lambda r: r.p50_us, default=None)
        for i, record in enumerate(shown):
            case = f"{record.shape.label} {record.dtype}"
            if common:
                case = str(record.shape.stage or "all")
            first = record.op, case, record.mode
            lead = first if i == 0 else ("", "", "")
            table.add_row(
                *lead,
                *_cells(record, group),
                style="bold" if record is fastest else "",
                end_section=i == len(shown) - 1,
            )
    console.print(table)
    for line in (*_skipped(records), *contention(records)):
        console.print(line)


def contention(records: Iterable[Record]) -> list[str]:
    """A warning if other processes had the CPU while calls were timed."""
    rows = measured(records)
    count = sum(record.contended for record in rows)
    if not count:
        return []
    return [
        f"Busy machine: {count} of {len(rows)} medians hold less than 90 % CPU time, so others had "
        "the CPU meanwhile. Believe no ratio of wall times here; the CPU times are closer to it. "
        "On a shared machine --threads 1 disturbs least."
    ]


def _cells(record: Record, group: Sequence[Record]) -> list[str]:
    if record.p50_us is None:
        return [record.provider, f"[red]{record.status}[/]"]
    baseline, other = ratios(record, group)
    band = spread(record)
    return [
        record.provider,
        milliseconds(record.p50_us),
        milliseconds(record.cpu_us),
        f"[yellow]{band}[/]" if record.noisy else band,
        _ratio(baseline),
        _ratio(other),
        significant(record.peak_mib),
        significant(record.saved_mib),
        f"{100 * record.budget:.0f} %" if record.budget is not None else "",
    ]


def _skipped(records: Iterable[Record]) -> list[str]:
    """What has no numbers, once per provider and reason."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        if r.status != "ok":
            places = where.setdefault((r.provider, r.status, r.reason), [])
            if r.op not in places:
                places.append(r.op)
    return [
        f"{provider}: {status}, {reason} ({', '.join(places)})"
        for (provider, status, reason), places in where.items()
    ]


def losses(records: Iterable[Record]) -> list[str]:
    """Where ours, the best of triton and torch, is slower than another provider, worst first."""
    found = []
    for group in grouped(records):
        rows = measured(group)
        ours = min((r for r in rows if r.provider in OURS), key=lambda r: r.p50_us, default=None)
        best = min(rows, key=lambda r: r.p50_us, default=None)
        if ours is None or best is None or best.provider in OURS:
            continue
        apart = best.p80_us < ours.p20_us
        factor = ours.p50_us / best.p50_us
        found.append(
            (
                factor,
                f"- {ours.op} {ours.mode} {ours.shape.label} {ours.dtype}: {ours.provider} takes "
                f"{significant(factor)}x the time of {best.provider}"
                + ("" if apart else " (their p20 to p80 bands overlap)"),
            )
        )
    return [line for _, line in sorted(found, reverse=True)]


HOW = """\
## How to read this

Nothing is timed that was not found correct in the same run: operations against the reference in
fp64 under the tolerance policy of `equiseg_fast.testing`, models against the reference in fp32.
*budget* is the largest share of an allowance that an error used. *vs eager* and *vs best other* are
the median of the eager baseline, and of the fastest other provider, over that of the row: above 1
the row is faster. A band p20 to p80 wider than 10 % of the median is called noisy; *CPU* is the CPU
time of all threads. GB/s, TFLOP/s and % of roofline use the declared minimal bytes and FLOPs of the
operation, the same for every provider. *peak* is what a call allocates above the state before it,
*saved* what its forward keeps for the backward, parameters and inputs not counted. Times by
{method}. TF32 is off for all. A training step is loss and gradients of all parameters, without an
optimiser.
"""
METHODS = {
    "wall": "wall clock",
    "events": "CUDA events around single calls, L2 flushed",
    "graph": "CUDA events around replays of a CUDA graph over rotating inputs",
}


def markdown(
    records: Sequence[Record],
    env: Mapping[str, Any],
    images: Sequence[str],
    notes: Sequence[str],
    launches: Sequence[Row] = (),
) -> str:
    """The whole report. images: file names next to it; notes: further paragraphs; launches: rows
    of `launches.cross_modal_blocks`."""
    suites = ", ".join(dict.fromkeys(r.suite for r in records))
    methods = dict.fromkeys(METHODS[r.method] for r in records if r.method)
    lines = [
        f"# Benchmarks of equiseg_fast: suite {suites} on {env.get('device', 'an unknown device')}",
        "",
        _environment(env),
        "",
        *(f"{note}\n" for note in (*contention(records), *notes)),
        HOW.format(method="; ".join(methods) or "nothing"),
        "Providers: " + "; ".join(f"**{n}** {PROVIDERS[n]}" for n in _providers(records)) + ".",
        "",
        "## Where ours is not the fastest",
        "",
        *(losses(records) or ["Nowhere in this run."]),
        "",
    ]
    ops: dict[str, list[Record]] = {}
    for record in records:
        ops.setdefault(record.op, []).append(record)
    for op, rows in ops.items():
        lines += [f"## {op}", "", *_table(rows), "", *(f"- {x}" for x in _skipped(rows)), ""]
        lines += [f"Minimum: {operations()[op].formula}.", ""]
    lines += launch_table(launches) if launches else []
    lines += [line for name in images for line in (f"![{Path(name).stem}]({name})", "")]
    return "\n".join(lines)


def _providers(records: Iterable[Record]) -> list[str]:
    used = {r.provider for r in records if r.status != "unsupported"}
    return [name for name in PROVIDERS if name in used]


def _environment(env: Mapping[str, Any]) -> str:
    dirty = ", with uncommitted changes" if env.get("git_dirty") else ""
    parts = [
        f"equiseg_fast {env.get('package')} (git {str(env.get('git_sha'))[:10]}{dirty})",
        f"torch {env.get('torch')}, triton {env.get('triton') or 'not installed'}, "
        f"python {env.get('python')}",
        f"{env.get('cpu')}, {env.get('threads')} threads",
        f"{env.get('utc')}",
    ]
    if limits := env.get("limits"):
        peaks = ", ".join(f"{v / 1e12:.3g} TFLOP/s {k}" for k, v in limits["peak"].items())
        parts.append(f"measured here: copy {limits['bandwidth'] / 1e9:.0f} GB/s, {peaks}")
    return "; ".join(parts) + f". Environment `{env.get('env_id')}`."


COLUMNS = (
    "case", "dtype", "mode", "provider", "median ms", "p20 to p80", "CPU ms", "n", "vs eager",
    "vs best other", "GB/s", "TFLOP/s", "% roofline", "peak MiB", "saved MiB", "budget",
)  # fmt: skip


def _table(rows: Sequence[Record]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|" + "--:|" * (len(COLUMNS) - 4)]
    for group in grouped(rows):
        fastest = min(measured(group), key=lambda r: r.p50_us, default=None)
        for r in group:
            head = [r.shape.label, r.dtype, r.mode, r.provider]
            if r.status == "unsupported":
                continue
            if r.p50_us is None:
                lines.append(f"| {' | '.join([*head, r.status])} |" + " |" * (len(COLUMNS) - 5))
                continue
            baseline, other = ratios(r, group)
            mark = "**" if r is fastest else ""
            band = f"{milliseconds(r.p20_us)} to {milliseconds(r.p80_us)}"
            cells = [
                *head,
                f"{mark}{milliseconds(r.p50_us)}{mark}",
                band + (" (noisy)" if r.noisy else ""),
                milliseconds(r.cpu_us),
                str(r.n),
                _ratio(baseline),
                _ratio(other),
                significant(r.gbps),
                significant(r.tflops),
                significant(r.roofline_pct),
                significant(r.peak_mib),
                significant(r.saved_mib),
                "" if r.budget is None else f"{100 * r.budget:.0f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def launch_table(rows: Sequence[Row]) -> list[str]:
    """Kernels per forward of the cross-modal blocks and gates, ours beside the baseline's."""
    lines = [
        "## Kernels per cross-modal block",
        "",
        "What one forward of EQUISeg-B0 with four modalities gives to a GPU, whatever the size of "
        "the images: launches of our kernels plus calls of stock operators that are more than a "
        "view. Counted, not measured (`benchmarks/launches.py`).",
        "",
        "| stage | part | provider | our kernels | stock operators | all |",
        "|---|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {r.stage} | {r.part} | {r.provider} | {r.fused} | {r.stock} | {r.total} |" for r in rows
    ]
    return [*lines, ""]


def sensor_note(steps: int) -> str:
    """What the picture of the sensors is made of."""
    return (
        f"{data.WHAT} The gate's last layer starts at zero, so the contributions in `sensors.png` "
        f"are those of a B0 trained for {steps} steps on crops of this one image with "
        "modality dropout: they show how the gate reacts, not how well the model segments."
    )

"""Predicted beside measured: which row was wrong, and which assumption made it so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median

from benchmarks import predictions
from benchmarks.efficiency import ASSUMPTIONS
from benchmarks.gpus import GPUS, of_device
from benchmarks.predictions import Prediction
from benchmarks.record import Key, Record

ORDER = ("training", "model", "encoder", "stage", "block_training", "block")
"""Single operations follow."""
NETWORKS = ORDER[:3]
CLEAR = 0.5
"""The share of a time that an assumption must have before the rest is trusted to be right."""
STARVED = 0.8
"""The share of a measured time that the host needs to enqueue, from which on it may be what was
measured."""


@dataclass(frozen=True)
class Row:
    """One prediction and, where there is one, its measurement: microseconds per call."""

    prediction: Prediction
    measured_us: float | None = None
    method: str = ""
    starved: bool = False

    @property
    def ratio(self) -> float | None:
        """Measured over predicted: below 1 is faster than assumed."""
        return None if self.measured_us is None else self.measured_us / self.prediction.us

    @property
    def implied(self) -> float | None:
        """The dominating assumption's value if all others hold; None where they cannot, where it
        is too small a part of the time to tell, and where the host was what was timed."""
        name, share = self.prediction.dominating
        if self.ratio is None or self.starved or share < CLEAR:
            return None
        stretched = (self.ratio - (1 - share)) / share
        if stretched <= 0:
            return None
        assumption = ASSUMPTIONS[name]
        return assumption.value * (stretched if assumption.unit == "gap" else 1 / stretched)


@dataclass(frozen=True)
class Verdict:
    """What measurements say of one assumption: rows that it dominates, their median ratio, and the
    median of the values that rows imply, with how many such rows there are."""

    assumption: str
    rows: int
    ratio: float
    implied: float | None
    telling: int

    @property
    def error(self) -> float:
        """How many times too high or too low the assumption was; 1 is right."""
        if self.implied is None:
            return 1.0
        return max(self.implied / (x := ASSUMPTIONS[self.assumption].value), x / self.implied)


@dataclass(frozen=True)
class Comparison:
    """gpu: a key of `gpus.GPUS`, "" where nothing was predicted; reason: why not. rows: measured
    ones, and whole models without a measurement."""

    gpu: str
    reason: str
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.measured_us is not None]


def compare(
    records: Iterable[Record], device_name: str, folder: Path = predictions.FOLDER
) -> Comparison:
    """Join records with what was predicted for that GPU; device_name: as PyTorch gives it.

    Of several records of one measurement the last with a time counts; those without are left out.
    """
    gpu = next((name for name, gpu in GPUS.items() if gpu == of_device(device_name)), "")
    known = predictions.committed(folder)
    if gpu not in known:
        reason = f"no predictions for {device_name!r}, only for {', '.join(known) or 'no GPU'}"
        if gpu:
            reason += f" (`python -m benchmarks predict --gpu {gpu}` makes them)"
        return Comparison("", reason, (), ())
    times: dict[Key, Record] = {
        r.key: r for r in records if r.status == "ok" and r.p50_us is not None
    }
    rows = []
    for prediction in predictions.read(gpu, folder):
        record = times.get(prediction.key)
        if record is not None and record.p50_us is not None:
            starved = record.method != "graph" and (record.host_us or 0) > STARVED * record.p50_us
            rows.append(Row(prediction, record.p50_us, record.method, starved))
        elif prediction.op in NETWORKS[:2] and prediction.mode in ("fwd", "step"):
            rows.append(Row(prediction))
    rows.sort(key=lambda row: _place(row.prediction.op))
    return Comparison(gpu, "", tuple(rows), tuple(_verdicts(rows)))


def _place(op: str) -> int:
    return ORDER.index(op) if op in ORDER else len(ORDER)


def _verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The most wrong first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio is not None and not row.starved:
            groups.setdefault(row.prediction.dominating[0], []).append(row)
    found = []
    for name, own in groups.items():
        implied = [row.implied for row in own if row.implied is not None]
        ratios = [row.ratio for row in own if row.ratio is not None]
        value = median(implied) if implied else None
        found.append(Verdict(name, len(own), median(ratios), value, len(implied)))
    return sorted(found, key=lambda verdict: -log(verdict.error))


def markdown(comparison: Comparison) -> list[str]:
    """Lines for the summary of a visit: the most wrong assumption, whole networks, the assumptions,
    then parts and single operations."""
    if comparison.reason:
        return [f"Nothing to compare with: {comparison.reason}."]
    lines = [_sentence(comparison), ""]
    networks = [row for row in comparison.rows if row.prediction.op in NETWORKS]
    parts = [row for row in comparison.rows if row.prediction.op not in NETWORKS]
    if networks:
        lines += [*_table(networks, comparison.rows), ""]
    if comparison.verdicts:
        lines += [
            "| assumption | rows it dominates | measured / predicted, median | assumed | implied |",
            "|---|--:|--:|---|---|",
            *(_verdict_line(verdict) for verdict in comparison.verdicts),
            "",
        ]
    if parts:
        lines += [*_table(parts, comparison.rows), ""]
    starved = sum(row.starved for row in comparison.rows)
    if starved:
        lines += [
            f"\\* {starved} rows may have timed the host, which needs more than "
            f"{100 * STARVED:.0f} % of the time to enqueue them; no assumption is judged by them.",
            "",
        ]
    return lines[:-1]


def _sentence(comparison: Comparison) -> str:
    title = GPUS[comparison.gpu].title
    if not comparison.measured:
        return f"Predicted for the {title}; nothing of it was measured."
    telling = [v for v in comparison.verdicts if v.implied is not None]
    whole = median(row.ratio for row in comparison.measured if row.ratio is not None)
    start = (
        f"{len(comparison.measured)} rows of the {title} have predictions; measured / predicted "
        f"is {whole:.2f} in the median"
    )
    if not telling:
        return f"{start}. No row tells one assumption from the others."
    worst = telling[0]
    rows = f"{worst.telling} row{'s' * (worst.telling > 1)}"
    return (
        f"{start}. Most wrong: {worst.assumption}, assumed {ASSUMPTIONS[worst.assumption].text}, "
        f"implied {_implied(worst)} by {rows}."
    )


def _implied(verdict: Verdict) -> str:
    if verdict.implied is None:
        return "not told apart"
    return ASSUMPTIONS[verdict.assumption].show(verdict.implied)


def _verdict_line(verdict: Verdict) -> str:
    assumed = ASSUMPTIONS[verdict.assumption].text
    return (
        f"| {verdict.assumption} | {verdict.rows} | {verdict.ratio:.2f} | {assumed} | "
        f"{_implied(verdict)} |"
    )


def _table(rows: Sequence[Row], everybody: Sequence[Row]) -> list[str]:
    by_key = {row.prediction.key: row for row in everybody}
    return [
        "| | mode | provider | predicted us | measured us | ratio | of the prediction "
        "| faster than torch, predicted: measured |",
        "|---|---|---|--:|--:|--:|---|--:|",
        *(_line(row, by_key.get((*row.prediction.key[:4], "torch"))) for row in rows),
    ]


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _line(row: Row, torch: Row | None) -> str:
    p = row.prediction
    measured = ratio = "-"
    if row.measured_us is not None:
        measured = f"{_us(row.measured_us)} ({row.method}){'*' * row.starved}"
        ratio = f"{row.ratio:.2f}"
    name, share = p.dominating
    faster = ""
    if torch and torch is not row:
        faster = f"{torch.prediction.us / p.us:.2f}: "
        if row.measured_us is None or torch.measured_us is None:
            faster += "-"
        else:
            faster += f"{torch.measured_us / row.measured_us:.2f}"
    return (
        f"| {p.op} {p.shape} {p.dtype} | {p.mode} | {p.provider} | {_us(p.us)} | {measured} | "
        f"{ratio} | {100 * share:.0f} % {name} | {faster} |"
    )

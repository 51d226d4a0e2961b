"""Predicted beside measured: which row was wrong, and which assumption made it so.

A row is a sum of times, one per assumption. `compare` stretches the assumptions until the sums
explain all that was measured, taking a row to be right to 5 % and an assumption to 50 %: where rows
say nothing of an assumption it stays as it was and counts as not told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.machines import predictions
from benchmarks.machines.efficiency import ASSUMPTIONS
from benchmarks.machines.gpus import GPUS, of_device
from benchmarks.machines.predictions import Prediction
from benchmarks.measure.record import Key, Record

ORDER = ("training", "model", "encoder", "stage", "block_training", "block")
"""Single operations follow."""
NETWORKS = ORDER[:3]
ROW_ERROR = 0.05
ASSUMPTION_ERROR = 0.5
TOLD_APART = ASSUMPTION_ERROR / 2
"""How well a stretch must be known to be shown."""
LEAST_STRETCH = 0.05
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


@dataclass(frozen=True)
class Verdict:
    """What measurements say of one assumption. rows: those that it dominates, and their median
    ratio. stretch: how many times longer what it decides took, known to `error`. weight: its
    share of the predicted time, mean of all rows."""

    assumption: str
    rows: int
    ratio: float | None
    stretch: float
    error: float
    weight: float

    @property
    def implied(self) -> float | None:
        """The value that it should have had; None if the rows do not tell."""
        if self.error > TOLD_APART:
            return None
        assumption = ASSUMPTIONS[self.assumption]
        return assumption.value * (self.stretch if assumption.unit == "gap" else 1 / self.stretch)

    @property
    def blame(self) -> float:
        """By how much of a row's time it was wrong, in the mean."""
        return 0.0 if self.implied is None else abs(self.stretch - 1) * self.weight


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

    Of several records of one measurement the last with a time counts, and of its times that by
    CUDA graph where there is one; those without are left out.
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
            us, method = record.p50_us, record.method
            if record.graph_us is not None:
                us, method = record.graph_us, "graph"
            starved = method != "graph" and (record.host_us or 0) > STARVED * us
            rows.append(Row(prediction, us, method, starved))
        elif prediction.op in NETWORKS[:2] and prediction.mode in ("fwd", "step"):
            rows.append(Row(prediction))
    rows.sort(key=lambda row: _place(row.prediction.op))
    return Comparison(gpu, "", tuple(rows), tuple(_verdicts(rows)))


def _place(op: str) -> int:
    return ORDER.index(op) if op in ORDER else len(ORDER)


def _verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The one to blame most first."""
    rows = [row for row in rows if row.measured_us is not None and not row.starved]
    names = sorted({name for row in rows for name in row.prediction.spent})
    if not rows:
        return []
    shares, off = np.zeros((len(rows), len(names))), np.zeros(len(rows))
    for i, row in enumerate(rows):
        # Neither a row far too slow nor one far too fast outweighs the others.
        scale = max(row.prediction.us, row.measured_us or 0.0)
        off[i] = ((row.measured_us or 0.0) - row.prediction.us) / scale
        shares[i] = [row.prediction.spent.get(name, 0.0) / scale for name in names]
    prior = (ROW_ERROR / ASSUMPTION_ERROR) ** 2 * np.eye(len(names))
    covariance = np.linalg.inv(shares.T @ shares + prior)
    stretches = np.maximum(1 + covariance @ shares.T @ off, LEAST_STRETCH)
    errors = ROW_ERROR * np.sqrt(np.diag(covariance))
    found = []
    for name, stretch, error in zip(names, stretches, errors, strict=True):
        own = [row.ratio for row in rows if row.prediction.dominating[0] == name and row.ratio]
        weight = sum(r.prediction.spent.get(name, 0.0) / r.prediction.us for r in rows) / len(rows)
        ratio = median(own) if own else None
        found.append(Verdict(name, len(own), ratio, float(stretch), float(error), weight))
    return sorted(found, key=lambda verdict: -verdict.blame)


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
            "| assumption | of the predicted time | rows it dominates | their median ratio "
            "| assumed | implied | known to |",
            "|---|--:|--:|--:|---|---|--:|",
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
    whole = median(row.ratio for row in comparison.measured if row.ratio is not None)
    start = (
        f"{len(comparison.measured)} rows of the {title} have predictions; measured / predicted "
        f"is {whole:.2f} in the median"
    )
    if not comparison.verdicts or comparison.verdicts[0].implied is None:
        return f"{start}. No row tells one assumption from the others."
    worst = comparison.verdicts[0]
    return (
        f"{start}. Most wrong: {worst.assumption}, assumed {ASSUMPTIONS[worst.assumption].text}, "
        f"implied {_implied(worst)}."
    )


def _implied(verdict: Verdict) -> str:
    if verdict.implied is None:
        return "not told apart"
    return ASSUMPTIONS[verdict.assumption].show(verdict.implied)


def _verdict_line(verdict: Verdict) -> str:
    assumed = ASSUMPTIONS[verdict.assumption].text
    ratio = "-" if verdict.ratio is None else f"{verdict.ratio:.2f}"
    return (
        f"| {verdict.assumption} | {100 * verdict.weight:.0f} % | {verdict.rows} | {ratio} | "
        f"{assumed} | {_implied(verdict)} | {100 * verdict.error / verdict.stretch:.0f} % |"
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

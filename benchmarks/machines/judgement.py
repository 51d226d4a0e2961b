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

from benchmarks.command.table import markdown_table
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

    @property
    def text(self) -> str:
        """The implied value in words."""
        implied = self.implied
        if implied is None:
            return "not told apart"
        return ASSUMPTIONS[self.assumption].show(implied)


@dataclass(frozen=True)
class Comparison:
    """gpu: a key of `gpus.GPUS`, "" where nothing was predicted; reason: why not. rows: measured
    ones, and whole models without a measurement. verdicts: the one to blame most first."""

    gpu: str
    reason: str
    rows: tuple[Row, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

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
        return Comparison("", reason)
    times: dict[Key, Record] = {r.key: r for r in records if r.status == "ok" and r.p50_us}
    rows = []
    for prediction in predictions.read(gpu, folder):
        if record := times.get(prediction.key):
            method = record.method if record.graph_us is None else "graph"
            us = record.graph_us or record.p50_us or 0.0
            starved = method != "graph" and (record.host_us or 0) > STARVED * us
            rows.append(Row(prediction, us, method, starved))
        elif prediction.op in NETWORKS[:2] and prediction.mode in ("fwd", "step"):
            rows.append(Row(prediction))
    rows.sort(key=lambda row: [*ORDER, row.prediction.op].index(row.prediction.op))
    return Comparison(gpu, "", tuple(rows), tuple(_verdicts(rows)))


def _verdicts(rows: Sequence[Row]) -> list[Verdict]:
    rows = [row for row in rows if row.measured_us is not None and not row.starved]
    names = sorted({name for row in rows for name in row.prediction.spent})
    if not rows:
        return []
    predicted, measured = (
        np.array(x) for x in zip(*((r.prediction.us, r.measured_us) for r in rows), strict=True)
    )
    # Neither a row far too slow nor one far too fast outweighs the others.
    scale = np.maximum(predicted, measured)
    spent = np.array([[row.prediction.spent.get(name, 0.0) for name in names] for row in rows])
    shares, off = spent / scale[:, None], (measured - predicted) / scale
    prior = (ROW_ERROR / ASSUMPTION_ERROR) ** 2 * np.eye(len(names))
    covariance = np.linalg.inv(shares.T @ shares + prior)
    stretches = np.maximum(1 + covariance @ shares.T @ off, LEAST_STRETCH)
    errors = ROW_ERROR * np.sqrt(np.diag(covariance))
    weights = (spent / predicted[:, None]).mean(0)
    found = []
    for i, name in enumerate(names):
        own = [row.ratio for row in rows if row.prediction.dominating[0] == name and row.ratio]
        numbers = (float(x[i]) for x in (stretches, errors, weights))
        found.append(Verdict(name, len(own), median(own) if own else None, *numbers))
    return sorted(found, key=lambda verdict: -verdict.blame)


def markdown(comparison: Comparison) -> list[str]:
    """Lines for the summary of a visit: the most wrong assumption, whole networks, the assumptions,
    then parts and single operations."""
    if comparison.reason:
        return [f"Nothing to compare with: {comparison.reason}."]
    blocks = [_sentence(comparison)]
    networks = [row for row in comparison.rows if row.prediction.op in NETWORKS]
    parts = [row for row in comparison.rows if row.prediction.op not in NETWORKS]
    if networks:
        blocks.append(_table(networks, comparison.rows))
    if comparison.verdicts:
        columns = (
            "assumption", "assumed", "implied", "known to", "of the predicted time",
            "rows it dominates", "their median ratio",
        )  # fmt: skip
        rows = [
            (
                v.assumption, ASSUMPTIONS[v.assumption].text, v.text,
                f"{100 * v.error / v.stretch:.0f} %", f"{100 * v.weight:.0f} %", str(v.rows),
                "-" if v.ratio is None else f"{v.ratio:.2f}",
            )
            for v in comparison.verdicts
        ]  # fmt: skip
        blocks.append(markdown_table(columns, rows, words=3))
    if parts:
        blocks.append(_table(parts, comparison.rows))
    if starved := sum(row.starved for row in comparison.rows):
        blocks.append(
            f"\\* {starved} rows may have timed the host, which needs more than "
            f"{100 * STARVED:.0f} % of the time to enqueue them; no assumption is judged by them."
        )
    return "\n\n".join(blocks).split("\n")


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
    assumed = ASSUMPTIONS[worst.assumption].text
    return f"{start}. Most wrong: {worst.assumption}, assumed {assumed}, implied {worst.text}."


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _table(rows: Sequence[Row], everybody: Sequence[Row]) -> str:
    eager = {row.prediction.key: row for row in everybody}
    cells = []
    for row in rows:
        p, measured, faster = row.prediction, row.measured_us, ""
        torch = eager.get((*p.key[:4], "torch"))
        if torch and torch is not row:
            both = measured and torch.measured_us
            seen = f"{torch.measured_us / measured:.2f}" if both else "-"  # type: ignore[operator]
            faster = f"{torch.prediction.us / p.us:.2f}: {seen}"
        name, share = p.dominating
        cells.append((
            f"{p.op} {p.shape} {p.dtype}", p.mode, p.provider, f"{100 * share:.0f} % {name}",
            _us(p.us), f"{_us(measured)} ({row.method}){'*' * row.starved}" if measured else "-",
            f"{row.ratio:.2f}" if measured else "-", faster,
        ))  # fmt: skip
    columns = (
        "", "mode", "provider", "of the prediction", "predicted us", "measured us", "ratio",
        "faster than torch, predicted: measured",
    )  # fmt: skip
    return markdown_table(columns, cells, words=4)

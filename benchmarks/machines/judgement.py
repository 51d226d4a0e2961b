"""Predicted beside measured: which row was wrong, and which assumption made it so.

A row is a sum of times, one per assumption. What it took more or less than predicted is put down to
the assumption that most of its time hangs on, as if all others were right; of an assumption the
median of the rows that it dominates counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from statistics import median

from benchmarks.command.table import markdown_table, milliseconds
from benchmarks.machines.gpus import GPUS, of_device
from benchmarks.machines.predictions import ASSUMPTIONS, GAP, Prediction, read
from benchmarks.measure.record import Key, Record

STARVED = 0.8
"""The share of a measured time that the host needs to enqueue, from which on it may be what was
measured."""


Row = tuple[Prediction, float, str]
"""What was predicted, microseconds that were measured, and how."""


def compare(records: Iterable[Record], device: str) -> list[Row]:
    """Join records with what was predicted for a GPU, whose name PyTorch gives; the longest first.

    Of several records of one measurement the last with a time counts, and of its times that by
    CUDA graph where there is one. Left out is what may have timed the host.
    """
    gpu = next((name for name, gpu in GPUS.items() if gpu == of_device(device)), "")
    times: dict[Key, Record] = {r.key: r for r in records if r.status == "ok" and r.p50_us}
    rows = []
    for prediction in read(gpu):
        if record := times.get(prediction.key):
            method = record.method if record.graph_us is None else "graph"
            us = record.graph_us or record.p50_us or 0.0
            if method == "graph" or (record.host_us or 0) <= STARVED * us:
                rows.append((prediction, us, method))
    return sorted(rows, key=lambda row: -row[0].us)


def verdicts(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """How many rows each assumption dominates, and the median of how many times longer it took;
    first what is wrong in most of them, and by most."""
    stretches: dict[str, list[float]] = {}
    for prediction, us, _ in rows:
        name, spent = next(iter(prediction.spent.items()))
        stretches.setdefault(name, []).append(max(1 + (us - prediction.us) / spent, 0.01))
    found = {name: (len(values), median(values)) for name, values in stretches.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0] * abs(log(item[1][1]))))


def _value(name: str, stretch: float = 1.0) -> str:
    """What is assumed, or should have been for times that are stretched so."""
    value, unit, _ = ASSUMPTIONS[name]
    if name == GAP:
        return f"{value * stretch:.2g} {unit}"
    return f"{100 * value / stretch:.0f} % of {unit}"


def markdown(rows: Sequence[Row]) -> list[str]:
    """Lines for the summary of a visit."""
    if not rows:
        return ["Nothing of it was predicted for this device by `python -m benchmarks predict`."]
    judged = [
        (name, _value(name), _value(name, stretch), str(count))
        for name, (count, stretch) in verdicts(rows).items()
    ]
    compared = [
        (f"{p.op} {p.shape} {p.dtype}", p.mode, p.provider, next(iter(p.spent)),
         milliseconds(p.us), f"{milliseconds(us)} ({method})", f"{us / p.us:.2f}")
        for p, us, method in rows
    ]  # fmt: skip
    columns = ("", "mode", "provider", "mostly", "predicted ms", "measured ms", "ratio")
    blocks = [
        f"{len(rows)} rows have predictions. What was assumed, the most wrong first, and what the "
        "rows imply that it dominates:",
        markdown_table(("assumption", "assumed", "implied", "rows"), judged, words=3),
        markdown_table(columns, compared, words=4),
    ]
    return "\n\n".join(blocks).split("\n")

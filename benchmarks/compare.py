"""Two runs side by side: what became slower, what became faster, and what is only noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import Record
from benchmarks.report import milliseconds


@dataclass(frozen=True)
class Change:
    """One measurement in both runs; ratio is new over base, verdict "slower", "faster", "same"."""

    base: Record
    new: Record
    ratio: float
    verdict: str

    @property
    def text(self) -> str:
        return (
            f"{self.verdict}: {self.new.op} {self.new.shape.label} {self.new.dtype} "
            f"{self.new.mode} {self.new.provider}: {milliseconds(self.base.p50_us)} ms -> "
            f"{milliseconds(self.new.p50_us)} ms ({100 * (self.ratio - 1):+.1f} %)"
        )


def compare(
    base: Sequence[Record], new: Sequence[Record], *, threshold: float, atol_us: float
) -> list[Change]:
    """Joins on operation, case, mode, provider and dtype; what only one run has is left out.

    A change counts if the medians differ by more than `threshold` (a fraction of base) and by more
    than `atol_us` microseconds, and the p20 to p80 bands do not overlap.
    """
    known = {r.key: r for r in base if r.p50_us is not None}
    changes = []
    for record in new:
        before = known.get(record.key)
        if before is None or record.p50_us is None:
            continue
        difference = record.p50_us - before.p50_us
        large = abs(difference) > max(threshold * before.p50_us, atol_us)
        apart = record.p20_us > before.p80_us or record.p80_us < before.p20_us
        verdict = "same"
        if large and apart:
            verdict = "slower" if difference > 0 else "faster"
        changes.append(Change(before, record, record.p50_us / before.p50_us, verdict))
    return changes


def lost(base: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Measurements that base has and that new tried without success (wrong, out of memory, ..)."""
    known = {r.key for r in base if r.status == "ok"}
    return [r for r in new if r.key in known and r.status != "ok"]

"""What records say: who is compared with whom, how much faster ours is, and where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.command.table import times
from benchmarks.measure.record import Key, Record
from benchmarks.providers.provider import OURS as OWN

OURS = tuple(name for name in OWN if name != "reference")
"""What a user of the package gets; OWN are all that are ours and so no competitors of ours."""


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """Records that are compared with one another, in the order in which they came."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def measured(group: Iterable[Record]) -> list[Record]:
    return [record for record in group if record.p50_us is not None]


def fastest(records: Iterable[Record]) -> Record | None:
    return min(measured(records), key=lambda r: r.p50_us, default=None)


def strongest_other(record: Record, group: Iterable[Record]) -> Record | None:
    """The fastest other provider; for one of ours none of ours is another."""
    others = [r for r in measured(group) if r is not record]
    if record.provider in OWN:
        others = [r for r in others if r.provider not in OWN]
    return fastest(others)


def ratios(record: Record, group: Sequence[Record]) -> tuple[float | None, float | None]:
    """How many times faster than the eager baseline, and than the strongest other provider."""
    if record.p50_us is None:
        return None, None
    others = [r for r in measured(group) if r is not record]
    baseline = next((r for r in others if r.provider == "baseline"), None)
    faster = (baseline, strongest_other(record, group))
    return tuple(r and r.p50_us / record.p50_us for r in faster)


@dataclass(frozen=True)
class Contest:
    """The best of ours in one group beside the strongest other provider; clear: their p20 to p80
    bands do not overlap. eager: ratio to the baseline, None where there is none."""

    ours: Record
    other: Record
    eager: float | None

    @property
    def ratio(self) -> float:
        return self.other.p50_us / self.ours.p50_us

    @property
    def settled(self) -> bool:
        """Whether it may be a headline."""
        return self.ours.settled and self.other.settled

    @property
    def clear(self) -> bool:
        slow, fast = sorted((self.ours, self.other), key=lambda r: -r.p50_us)
        return fast.p80_us < slow.p20_us

    @property
    def label(self) -> str:
        r = self.ours
        return f"{r.op} {r.mode} {r.shape.label} {r.dtype}"


def contests(records: Iterable[Record]) -> list[Contest]:
    """One per group in which one of ours and somebody else were measured."""
    found = []
    for group in grouped(records):
        ours = fastest(r for r in group if r.provider in OURS)
        other = strongest_other(ours, group) if ours else None
        if ours and other:
            found.append(Contest(ours, other, ratios(ours, group)[0]))
    return found


def losses(records: Iterable[Record]) -> list[str]:
    """Where the best of ours is slower than somebody else or the reference, worst first."""
    found = []
    for group in grouped(records):
        ours, best = fastest(r for r in group if r.provider in OURS), fastest(group)
        if ours and best.provider not in OURS:
            contest = Contest(ours, best, None)
            factor, what = 1 / contest.ratio, f"{contest.label}: {ours.provider}"
            overlap = "" if contest.clear else " (their p20 to p80 bands overlap)"
            text = f"{what} takes {times(factor)} the time of {best.provider}{overlap}"
            found.append((factor, text))
    return [line for _, line in sorted(found, reverse=True)]


def contention(records: Iterable[Record]) -> list[str]:
    """A warning if other processes had the CPU while calls were timed."""
    rows = measured(records)
    count = sum(record.contended for record in rows)
    if not count:
        return []
    return [
        f"Busy machine: during {count} of {len(rows)} medians others had more than 10 % of the CPU "
        "time of our threads. Believe no ratio of wall times here; the CPU times are closer to it. "
        "On a shared machine --threads 1 disturbs least."
    ]


def skipped(records: Iterable[Record]) -> list[str]:
    """What has no numbers, once per provider and reason."""
    where: dict[str, dict[str, None]] = {}
    for r in records:
        if r.status != "ok":
            where.setdefault(f"{r.provider}: {r.status}, {r.reason}", {})[r.op] = None
    return [f"{what} ({', '.join(ops)})" for what, ops in where.items()]

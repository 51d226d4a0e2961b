"""What an operation cannot do without, and how long that takes at best on a device.

The work of one call is bytes to and from memory, FLOPs of matrix products, FLOPs of everything
else, and exponentials, because a GPU has a unit of its own for each: memory, tensor cores, FP32
lanes and special function units. None can be faster than its rate, and all may work at once, so the
floor of a call is the longest of the four times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Of one call. bytes: read or written once each, as if intermediate results cost nothing.
    matrix: FLOPs in matrix products; vector: all other FLOPs (a multiply-add is 2 in both).
    exps: exponentials; an erf or a sigmoid counts as one."""

    bytes: float = 0.0
    matrix: float = 0.0
    vector: float = 0.0
    exps: float = 0.0

    @property
    def flops(self) -> float:
        return self.matrix + self.vector


def total(works: Iterable[Work]) -> Work:
    counts = [(w.bytes, w.matrix, w.vector, w.exps) for w in works]
    return Work(*map(sum, zip(*counts, strict=True)))


@dataclass(frozen=True)
class Cost:
    """forward, backward: what has to be done one after the other. The same for every provider, so
    that ratios of throughput are ratios of time."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]

    @property
    def fwd_bytes(self) -> float:
        return total(self.forward).bytes

    def of(self, mode: str) -> tuple[Work, ...]:
        """The works of one call in this mode."""
        passes = {"bwd": self.backward, "step": self.forward + self.backward}
        return passes.get(mode, self.forward)


@dataclass(frozen=True)
class Limits:
    """What a device can do: bytes per second, FLOPs per second in matrix products by dtype name
    ("fp32" is also the rate of all other arithmetic, which every provider does in fp32), and
    exponentials per second, None where nobody knows."""

    bandwidth: float
    peak: dict[str, float]
    exps: float | None = None

    @classmethod
    def read(cls, limits: Mapping[str, Any]) -> Limits:
        """From the "limits" of an `env.json` or a `calibration.json`."""
        return cls(limits["bandwidth"], dict(limits["peak"]), limits.get("exps"))

    def times(self, work: Work, dtype: str) -> dict[str, float]:
        """Seconds that each unit is busy, by the name of what it does. Raises ValueError naming the
        dtype if its peak is not known."""
        for name in {dtype, "fp32"} - set(self.peak):
            raise ValueError(
                f"dtype must be among {', '.join(self.peak)}, whose peaks are known; got {name!r}"
            )
        return {
            "bytes": work.bytes / self.bandwidth,
            "matrix FLOPs": work.matrix / self.peak[dtype],
            "other FLOPs": work.vector / self.peak["fp32"],
            "exps": work.exps / self.exps if self.exps is not None else 0.0,
        }

    def floor(self, works: Iterable[Work], dtype: str) -> float:
        """Seconds that calls one after the other take at least."""
        return sum(max(self.times(work, dtype).values()) for work in works)

    def bound(self, works: Iterable[Work], dtype: str) -> str:
        """What most of the floor is spent on: a key of `times`."""
        spent: Counter[str] = Counter()
        for work in works:
            times = self.times(work, dtype)
            longest = max(times, key=times.__getitem__)
            spent[longest] += times[longest]
        return spent.most_common(1)[0][0]

"""How long calls take: providers interleaved round by round, quantiles instead of means.

On a CPU by wall clock. On a GPU by CUDA events, over rotating input sets that together exceed the
L2 cache three times, either around replays of one CUDA graph (no cost of launching) or around
single calls. Inputs are random or real data; zeros would let a GPU clock higher than it can.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

MODES = ("fwd", "fwd_train", "bwd", "step")
NOISY = 0.10
GRAPH_CALLS = 8
SETTLE_MS = 200
SLOW_ROUND = 6.0
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Quantiles in microseconds over n samples; method is "wall", "events" or "graph".

    cpu_us: median CPU time of all threads of this process, with "wall" only.
    """

    p20_us: float
    p50_us: float
    p80_us: float
    min_us: float
    n: int
    method: str
    cpu_us: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether the p20 to p80 band is wider than 10 % of the median."""
        return self.p80_us - self.p20_us > NOISY * self.p50_us

    @classmethod
    def of(cls, seconds: Sequence[float], method: str) -> Timing:
        us = sorted(1e6 * s for s in seconds)
        if len(us) == 1:
            return cls(us[0], us[0], us[0], us[0], 1, method)
        cuts = statistics.quantiles(us, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(us), cuts[7], us[0], len(us), method)


def call_in_mode(
    forward: Callable[[], tuple[Tensor, ...]], leaves: Sequence[Tensor], mode: str, seed: int = 0
) -> Call:
    """What is timed in a mode, from a forward computation and the leaves of its graph.

    "fwd" records no graph, "fwd_train" does, "bwd" is the backward of a graph built here and kept,
    "step" is both. Cotangents are random normal; a scalar gets 1. Gradients are returned, not
    accumulated.
    """
    if mode == "fwd":

        def inference() -> Any:
            with torch.no_grad():
                return forward()

        return inference
    if mode == "fwd_train":
        return forward
    graph = forward()
    cotangents = [cotangent(x, seed + i) if x.requires_grad else None for i, x in enumerate(graph)]

    def backward(outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        pairs = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if g is not None]
        return torch.autograd.grad(
            [x for x, _ in pairs], leaves, [g for _, g in pairs], retain_graph=keep
        )

    if mode == "bwd":
        return lambda: backward(graph, keep=True)
    if mode == "step":
        del graph
        return lambda: backward(forward())
    raise ValueError(f"mode must be one of fwd, fwd_train, bwd, step; got {mode!r}")


def cotangent(x: Tensor, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient to send into output x: random normal, or 1 for a scalar.

    dtype: what the values are rounded to first, so that an oracle gets those of the tested dtype.
    """
    if x.dim() == 0:
        return torch.ones_like(x)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(x.shape, generator=generator)
    return values.to(dtype or x.dtype).to(x.device, x.dtype)


def measure_cpu(
    calls: Mapping[str, Call], *, seconds: float, rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Wall-clock time of every call, already warm; seconds and rounds as in `Suite`.

    One round calls everybody once, and each starts with another, so that drift hits all alike. Two
    rounds have to do where one takes more than SLOW_ROUND seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    started = perf_counter()
    for i in range(rounds[1]):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            cpu, begin = process_time(), perf_counter()
            result = calls[name]()
            samples[name].append(perf_counter() - begin)
            used[name].append(process_time() - cpu)
            del result
        elapsed = perf_counter() - started
        least = rounds[0] if elapsed < (i + 1) * SLOW_ROUND else 2
        if i + 1 >= least and elapsed > seconds:
            break
    return {
        name: replace(Timing.of(times, "wall"), cpu_us=1e6 * statistics.median(used[name]))
        for name, times in samples.items()
    }


def input_sets(bytes_per_set: float, device: torch.device) -> int:
    """How many copies of the inputs a GPU needs so that they exceed L2 three times over."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = int(3 * l2 // max(bytes_per_set, 1)) + 1
    return max(1, min(wanted, int(free // 4 // max(bytes_per_set, 1)), 64))


def measure_cuda(
    calls: Mapping[str, Sequence[Call]],
    *,
    seconds: float,
    rounds: tuple[int, int],
    graph: bool,
) -> dict[str, Timing]:
    """Device time per call by events, already warm; one call per rotating input set.

    With graph every provider's calls are captured once and replayed; else a write over L2 and a
    queued filler come before each single call, so that the stream never waits for the host unless
    launching takes longer than the work. Must run on the stream the calls were warmed up on.
    """
    device = torch.cuda.current_device()
    units = {
        name: [captured(sets)] if graph else [_single(call) for call in sets]
        for name, sets in calls.items()
    }
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4)
    flush = flush.to("cuda")
    _settle()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    started = perf_counter()
    for i in range(rounds[1]):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            unit, number = units[name][i % len(units[name])]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not graph:
                flush.zero_()
                torch.cuda._sleep(1_000_000)
            begin.record()
            unit()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1e3 / number)
        if i + 1 >= rounds[0] and perf_counter() - started > seconds:
            break
    method = "graph" if graph else "events"
    return {name: Timing.of(times, method) for name, times in samples.items()}


def _single(call: Call) -> tuple[Call, int]:
    return call, 1


def captured(sets: Sequence[Call]) -> tuple[Call, int]:
    """All sets, several times if they are few, as one CUDA graph; and how many calls that is."""
    repeats = max(1, GRAPH_CALLS // len(sets))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            for call in sets:
                call()
    return graph.replay, repeats * len(sets)


def _settle() -> None:
    """Matrix products for 200 ms, until the clocks are where load puts them."""
    # Drawn on the host: after a capture that failed, the GPU's generator may refuse.
    x = torch.randn(4096, 4096).to("cuda", torch.bfloat16)
    until = perf_counter() + SETTLE_MS / 1e3
    while perf_counter() < until:
        x @ x
        torch.cuda.synchronize()


def host_us(call: Call, repeats: int = 10) -> float:
    """Microseconds the host needs to enqueue one call on a GPU, the median of repeats."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = perf_counter()
        call()
        times.append(1e6 * (perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)

"""How long calls take, providers interleaved round by round; and how much memory, which counts
allocations and not what the process happens to occupy.

On a CPU by wall clock. On a GPU by CUDA events, over rotating input sets that together exceed the
L2 cache three times, either around replays of one CUDA graph (no cost of launching) or around
single calls. Inputs are random or real data; zeros would let a GPU clock higher than it can.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases.common.data import random_normal

GRAPH_CALLS = 8
SETTLE_SECONDS = 0.05
FILLER_CYCLES = 1_000_000
SLOW_ROUND = 6.0
FEWEST, WIDEST = 3, 0.5
"""Samples, and band p20 to p80 over the median, of a number that may stand alone."""
MIB = 2**20
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Quantiles in microseconds over n samples; method is "wall", "events" or "graph".

    With "wall" only, cpu_us: median CPU time of all threads of this process; cpu_share: see there.
    """

    p20_us: float
    p50_us: float
    p80_us: float
    min_us: float
    n: int
    method: str
    cpu_us: float | None = None
    cpu_share: float | None = None

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
        return torch.no_grad()(forward)
    if mode == "fwd_train":
        return forward
    graph = forward()
    cotangents = {i: cotangent(x, seed + i) for i, x in enumerate(graph) if x.requires_grad}

    def backward(outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        differentiable = [outputs[i] for i in cotangents]
        return torch.autograd.grad(
            differentiable, leaves, list(cotangents.values()), retain_graph=keep
        )

    if mode == "bwd":
        return partial(backward, graph, keep=True)
    del graph
    return lambda: backward(forward())


def cotangent(x: Tensor, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient that is sent into output x: random normal, or 1 for a scalar.

    dtype: what the values are rounded to first, so that an oracle gets those of the tested dtype.
    """
    if x.dim() == 0:
        return torch.ones_like(x)
    return random_normal(x.shape, dtype or x.dtype, seed=seed, device=x.device).to(x.dtype)


def in_turn(
    names: Sequence[str], seconds: float, rounds: tuple[int, int]
) -> Iterator[tuple[int, str]]:
    """(round, name) as long as `Suite` says: a round has everybody once, and each starts with
    another, so that drift hits all alike. FEWEST have to do where one takes more than SLOW_ROUND
    seconds."""
    started = perf_counter()
    for i in range(rounds[1]):
        first = i % len(names)
        yield from ((i, name) for name in (*names[first:], *names[:first]))
        elapsed = perf_counter() - started
        least = rounds[0] if elapsed < (i + 1) * SLOW_ROUND else min(FEWEST, rounds[0])
        if i + 1 >= least and elapsed > seconds:
            return


def measure_cpu(
    calls: Mapping[str, Call], *, seconds: float, rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Wall-clock time of every call, already warm; seconds and rounds as in `Suite`."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used: dict[str, list[float]] = {name: [] for name in calls}
    share = cpu_share()
    for _, name in in_turn(list(calls), seconds, rounds):
        cpu, begin = process_time(), perf_counter()
        result = calls[name]()
        samples[name].append(perf_counter() - begin)
        used[name].append(process_time() - cpu)
        del result
    share = min(share, cpu_share())
    return {
        name: replace(
            Timing.of(times, "wall"), cpu_us=1e6 * statistics.median(used[name]), cpu_share=share
        )
        for name, times in samples.items()
    }


def cpu_share(seconds: float = 0.02) -> float:
    """CPU time over threads times wall time of matrix products that keep all threads busy: about 1
    on a quiet machine, less by what others take. Calls that are timed cannot tell, because many use
    one thread in part."""
    x = torch.ones(256, 256)
    x @ x  # wakes the threads
    cpu, begin = process_time(), perf_counter()
    while perf_counter() - begin < seconds:
        x @ x
    return (process_time() - cpu) / ((perf_counter() - begin) * torch.get_num_threads())


def input_sets(bytes_per_set: float, device: torch.device) -> int:
    """How many copies of the inputs a GPU needs so that they exceed L2 three times over."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = int(3 * l2 // max(bytes_per_set, 1)) + 1
    return max(1, min(wanted, int(free // 4 // max(bytes_per_set, 1)), 64))


def measure_gpu(
    units: Mapping[str, Sequence[tuple[Call, int]]],
    method: str,
    *,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[str, Timing]:
    """Device time per call by CUDA events, already warm and on the stream of the warm-up.

    units: name -> (unit, how many calls that is), taken in turn: with method "graph" replays, with
    "events" single calls, before each of which L2 is written over.
    """
    device = torch.cuda.current_device()
    _settle(device)
    samples: dict[str, list[float]] = {name: [] for name in units}
    for i, name in in_turn(list(units), seconds, rounds):
        unit, number = units[name][i % len(units[name])]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if method == "events":
            _flush_buffer(device).zero_()
        # The first event would fire on an idle stream, and the launch would count.
        torch.cuda._sleep(FILLER_CYCLES)
        begin.record()
        unit()
        end.record()
        end.synchronize()
        samples[name].append(begin.elapsed_time(end) / 1e3 / number)
    return {name: Timing.of(times, method) for name, times in samples.items()}


def captured(sets: Sequence[Call]) -> tuple[Call, int]:
    """All sets, several times if they are few, as one CUDA graph; and how many calls that is.

    After a capture that failed no other may be tried in this process: PyTorch's allocator can keep
    the broken one for under way.
    """
    repeats = max(1, GRAPH_CALLS // len(sets))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                for call in sets:
                    call()
    except Exception as error:
        # Ending a broken capture fails, too, and says less than what broke it.
        raise error.__context__ or error from None
    return graph.replay, repeats * len(sets)


@cache
def _flush_buffer(device: int) -> Tensor:
    """Twice the size of L2."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")


@cache
def _load(device: int) -> Tensor:
    return torch.randn(4096, 4096, device=f"cuda:{device}", dtype=torch.bfloat16)


def _settle(device: int) -> None:
    """Matrix products until the clocks are where load puts them."""
    x, started = _load(device), perf_counter()
    while perf_counter() - started < SETTLE_SECONDS:
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


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """(peak bytes allocated during the call above the state before it, what the call returned).

    Outputs count while they are held. On a GPU by the statistics of the caching allocator, on the
    CPU by replaying every allocation and release that PyTorch reports to its profiler, which also
    sees the scratch memory inside operators, but not the release of what was there before. Both
    are exact and neither is the resident set.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # negative of a release
        peak = max(peak, held)
    return peak, result


def saved_bytes(
    forward: Callable[[], tuple[Tensor, ...]], ignored: Iterable[Tensor] = ()
) -> tuple[int, tuple[Tensor, ...]]:
    """(bytes kept for the backward, what forward returned): the storages reached by saved tensors,
    each once, without those of the ignored tensors (parameters and inputs, which exist anyway)."""
    known = {x.untyped_storage().data_ptr() for x in ignored}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = forward()
    total = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in known)
    return total, outputs

"""From options to records: build, check, measure, and never stop at one failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter

import torch

from benchmarks import memory, parity, timing
from benchmarks.cost import Limits, Work, total
from benchmarks.record import Record
from benchmarks.registry import (
    DTYPES,
    PROVIDERS,
    SUITES,
    Op,
    Problem,
    Shape,
    Suite,
    Unsupported,
    operations,
    unavailable,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run: names of `registry`, empty for the suite's own choice.

    method: "graph" or "events", how a GPU is timed.
    """

    suite: str = "quick"
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    device: str = "cpu"
    method: str = "graph"
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype, in all its modes."""

    op: Op
    shape: Shape
    dtype: str
    modes: tuple[str, ...]
    providers: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.op.name} {self.shape.label} {self.dtype}"


@dataclass
class Phases:
    """Seconds spent per kind of work, in the order in which they first happened."""

    seconds: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - started


def plan(options: Options) -> list[Case]:
    """All cases of a run. Raises ValueError on a name that does not exist."""
    suite = SUITES[options.suite]
    chosen = _pick("op", options.ops, suite.ops or tuple(operations()), tuple(operations()))
    dtypes = _pick("dtype", options.dtypes, suite.dtypes, tuple(DTYPES))
    modes = _pick("mode", options.modes, suite.modes, timing.MODES)
    wanted = _pick("provider", options.providers, suite.providers, tuple(PROVIDERS))
    return [
        Case(
            op,
            shape,
            dtype,
            tuple(m for m in modes if m in op.modes),
            # What the suite would try everywhere is left out silently, what was asked for is not.
            tuple(p for p in wanted if options.providers or p in op.providers),
        )
        for name in chosen
        for op in [operations()[name]]
        for shape in suite.shapes(op)
        for dtype in dtypes
        if any(m in op.modes for m in modes)
    ]


def _pick(
    what: str, wanted: tuple[str, ...], default: tuple[str, ...], allowed: tuple[str, ...]
) -> tuple[str, ...]:
    if unknown := [name for name in wanted if name not in allowed]:
        raise ValueError(f"--{what} must be among {', '.join(allowed)}; got {unknown[0]!r}")
    return wanted or default


class Runner:
    """Runs cases one by one; see `Options`. limits: of the device, for the roofline."""

    def __init__(
        self,
        options: Options,
        limits: Limits | None = None,
        phases: Phases | None = None,
        suite: Suite | None = None,
    ) -> None:
        self.options = options
        self.suite = suite or SUITES[options.suite]
        self.device = torch.device(options.device)
        self.limits = limits
        self.phases = phases or Phases()

    def run(self, case: Case, progress: Progress = lambda text: None) -> list[Record]:
        """One record per provider and mode; failures become records with status and reason."""
        rows = {(p, m): self._row(case, p, m) for m in case.modes for p in case.providers}

        def fail(providers: Sequence[str], error: BaseException | str) -> None:
            status, reason = _explained(error)
            for (provider, _), row in rows.items():
                if provider in providers and row.status == "ok":
                    row.status, row.reason = status, reason

        for provider in case.providers:
            if reason := unavailable(case.op, provider, self.device):
                fail([provider], Unsupported(reason))
        if "compile" in case.providers:
            # The compiler gives up after a few shapes of one function unless it forgets them.
            torch._dynamo.reset()
        with self._stream():
            try:
                progress(f"{case.label}: inputs and oracle")
                with self.phases.phase("inputs"):
                    problem = self._build(case, self.options.seed)
                with self.phases.phase("oracle"):
                    own = case.dtype == "fp32" and "reference" in case.providers
                    gate = parity.Gate(problem, self.options.seed, fp32_reference=own)
            except Exception as error:
                fail(case.providers, error)
                return self._finished(rows)
            for provider in sorted(case.providers, key=lambda name: name != "reference"):
                if rows[provider, case.modes[0]].status != "ok":
                    continue
                progress(f"{case.label}: parity of {provider}")
                try:
                    with self.phases.phase("parity and memory"):
                        self._probe(problem, gate, provider, case, rows)
                except Exception as error:
                    fail([provider], error)
            del gate
            for mode in case.modes:
                correct = [p for p in case.providers if rows[p, mode].status == "ok"]
                progress(f"{case.label}: {mode}")
                with self.phases.phase("timing"):
                    self._time(case, mode, problem, {p: rows[p, mode] for p in correct}, fail)
        return self._finished(rows)

    def _row(self, case: Case, provider: str, mode: str) -> Record:
        name = self.options.suite
        return Record(name, case.op.name, asdict(case.shape), mode, provider, case.dtype)

    def _finished(self, rows: dict[tuple[str, str], Record]) -> list[Record]:
        return [
            replace(_blank(row), reason=row.reason) if row.status != "ok" else row
            for row in rows.values()
        ]

    def _build(self, case: Case, seed: int) -> Problem:
        return case.op.build(case.shape, DTYPES[case.dtype], self.device, seed)

    def _stream(self) -> AbstractContextManager[object]:
        # A backward runs where its forward ran, and a graph cannot be captured on the default one.
        if self.device.type == "cuda":
            return torch.cuda.stream(torch.cuda.Stream(self.device))
        return nullcontext()

    def _probe(
        self,
        problem: Problem,
        gate: parity.Gate,
        provider: str,
        case: Case,
        rows: dict[tuple[str, str], Record],
    ) -> None:
        """The first call: results for the gate, memory, compilation and warm-up at once."""
        forward = problem.calls[provider]
        leaves = list(problem.leaves.values())
        saved: list[int] = []

        def step() -> parity.Result:
            with torch.set_grad_enabled(bool(leaves)):
                kept, outputs = memory.saved_bytes(forward, problem.ignored)
            saved.append(kept)
            grads = gate.gradients(outputs, leaves)
            return parity.Result(tuple(x.detach() for x in outputs), grads)

        started = perf_counter()
        step_peak, result = memory.peak_bytes(step, self.device)
        first = perf_counter() - started
        accuracy = gate.check(result)
        del result
        for mode in case.modes:
            row = rows[provider, mode]
            peak = step_peak
            # With gradients the call above was a step, without it was a forward.
            if mode != ("step" if leaves else "fwd"):
                call = timing.call_in_mode(forward, leaves, mode, self.options.seed)
                peak, _ = memory.peak_bytes(call, self.device)
            row.first_call_s = first
            row.peak_mib = peak / memory.MIB
            row.saved_mib = saved[0] / memory.MIB if leaves else None
            row.rms_ratio, row.max_ratio = accuracy.rms_ratio, accuracy.max_ratio
            row.budget = accuracy.budget

    def _time(
        self,
        case: Case,
        mode: str,
        problem: Problem,
        rows: dict[str, Record],
        fail: Callable[[Sequence[str], BaseException | str], None],
    ) -> None:
        if not rows:
            return
        seed, device = self.options.seed, self.device
        cost = case.op.cost(case.shape, DTYPES[case.dtype].itemsize) if case.op.cost else None
        sets = timing.input_sets(cost.fwd_bytes, device) if cost else 1
        problems = [problem, *(self._build(case, seed + 1000 * i) for i in range(1, sets))]
        calls = {}
        for provider in list(rows):
            try:
                calls[provider] = [
                    timing.call_in_mode(p.calls[provider], list(p.leaves.values()), mode, seed)
                    for p in problems
                ]
                if device.type == "cuda":
                    for call in calls[provider]:
                        call()
                    rows[provider].host_us = timing.host_us(calls[provider][0])
            except Exception as error:
                calls.pop(provider, None)
                fail([provider], error)
        try:
            timings = self._measure(calls, problem)
        except Exception as error:
            fail(list(calls), error)
            return
        for provider, measured in timings.items():
            self._fill(rows[provider], measured, cost.of(mode) if cost else None)

    def _measure(
        self, calls: dict[str, list[timing.Call]], problem: Problem
    ) -> dict[str, timing.Timing]:
        seconds, rounds = self.suite.seconds, self.suite.rounds
        if self.device.type != "cuda":
            single = {provider: sets[0] for provider, sets in calls.items()}
            return timing.measure_cpu(single, seconds=seconds, rounds=rounds)
        # One method for all providers of a case: a replay hides launches that events show.
        graph = self.options.method == "graph" and not problem.synchronising & set(calls)
        if graph:
            try:
                return timing.measure_cuda(calls, seconds=seconds, rounds=rounds, graph=True)
            except RuntimeError:
                torch.cuda.synchronize()
        return timing.measure_cuda(calls, seconds=seconds, rounds=rounds, graph=False)

    def _fill(self, row: Record, measured: timing.Timing, works: Sequence[Work] | None) -> None:
        row.method, row.n, row.noisy = measured.method, measured.n, measured.noisy
        row.p20_us, row.p50_us, row.p80_us = measured.p20_us, measured.p50_us, measured.p80_us
        row.min_us, row.cpu_us = measured.min_us, measured.cpu_us
        if works is None:
            return
        seconds, work = measured.p50_us / 1e6, total(works)
        row.gbps, row.tflops = work.bytes / seconds / 1e9, work.flops / seconds / 1e12
        if self.limits is not None:
            row.roofline_pct = 100 * self.limits.floor(works, row.dtype) / seconds


def _blank(row: Record) -> Record:
    return Record(row.suite, row.op, row.case, row.mode, row.provider, row.dtype, status=row.status)


def _explained(error: BaseException | str) -> tuple[str, str]:
    """(status, reason): the first line of the message, which names no files."""
    if isinstance(error, str):
        return "error", error
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, Unsupported):
        return "unsupported", reason
    if isinstance(error, AssertionError):
        return "incorrect", reason
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return "oom", "out of memory"
    return "error", f"{type(error).__name__}: {reason}"

"""From cases to records: build, check, measure, and never stop at one failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks import memory, parity, timing
from benchmarks.cost import Limits, total
from benchmarks.plan import Case, Options, plan
from benchmarks.providers import configured
from benchmarks.record import Record
from benchmarks.registry import (
    COMPILED,
    DTYPES,
    SUITES,
    Problem,
    Suite,
    Unsupported,
    unavailable,
)

__all__ = ["Case", "Options", "Phases", "Prepared", "Runner", "plan"]

Progress = Callable[[str], None]
Forward = Callable[[], tuple[Tensor, ...]]


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


class Prepared:
    """A case made concrete: inputs, oracle, and one record per provider and mode.

    rows: the records; whose status is not "ok" is out. problem: None if nothing could be built.
    """

    def __init__(self, runner: Runner, case: Case, progress: Progress) -> None:
        self.runner = runner
        self.case = case
        self.progress = progress
        self.problem: Problem | None = None
        self.gate: parity.Gate | None = None
        self.checked: set[str] = set()
        options = runner.options
        self.rows = {
            (p, m): Record(options.suite, case.op.name, asdict(case.shape), m, p, case.dtype)
            for m in case.modes
            for p in case.providers
        }
        for provider in case.providers:
            try:
                if reason := unavailable(case.op, provider, runner.device, case.dtype):
                    raise Unsupported(reason)
            except Exception as error:
                self.fail([provider], error)
        if COMPILED.keys() & set(case.providers) or "flex" in case.providers:
            # The compiler gives up after a few shapes of one function unless it forgets them.
            torch._dynamo.reset()
            # A backward that is called again and again must not reuse what its forward has kept.
            torch._functorch.config.donated_buffer = "bwd" not in case.modes
        progress(f"{case.label}: inputs and oracle")
        try:
            if reason := case.op.refuses(case.shape):
                raise Unsupported(reason)
            with runner.phases.phase("inputs"):
                self.problem = self._build(options.seed)
            with runner.phases.phase("oracle"):
                own = case.dtype == "fp32" and "reference" in case.providers
                self.gate = parity.Gate(self.problem, options.seed, fp32_reference=own)
        except Exception as error:
            self.fail(case.providers, error, "inputs or oracle: ")

    def fail(
        self, providers: Iterable[str], error: BaseException, what: str = "", mode: str = ""
    ) -> None:
        """These providers get no numbers, and the reason why; what: failed, if it was not they;
        mode: in this one alone."""
        status, reason = _explained(error)
        if status != "unsupported":
            reason = what + reason
        for (provider, own), row in self.rows.items():
            if provider in providers and mode in ("", own) and row.status == "ok":
                row.status, row.reason = status, reason

    def ok(self, provider: str) -> bool:
        return any(self.rows[provider, mode].status == "ok" for mode in self.case.modes)

    def check(self, provider: str) -> None:
        """Parity and memory of a provider, once; one that is wrong or fails is out."""
        if provider in self.checked or not self.ok(provider):
            return
        self.checked.add(provider)
        self.progress(f"{self.case.label}: parity of {provider}")
        try:
            with self.runner.phases.phase("parity and memory"):
                self._probe(provider)
        except Exception as error:
            self.fail([provider], error)

    def calls(self, mode: str, providers: Iterable[str]) -> dict[str, list[timing.Call]]:
        """What is timed: per provider one call per rotating set of inputs, warm on a GPU."""
        case, seed, device = self.case, self.runner.options.seed, self.runner.device
        assert self.problem is not None
        cost = case.op.cost(case.shape, DTYPES[case.dtype].itemsize) if case.op.cost else None
        sets = timing.input_sets(cost.fwd_bytes, device) if cost else 1
        problems = [self.problem, *(self._build(seed + 1000 * i) for i in range(1, sets))]
        calls = {}
        for provider in providers:
            try:
                with configured(provider):
                    made = [
                        timing.call_in_mode(p.calls[provider], list(p.leaves.values()), mode, seed)
                        for p in problems
                    ]
                calls[provider] = [_configured(provider, call) for call in made]
                if device.type == "cuda":
                    for call in calls[provider]:
                        call()
                    self.rows[provider, mode].host_us = timing.host_us(calls[provider][0])
            except Exception as error:
                calls.pop(provider, None)
                self.fail([provider], error)
        return calls

    def time(self, mode: str) -> None:
        """Times of all providers that are still in, in turn."""
        correct = [p for p in self.case.providers if self.rows[p, mode].status == "ok"]
        if not correct:
            return
        self.progress(f"{self.case.label}: {mode}")
        with self.runner.phases.phase("timing"):
            try:
                calls = self.calls(mode, correct)
                correct = list(calls)
                timings = self.measure(calls)
            except Exception as error:
                self.fail(correct, error)
                return
        for provider, measured in timings.items():
            self.fill(provider, mode, measured)

    def measure(self, calls: dict[str, list[timing.Call]]) -> dict[str, timing.Timing]:
        """Times of what `calls` returned."""
        assert self.problem is not None
        return self.runner._measure(calls, self.problem)

    def fill(self, provider: str, mode: str, measured: timing.Timing) -> None:
        """The record gets its times, and what follows from them."""
        row, case, limits = self.rows[provider, mode], self.case, self.runner.limits
        row.method, row.n, row.noisy = measured.method, measured.n, measured.noisy
        row.p20_us, row.p50_us, row.p80_us = measured.p20_us, measured.p50_us, measured.p80_us
        row.min_us, row.cpu_us = measured.min_us, measured.cpu_us
        if case.op.cost is None:
            return
        works = case.op.cost(case.shape, DTYPES[case.dtype].itemsize).of(mode)
        work, seconds = total(works), measured.p50_us / 1e6
        row.gbps, row.tflops = work.bytes / seconds / 1e9, work.flops / seconds / 1e12
        if limits is not None:
            row.roofline_pct = 100 * limits.floor(works, row.dtype) / seconds

    def record(self, provider: str, mode: str) -> Record:
        """The record; without status "ok" there are no numbers in it."""
        row = self.rows[provider, mode]
        if row.status == "ok":
            return row
        names = ("suite", "op", "case", "mode", "provider", "dtype", "status", "reason")
        return Record(**{name: getattr(row, name) for name in names})

    def _build(self, seed: int) -> Problem:
        case = self.case
        return case.op.build(case.shape, DTYPES[case.dtype], self.runner.device, seed)

    def _probe(self, provider: str) -> None:
        """The first call: results for the gate, memory, compilation and warm-up at once."""
        problem, gate, device = self.problem, self.gate, self.runner.device
        assert problem is not None
        assert gate is not None
        forward = problem.calls[provider]
        leaves = list(problem.leaves.values())
        saved: list[int] = []

        def step() -> parity.Result:
            with torch.set_grad_enabled(bool(leaves)):
                kept, outputs = memory.saved_bytes(forward, problem.ignored)
            saved.append(kept)
            grads = gate.gradients(outputs, leaves)
            return parity.Result(tuple(x.detach() for x in outputs), grads)

        with configured(provider):
            started = perf_counter()
            with self._launches(provider) as launches:
                step_peak, result = memory.peak_bytes(step, device)
            first = perf_counter() - started
            accuracy = gate.check(result)
            del result
            if self._compiles:
                step_peak, _ = memory.peak_bytes(step, device)
            peaks = {"step" if leaves else "fwd": step_peak}
            for mode in self.case.modes:
                if mode not in peaks:
                    try:
                        peaks[mode] = self._peak(forward, leaves, mode)
                    except Exception as error:
                        self.fail([provider], error, mode=mode)
        for mode in self.case.modes:
            if mode not in peaks:
                continue
            row, peak = self.rows[provider, mode], peaks[mode]
            row.first_call_s = first
            row.peak_mib = peak / memory.MIB
            row.saved_mib = saved[0] / memory.MIB if leaves else None
            row.rms_ratio, row.max_ratio = accuracy.rms_ratio, accuracy.max_ratio
            row.budget = accuracy.budget
            row.config = "; ".join(launches)

    @property
    def _compiles(self) -> bool:
        """Whether a first call needs memory that later ones do not: compilers of a GPU measure
        candidates then, and its libraries make their workspaces."""
        return self.runner.device.type == "cuda"

    def _peak(self, forward: Forward, leaves: Sequence[Tensor], mode: str) -> int:
        call = timing.call_in_mode(forward, leaves, mode, self.runner.options.seed)
        if self._compiles:
            call()
        return memory.peak_bytes(call, self.runner.device)[0]

    def _launches(self, provider: str) -> AbstractContextManager[list[str]]:
        """What our kernels are launched with, for operations that are one of them."""
        if provider not in ("triton", "tuned") or not self.case.op.function:
            return nullcontext([])
        from benchmarks.launches import recorded

        return recorded()


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
        with self.stream():
            prepared = self.prepare(case, progress)
            # The reference may serve as oracle of the others.
            for provider in sorted(case.providers, key=lambda name: name != "reference"):
                prepared.check(provider)
            prepared.gate = None
            for mode in case.modes:
                prepared.time(mode)
        return [prepared.record(provider, mode) for provider, mode in prepared.rows]

    def prepare(self, case: Case, progress: Progress = lambda text: None) -> Prepared:
        """Inputs and oracle of a case; call it, and what follows, inside `stream`."""
        return Prepared(self, case, progress)

    def stream(self) -> AbstractContextManager[object]:
        # A backward runs where its forward ran, and a graph cannot be captured on the default one.
        if self.device.type == "cuda":
            return torch.cuda.stream(torch.cuda.Stream(self.device))
        return nullcontext()

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


def _configured(provider: str, call: timing.Call) -> timing.Call:
    def run() -> object:
        with configured(provider):
            return call()

    return run if provider in ("triton", "tuned") else call


def _explained(error: BaseException) -> tuple[str, str]:
    """(status, reason): the first line of the message, which names no files."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, Unsupported):
        return "unsupported", reason
    if isinstance(error, AssertionError):
        return "incorrect", reason
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return "oom", "out of memory"
    # Of a file only its name: folders are those of the machine.
    reason = re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", reason)
    return "error", f"{type(error).__name__}: {reason}"

"""From cases to records: build, check, measure, and never stop at one failure."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.cases.common.cost import Limits, total
from benchmarks.cases.common.op import DTYPES, unavailable
from benchmarks.cases.common.problem import Problem, Unsupported
from benchmarks.measure import launches, memory, parity, timing
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import UNTIMED, Record
from benchmarks.measure.resume import Again, Journal, is_sticky
from benchmarks.measure.suites import SUITES, Suite
from benchmarks.providers.provider import COMPILED, configured

Progress = Callable[[str], None]
Timings = dict[str, dict[str, timing.Timing]]
"""Method -> provider -> its times."""


class Prepared:
    """A case made concrete: inputs, oracle, and one record per provider and mode.

    rows: the records; those with another status than "ok" are skipped from here on. problem: None
    if nothing could be built.
    """

    def __init__(self, runner: Runner, case: Case, progress: Progress) -> None:
        self.runner = runner
        self.case = case
        self.progress = progress
        self.problem: Problem | None = None
        self.gate: parity.Gate | None = None
        self.checked: set[str] = set()
        self.cotangents: dict[Any, Tensor] = {}
        options = runner.options
        self.rows = {(row.provider, row.mode): row for row in case.records(options.suite)}
        for provider in case.providers:
            try:
                if reason := unavailable(case.op, provider, runner.device, case.dtype):
                    raise Unsupported(reason)
                for who in (provider, "") if runner.journal else ():
                    if reason := runner.journal.refused(case.label, who):
                        raise RuntimeError(reason)
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
            if any(map(self.ok, case.providers)):
                with self._attempt():
                    with runner.phase("inputs"):
                        self.problem = self._build(options.seed)
                    with runner.phase("oracle"):
                        own = case.dtype == "fp32" and "reference" in case.providers
                        self.gate = parity.Gate(
                            self.problem,
                            options.seed,
                            backward=any(mode != "fwd" for mode in case.modes),
                            fp32_reference=own,
                        )
        except Exception as error:
            self._again_if_sticky(error)
            self.fail(case.providers, error, "inputs or oracle: ")

    def fail(
        self, providers: Iterable[str], error: BaseException, what: str = "", mode: str = ""
    ) -> None:
        """These providers get no numbers, and the reason why; what: failed, if it was not they;
        mode: in this one alone."""
        status, reason = _explained(error)
        if status != "unsupported":
            reason = what + reason
        if status == "error" and self.runner.journal:
            traceback.print_exception(error)  # the record has its first line only
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
            with self.runner.phase("parity and memory"), self._attempt(provider):
                self._probe(provider)
        except Exception as error:
            self.fail([provider], error)
            self._again_if_sticky(error)

    @cached_property
    def problems(self) -> list[Problem]:
        """The rotating sets of inputs: the one that was checked, and on a GPU more."""
        case, seed = self.case, self.runner.options.seed
        assert self.problem is not None
        cost = launches.cost_of(case.op, case.shape, DTYPES[case.dtype].itemsize)
        sets = timing.input_sets(cost.fwd_bytes, self.runner.device)
        return [self.problem, *(self._build(seed + 1000 * i) for i in range(1, sets))]

    def calls(self, mode: str, providers: Iterable[str]) -> dict[str, list[timing.Call]]:
        """What is timed: per provider one call per rotating set of inputs, warm on a GPU."""
        seed = self.runner.options.seed
        calls = {}
        for provider in providers:
            try:
                with self._attempt(provider), configured(provider):
                    made = [
                        timing.call_in_mode(
                            p.calls[provider], list(p.leaves.values()), mode, seed, self.cotangents
                        )
                        for p in self.problems
                    ]
                    calls[provider] = [_configured(provider, call) for call in made]
                    if self.runner.device.type == "cuda":
                        for call in calls[provider]:
                            call()
                        host_us = timing.host_us(calls[provider][0])
                        self.rows[provider, mode].host_us = host_us
            except Exception as error:
                calls.pop(provider, None)
                self.fail([provider], error)
                self._again_if_sticky(error)
        return calls

    def graphs(
        self, mode: str, calls: Mapping[str, list[timing.Call]]
    ) -> dict[str, tuple[timing.Call, int]]:
        """CUDA graphs of who can be captured; the records of the others say why they cannot.

        After a capture that failed a run ends (`Again`), because in its process every other would
        fail too; without a journal to go on from, it fails and is on record like the first.
        """
        runner = self.runner
        if runner.device.type != "cuda" or runner.options.method != "graph":
            return {}
        assert self.problem is not None
        found = {}
        for provider, sets in calls.items():
            row = self.rows[provider, mode]
            who = self.case.label, provider, mode
            if provider in self.problem.synchronising:
                row.uncaptured = "it waits for the device"
            elif runner.journal:
                row.uncaptured = runner.journal.uncaptured.get(who, "")
            if row.uncaptured:
                continue
            try:
                with self._attempt(provider):
                    found[provider] = timing.captured(sets)
            except Exception as error:
                if is_sticky(str(error)):
                    self.fail([provider], error)
                    self._again_if_sticky(error)
                row.uncaptured = _explained(error)[1]
                if runner.journal:
                    runner.journal.capture_failed(*who, row.uncaptured)
                    raise Again(f"{' '.join(who)}: no graph: {row.uncaptured}") from error
        return found

    def time(self, mode: str) -> None:
        """Times of all providers that are still in, in turn."""
        correct = [p for p in self.case.providers if self.rows[p, mode].status == "ok"]
        if not correct:
            return
        self.progress(f"{self.case.label}: {mode}")
        with self.runner.phase("timing"):
            try:
                calls = self.calls(mode, correct)
                correct = list(calls)
                if not calls:
                    return
                timings = self.measure(mode, calls)
            except Again:
                raise
            except Exception as error:
                self._again_if_sticky(error)
                self.fail(correct, error)
                return
        self.fill(mode, timings)

    def measure(self, mode: str, calls: dict[str, list[timing.Call]]) -> Timings:
        """Times of what `calls` returned."""
        both = self.case.op.scope != "operation"
        graphs = self.graphs(mode, calls)
        with self._attempt():
            return self.runner._measure(calls, graphs, both)

    def fill(self, mode: str, timings: Timings) -> None:
        """The records get their times, and what follows from them."""
        names = {name for measured in timings.values() for name in measured}
        # One method for all of a case: a replay hides launches that events show.
        common = next(method for method, found in timings.items() if found.keys() == names)
        for name in names:
            self._fill(name, mode, timings[common][name])
            row = self.rows[name, mode]
            row.graph_us, row.events_us = (
                timings[method][name].p50_us if name in timings.get(method, {}) else None
                for method in ("graph", "events")
            )

    def _fill(self, provider: str, mode: str, measured: timing.Timing) -> None:
        row, case, limits = self.rows[provider, mode], self.case, self.runner.limits
        for name, value in asdict(measured).items():
            setattr(row, name, value)
        row.noisy = measured.noisy
        works = launches.cost_of(case.op, case.shape, DTYPES[case.dtype].itemsize).of(mode)
        work, seconds = total(works), measured.p50_us / 1e6
        row.gbps, row.tflops = work.bytes / seconds / 1e9, work.flops / seconds / 1e12
        if limits is not None:
            row.roofline_pct = 100 * limits.floor(works, row.dtype) / seconds

    def record(self, provider: str, mode: str) -> Record:
        """The record; without status "ok" there are no numbers in it."""
        row = self.rows[provider, mode]
        if row.final and row.status == "ok":
            return row
        if row.status == "ok":
            return replace(row, reason=UNTIMED)
        names = ("suite", "op", "case", "mode", "provider", "dtype", "status", "reason")
        return Record(**{name: getattr(row, name) for name in names})

    def records(self, provider: str = "", mode: str = "") -> list[Record]:
        """Those of a provider, or in a mode, or all."""
        return [self.record(p, m) for p, m in self.rows if provider in ("", p) and mode in ("", m)]

    def _again_if_sticky(self, error: Exception) -> None:
        """What nobody survives is no fault of those that come after it: another process asks them.
        Without a journal to go on from they fail."""
        if self.runner.journal and is_sticky(str(error)):
            raise Again(_explained(error)[1]) from error

    def _attempt(self, provider: str = "") -> AbstractContextManager[None]:
        journal = self.runner.journal
        return journal.attempt(self.case.label, provider) if journal else nullcontext()

    def _build(self, seed: int) -> Problem:
        case = self.case
        return case.op.build(case.shape, DTYPES[case.dtype], self.runner.device, seed)

    def _probe(self, provider: str) -> None:
        """The first calls: results for the gate, memory, compilation and warm-up at once.

        What infers is judged by a forward without a graph, what trains by outputs and gradients.
        """
        assert self.problem is not None
        leaves = list(self.problem.leaves.values())
        with configured(provider):
            for training in (False, True):
                modes = [m for m in self.case.modes if (m != "fwd") is training]
                modes = [m for m in modes if self.rows[provider, m].status == "ok"]
                try:
                    if modes:
                        self._first(provider, modes, leaves if training else [])
                except Exception as error:
                    if is_sticky(str(error)):
                        raise
                    for mode in modes:
                        self.fail([provider], error, mode=mode)

    def _first(self, provider: str, modes: Sequence[str], leaves: Sequence[Tensor]) -> None:
        """leaves: what gradients are taken for, none for a forward without a graph."""
        problem, gate, device = self.problem, self.gate, self.runner.device
        assert problem is not None
        assert gate is not None
        forward = problem.calls[provider]
        saved = 0

        def step() -> parity.Result:
            nonlocal saved
            with torch.set_grad_enabled(bool(leaves)):
                saved, outputs = memory.saved_bytes(forward, problem.ignored)
            grads = gate.gradients(outputs, leaves)
            return parity.Result(tuple(x.detach() for x in outputs), grads)

        started = perf_counter()
        step_peak, result = memory.peak_bytes(step, device)
        first = perf_counter() - started
        accuracy = gate.check(result, "outputs")
        if leaves:
            accuracy = accuracy.worse(gate.check(result, "gradients"))
        del result
        # On a GPU a first call needs memory that later ones do not: compilers measure candidates
        # then, and libraries make their workspaces.
        again = device.type == "cuda"
        if again:
            step_peak, _ = memory.peak_bytes(step, device)
        for mode in modes:
            row, peak = self.rows[provider, mode], step_peak
            if mode in ("fwd_train", "bwd"):
                try:
                    call = timing.call_in_mode(forward, leaves, mode, self.runner.options.seed)
                    if again:
                        call()
                    peak, _ = memory.peak_bytes(call, device)
                except Exception as error:
                    if is_sticky(str(error)):
                        raise
                    self.fail([provider], error, mode=mode)
                    continue
            row.first_call_s = first
            row.peak_mib = peak / memory.MIB
            row.saved_mib = saved / memory.MIB if leaves else None
            row.rms_ratio, row.max_ratio, row.budget = astuple(accuracy)


class Runner:
    """Runs cases one by one; see `Options`. limits: of the device, for the roofline. seconds: spent
    per kind of work, in the order in which they first happened."""

    def __init__(
        self,
        options: Options,
        limits: Limits | None = None,
        suite: Suite | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.options = options
        self.suite = suite or SUITES[options.suite]
        self.device = torch.device(options.device)
        self.limits = limits
        self.journal = journal
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around work of this kind."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - started

    def run(
        self,
        case: Case,
        progress: Progress = lambda text: None,
        emit: Callable[[list[Record]], None] = lambda records: None,
    ) -> list[Record]:
        """One record per provider and mode; failures become records with status and reason.

        emit: gets records as they come, those of a provider once it was checked and those of a mode
        once it was timed. Raises `Again` where this process can go no further.
        """
        with self.stream():
            prepared = self.prepare(case, progress)
            try:
                # The reference may serve as oracle of the others.
                for provider in sorted(case.providers, key=lambda name: name != "reference"):
                    prepared.check(provider)
                    emit(prepared.records(provider=provider))
                prepared.gate = None
                for mode in case.modes:
                    prepared.time(mode)
                    emit(prepared.records(mode=mode))
            except Again:
                emit(prepared.records())  # who has failed has done so for good
                raise
        return prepared.records()

    def prepare(self, case: Case, progress: Progress = lambda text: None) -> Prepared:
        """Inputs and oracle of a case; call it, and what follows, inside `stream`."""
        return Prepared(self, case, progress)

    def stream(self) -> AbstractContextManager[object]:
        # A backward runs where its forward ran, and a graph cannot be captured on the default one.
        if self.device.type == "cuda":
            return torch.cuda.stream(torch.cuda.Stream(self.device))
        return nullcontext()

    def _measure(
        self,
        calls: Mapping[str, list[timing.Call]],
        graphs: Mapping[str, tuple[timing.Call, int]],
        both: bool,
    ) -> Timings:
        """By replays where there are graphs; by events where some have none, or both are wanted."""
        how = {"seconds": self.suite.seconds, "rounds": self.suite.rounds}
        if self.device.type != "cuda":
            single = {provider: sets[0] for provider, sets in calls.items()}
            return {"wall": timing.measure_cpu(single, **how)}
        found = {}
        if graphs:
            found["graph"] = timing.measure_graphs(graphs, **how)
        if both or graphs.keys() != calls.keys():
            found["events"] = timing.measure_events(calls, **how)
        return found


def _configured(provider: str, call: timing.Call) -> timing.Call:
    def run() -> object:
        with configured(provider):
            return call()

    return run if provider in ("triton", "tuned") else call


def _explained(error: BaseException) -> tuple[str, str]:
    """(status, reason): the first line of the message, which names no files."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if type(error).__name__ == "CompilationError":
        reason = lines[-1].strip()  # of Triton: the place and the source come first
    if isinstance(error, Unsupported):
        return "unsupported", reason
    if isinstance(error, AssertionError):
        return "incorrect", reason
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return "oom", "out of memory"
    # Of a file only its name: folders are those of the machine.
    reason = re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", reason)
    return "error", f"{type(error).__name__}: {reason}"

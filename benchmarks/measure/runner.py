"""From cases to records: build, check, measure, and never stop at one failure."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property

import torch
import torch._functorch.config

from benchmarks.cases.common.cost import Cost, Limits, total
from benchmarks.cases.common.op import DTYPES, unavailable
from benchmarks.cases.common.problem import Problem, Unsupported
from benchmarks.measure import launches, parity, timing
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import Record, Writer
from benchmarks.measure.resume import Again, is_sticky
from benchmarks.measure.suites import SUITES, Suite
from benchmarks.providers.provider import COMPILED, TUNED, configured

Timings = dict[str, dict[str, timing.Timing]]
"""Method -> provider -> its times."""


class Prepared:
    """A case made concrete: its inputs, and one record per provider and mode in `rows`.

    What has failed, or is known from an earlier process, is final: nothing more is tried with it.
    """

    def __init__(self, runner: Runner, case: Case) -> None:
        self.runner, self.case = runner, case
        self.rows: dict[tuple[str, str], Record] = {}
        for row in case.records(runner.options.suite):
            before = runner.writer.known.get(row.key) if runner.writer else None
            if before and before.final:
                row = before
            elif before:
                row.uncaptured = before.uncaptured
            self.rows[row.provider, row.mode] = row
        for provider in case.providers:
            if rows := self.open(provider):
                with self._attempt(rows):
                    if why := unavailable(case.op, provider, runner.device, case.dtype):
                        raise Unsupported(why)
        if not self.open():
            return
        if COMPILED.keys() & set(case.providers) or "flex" in case.providers:
            # The compiler gives up after a few shapes of one function unless it forgets them.
            torch._dynamo.reset()
            # A backward that is called again and again must not reuse what its forward has kept.
            torch._functorch.config.donated_buffer = "bwd" not in case.modes
        with self._attempt(self.open()):
            if why := case.op.refuses(case.shape):
                raise Unsupported(why)
            seed, backward = runner.options.seed, case.modes != ("fwd",)
            self.problem = self._inputs(seed)
            self.gate: parity.Gate | None = parity.Gate(self.problem, seed, backward=backward)

    def open(self, provider: str = "", mode: str = "") -> list[Record]:
        """Records that are not final: of a provider, or in a mode, or all."""
        return [
            row
            for (own, where), row in self.rows.items()
            if not row.final and provider in ("", own) and mode in ("", where)
        ]

    @contextmanager
    def _attempt(self, rows: Sequence[Record]) -> Iterator[None]:
        """Where all that fails ends: these records get the reason, and the others go on. After an
        error of the device nobody can in this process (`Again`), and its provider in no other."""
        writer = self.runner.writer
        who = {row.provider for row in rows}
        all_modes = [row for row in self.open() if row.provider in who]
        with writer.attempt(all_modes) if writer else nullcontext():
            try:
                yield
            except Again:
                raise
            except Exception as error:
                status, reason = _explained(error)
                if status == "error":
                    traceback.print_exception(error)  # the record has its first line only
                sticky = is_sticky(str(error))
                for row in all_modes if sticky else rows:
                    row.status, row.reason = status, reason
                if sticky:
                    raise Again(reason) from error

    def _inputs(self, seed: int) -> Problem:
        case = self.case
        return case.op.build(case.shape, DTYPES[case.dtype], self.runner.device, seed)

    def check(self, provider: str) -> None:
        """Parity and memory of a provider, once. What infers is judged by a forward without a
        graph, what trains by outputs and gradients."""
        for training in (False, True):
            rows = [r for r in self.open(provider) if (r.mode != "fwd") == training]
            if rows and rows[0].budget is None:
                with self._attempt(rows), configured(provider):
                    self._first_calls(provider, rows, training)

    def _first_calls(self, provider: str, rows: Iterable[Record], training: bool) -> None:
        problem, gate, device = self.problem, self.gate, self.runner.device
        leaves = list(problem.leaves.values()) if training else []
        saved = 0

        def step() -> parity.Result:
            nonlocal saved
            with torch.set_grad_enabled(training):
                saved, outputs = timing.saved_bytes(problem.calls[provider], problem.ignored)
            return gate.result(outputs, leaves)

        peak, result = timing.peak_bytes(step, device)
        budget = gate.check(result)
        del result
        if device.type == "cuda":
            # A first call needs memory that later ones do not: compilers measure candidates then,
            # and libraries make their workspaces.
            peak, _ = timing.peak_bytes(step, device)
        for row in rows:
            if row.mode in ("fwd", "step"):  # the others are parts of a step
                row.peak_mib = peak / timing.MIB
            row.saved_mib = saved / timing.MIB if training else None
            row.budget = budget

    def _call(self, problem: Problem, row: Record) -> timing.Call:
        leaves = list(problem.leaves.values())
        seed = self.runner.options.seed
        call = timing.call_in_mode(problem.calls[row.provider], leaves, row.mode, seed)

        def run() -> object:
            with configured(row.provider):
                return call()

        tuned = os.environ.get(TUNED) and row.provider in ("triton", "tuned")
        return run if tuned else call

    @cached_property
    def problems(self) -> list[Problem]:
        """The rotating sets of inputs: the one that was checked, and on a GPU more."""
        seed = self.runner.options.seed
        sets = timing.input_sets(self._cost().fwd_bytes, self.runner.device)
        return [self.problem, *(self._inputs(seed + 1000 * i) for i in range(1, sets))]

    def _cost(self) -> Cost:
        return launches.cost_of(self.case.op, self.case.shape, DTYPES[self.case.dtype].itemsize)

    def calls(self, mode: str, providers: Iterable[str]) -> dict[str, list[timing.Call]]:
        """What is timed: of each that is still in, a call per set of inputs, warm on a GPU."""
        calls = {}
        for row in self.open(mode=mode):
            if row.provider in providers:
                with self._attempt([row]), configured(row.provider):
                    made = [self._call(problem, row) for problem in self.problems]
                    if self.runner.device.type == "cuda":
                        for call in made:
                            call()
                        row.host_us = timing.host_us(made[0])
                    calls[row.provider] = made
        return calls

    def time(self, mode: str) -> None:
        """Times of all providers that are still in, in turn."""
        calls = self.calls(mode, self.case.providers)
        graphs = self._graphs(mode, calls)
        if calls:
            with self._attempt([self.rows[provider, mode] for provider in calls]):
                both = self.case.op.scope != "operation" or bool(self.problem.synchronising)
                self._fill(mode, self.runner._measure(calls, graphs, both))

    def _graphs(
        self, mode: str, calls: Mapping[str, list[timing.Call]]
    ) -> dict[str, tuple[timing.Call, int]]:
        """CUDA graphs of who can be captured; the records of the others say why they cannot.

        After a capture that failed every other would fail too: who can go on in another process
        does (`Again`).
        """
        if self.runner.device.type != "cuda" or self.runner.options.method != "graph":
            return {}
        found = {}
        for provider, sets in calls.items():
            row = self.rows[provider, mode]
            if provider in self.problem.synchronising:
                row.uncaptured = "it waits for the device"
            if row.uncaptured:
                continue
            with self._attempt([row]):
                try:
                    found[provider] = timing.captured(sets)
                except Exception as error:
                    # A broken capture is a "CUDA error", too, and none of the device.
                    if is_sticky(str(error)) and "captur" not in str(error):
                        raise
                    row.uncaptured = _explained(error)[1]
                    if self.runner.writer:
                        what = f"{self.case.label} {provider} {mode}: no graph: {row.uncaptured}"
                        raise Again(what) from error
        return found

    def _fill(self, mode: str, timings: Timings) -> None:
        """The records get their times, and what follows from them."""
        names = {name for measured in timings.values() for name in measured}
        # One method for all of a case, in whichever run: a replay hides launches that events show.
        common = next(found for found in timings.values() if found.keys() == names)
        if self.problem.synchronising:
            common = timings.get("events", common)
        works = self._cost().of(mode)
        work, limits = total(works), self.runner.limits
        for name, measured in common.items():
            row, seconds = self.rows[name, mode], measured.p50_us / 1e6
            row.gbps, row.tflops = work.bytes / seconds / 1e9, work.flops / seconds / 1e12
            if limits is not None:
                row.roofline_pct = 100 * limits.floor(works, row.dtype) / seconds
            for method, found in timings.items():
                if method != "wall" and name in found:
                    setattr(row, f"{method}_us", found[name].p50_us)
            for field, value in asdict(measured).items():
                setattr(row, field, value)
            row.reason = ""


class Runner:
    """Runs cases one by one; see `Options`. limits: of the device, for the roofline. writer: gets
    the records of every case, and lets another process go on where this one ends."""

    def __init__(
        self,
        options: Options,
        limits: Limits | None = None,
        suite: Suite | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.options = options
        self.suite = suite or SUITES[options.suite]
        self.device = torch.device(options.device)
        self.limits = limits
        self.writer = writer

    def run(self, case: Case) -> list[Record]:
        """One record per provider and mode; failures become records with status and reason. Raises
        `Again` where this process can go no further."""
        with self.stream():
            prepared = self.prepare(case)
            for provider in case.providers:
                prepared.check(provider)
            prepared.gate = None
            for mode in case.modes:
                prepared.time(mode)
        return list(prepared.rows.values())

    def prepare(self, case: Case) -> Prepared:
        """Inputs and oracle of a case; call it, and what follows, inside `stream`."""
        return Prepared(self, case)

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
            first = {provider: sets[0] for provider, sets in calls.items()}
            return {"wall": timing.measure_cpu(first, **how)}
        found = {}
        if graphs:
            replays = {provider: [graph] for provider, graph in graphs.items()}
            found["graph"] = timing.measure_gpu(replays, "graph", **how)
        if both or graphs.keys() != calls.keys():
            single = {provider: [(call, 1) for call in sets] for provider, sets in calls.items()}
            found["events"] = timing.measure_gpu(single, "events", **how)
        return found


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

"""The cases of `python -m benchmarks run` under pytest-benchmark.

    python -m pytest benchmarks [--bench-suite core] [-k "attention and step"]
        [--benchmark-only | --benchmark-disable] [--benchmark-json FILE]

Every implementation is checked before it is timed; one that is wrong fails with its reason and has
no time. On a CPU a round is a call. On a GPU it is the replay of a CUDA graph (or a call, where one
cannot be captured) and a synchronisation; the times per call that CUDA events took are in
`extra_info`. That has all fields of `record.Record`, so `record.read` takes a `--benchmark-json`
for a file of results. Unlike in a run, providers are timed one after the other and not in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from time import perf_counter
from typing import Any

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.measure.runner import Prepared, Runner
from benchmarks.measure.suites import Suite

pytest.importorskip("pytest_benchmark")


@cache
def cases(suite: str) -> dict[str, Case]:
    return {case.label: case for case in plan(Options(suite=suite, device=str(DEVICE)))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = cases(metafunc.config.getoption("--bench-suite"))
    metafunc.parametrize(
        ("prepared", "mode", "provider"),
        [(k, m, p) for k, case in chosen.items() for m in case.modes for p in case.providers],
        indirect=["prepared"],
        scope="module",
    )


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """One case at a time, named by its label."""
    suite = request.config.getoption("--bench-suite")
    runner = Runner(Options(suite=suite, device=str(DEVICE)))
    with runner.stream():
        prepared = runner.prepare(cases(suite)[request.param])
        if prepared.problem and prepared.problem.synchronising & set(prepared.case.providers):
            # One method for all providers of a case, as in a run.
            runner.options = replace(runner.options, method="eager")
        yield prepared


def test_case(benchmark: Any, prepared: Prepared, mode: str, provider: str, env_id: str) -> None:
    if "reference" in prepared.case.providers:
        prepared.check("reference")  # the oracle of whole networks
    prepared.check(provider)
    _stop_unless_ok(prepared, provider, mode)
    calls = prepared.calls(mode, [provider])
    _stop_unless_ok(prepared, provider, mode)

    benchmark.group = f"{prepared.case.label} {mode}"
    if DEVICE.type == "cuda":
        _on_gpu(benchmark, prepared, provider, mode, calls[provider])
    else:
        _on_cpu(benchmark, prepared, provider, mode, calls[provider][0])
    benchmark.extra_info |= asdict(replace(prepared.record(provider, mode), env_id=env_id))


def _stop_unless_ok(prepared: Prepared, provider: str, mode: str) -> None:
    record = prepared.record(provider, mode)
    if record.status in ("incorrect", "error"):
        pytest.fail(f"{record.status}: {record.reason}", pytrace=False)
    if record.status != "ok":
        pytest.skip(record.reason)


def _on_cpu(
    benchmark: Any, prepared: Prepared, provider: str, mode: str, call: timing.Call
) -> None:
    rounds = _rounds(call, prepared.runner.suite, len(prepared.case.providers))
    benchmark.pedantic(call, rounds=rounds)
    if benchmark.stats is not None:  # not with --benchmark-disable
        measured = timing.Timing.of(benchmark.stats.stats.data, "wall")
        prepared.fill(mode, {"wall": {provider: measured}})


def _on_gpu(
    benchmark: Any, prepared: Prepared, provider: str, mode: str, sets: list[timing.Call]
) -> None:
    prepared.fill(mode, prepared.measure(mode, {provider: sets}))
    by_graph = prepared.record(provider, mode).method == "graph"
    unit, number = timing.captured(sets) if by_graph else (sets[0], 1)
    if number > 1:
        benchmark.group += f", {number} calls a round"

    def synchronised() -> None:
        unit()
        torch.cuda.synchronize(DEVICE)

    rounds = _rounds(synchronised, prepared.runner.suite, len(prepared.case.providers))
    benchmark.pedantic(synchronised, rounds=rounds)


def _rounds(call: Callable[[], Any], suite: Suite, providers: int) -> int:
    """As many as the suite's seconds allow one provider, after a first call to warm up."""
    started = perf_counter()
    call()
    possible = int(suite.seconds / providers / (perf_counter() - started))
    return min(max(possible, suite.rounds[0]), suite.rounds[1])

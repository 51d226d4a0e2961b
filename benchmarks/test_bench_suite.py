"""The cases of `python -m benchmarks run` under pytest-benchmark.

    python -m pytest benchmarks [-k "attention and step"]
        [--benchmark-only | --benchmark-disable] [--benchmark-json FILE]

Every implementation is checked before it is timed; one that is wrong fails with its reason and has
no time. A round is a call and, on a GPU, the wait for it: what it costs to launch is in it. Memory
and the share of the tolerance that was used are in `extra_info`. Unlike in a run, providers are
timed one after the other and not in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from time import perf_counter
from typing import Any

import pytest
import torch

from benchmarks.command.options import full_fp32
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.runner import Prepared, Runner

pytest.importorskip("pytest_benchmark")

OPTIONS = Options(device="cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.label: case for case in plan(OPTIONS)}


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """One case at a time, named by its label."""
    full_fp32()
    runner = Runner(OPTIONS)
    with runner.stream():
        yield runner.prepare(CASES[request.param])


@pytest.mark.parametrize(
    ("prepared", "mode", "provider"),
    [(k, m, p) for k, case in CASES.items() for m in case.modes for p in case.providers],
    indirect=["prepared"],
    scope="module",
)
def test_case(benchmark: Any, prepared: Prepared, mode: str, provider: str) -> None:
    prepared.check(provider)
    calls = prepared.calls(mode, [provider])
    record = prepared.rows[provider, mode]
    if record.status in ("incorrect", "error"):
        pytest.fail(f"{record.status}: {record.reason}", pytrace=False)
    if record.status != "ok":
        pytest.skip(record.reason)

    def synchronised() -> None:
        calls[provider][0]()
        if OPTIONS.device == "cuda":
            torch.cuda.synchronize()

    started = perf_counter()
    synchronised()
    suite = prepared.runner.suite
    possible = int(suite.seconds / len(prepared.case.providers) / (perf_counter() - started))
    benchmark.group = f"{prepared.case.label} {mode}"
    benchmark.extra_info |= asdict(record)
    benchmark.pedantic(synchronised, rounds=min(max(possible, suite.rounds[0]), suite.rounds[1]))

"""The operations under pytest-benchmark, on the same cases as `python -m benchmarks run`.

    python -m pytest benchmarks/test_bench_ops.py [--benchmark-disable] [-k attention]

Every implementation is checked before it is timed. The numbers are wall clock with a
synchronisation; `extra_info` has the names of `record.Record`.
"""

import pytest
import torch

from benchmarks import memory, parity, timing
from benchmarks.registry import DTYPES, Problem
from benchmarks.runner import Case, Options, plan, unavailable

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [case for case in plan(Options(suite="quick")) if case.shape.stage]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.label)
def prepared(request: pytest.FixtureRequest) -> tuple[Case, Problem, parity.Gate]:
    case: Case = request.param
    problem = case.op.build(case.shape, DTYPES[case.dtype], DEVICE, 0)
    return case, problem, parity.Gate(problem)


@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize("provider", ["baseline", "reference", "torch", "triton"])
def test_operation(
    benchmark, prepared: tuple[Case, Problem, parity.Gate], provider: str, mode: str
) -> None:
    case, problem, gate = prepared
    if reason := unavailable(case.op, provider, DEVICE):
        pytest.skip(reason)
    leaves = list(problem.leaves.values())
    outputs = problem.calls[provider]()
    grads = gate.gradients(outputs, leaves)
    accuracy = gate.check(parity.Result(tuple(x.detach() for x in outputs), grads))
    call = timing.call_in_mode(problem.calls[provider], leaves, mode)
    peak, _ = memory.peak_bytes(call, DEVICE)

    def synchronised() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{case.label} {mode}"
    benchmark.extra_info |= {
        "provider": provider,
        "peak_mib": peak / memory.MIB,
        "budget": accuracy.budget,
    }
    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)

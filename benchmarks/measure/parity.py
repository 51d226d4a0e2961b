"""The correctness gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.common.problem import Outputs, Problem
from benchmarks.measure.timing import cotangent
from equiseg_fast.testing import assert_parity
from equiseg_fast.testing.policy import HALF


class Result(NamedTuple):
    """Outputs of a forward, and the gradients of the leaves if there are any."""

    outputs: Outputs
    gradients: tuple[Tensor, ...]


class Gate:
    """Oracle and yardsticks of one problem, computed once for all providers.

    Operations are held to the tolerance policy of `equiseg_fast.testing`, with the reference in
    fp64 as oracle; models to `Problem.agreement`, with the reference in fp32. backward: whether
    there are gradients to be checked; forwards alone need none.
    """

    def __init__(self, problem: Problem, seed: int = 0, *, backward: bool = True) -> None:
        self.problem, self.seed, self.backward = problem, seed, backward
        self.dtypes: list[torch.dtype] | None = None
        if problem.agreement is not None:
            self.oracle = self._cast(torch.float32)
            return
        leaves = list(problem.leaves.values()) if backward else []
        with torch.set_grad_enabled(backward):
            outputs = problem.calls["reference"]()
        self.dtypes = [x.dtype for x in outputs]
        self.eager = self.result(outputs, leaves)
        half = any(x.dtype in HALF for x in problem.leaves.values())
        self.eager32 = self._cast(torch.float32) if half else self.eager
        self.oracle = self._cast(torch.float64)

    def gradients(self, outputs: Outputs, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients at the leaves, for the same random cotangents whoever made the outputs."""
        if not leaves:
            return ()
        dtypes = self.dtypes or [x.dtype for x in outputs]
        pairs = [
            (x, cotangent(x, self.seed + i, dtype))
            for i, (x, dtype) in enumerate(zip(outputs, dtypes, strict=True))
            if x.requires_grad
        ]
        return torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])

    def result(self, outputs: Outputs, leaves: Sequence[Tensor]) -> Result:
        """What is checked; of a forward without a graph no leaves are given."""
        return Result(tuple(x.detach() for x in outputs), self.gradients(outputs, leaves))

    def _cast(self, dtype: torch.dtype) -> Result:
        call, leaves = self.problem.cast(dtype)
        with torch.set_grad_enabled(self.backward):
            return self.result(call(), leaves if self.backward else [])

    def check(self, actual: Result) -> float:
        """The largest share of its tolerance that an error used. Raises AssertionError, saying what
        is wrong, if there is something."""
        forward = self._check("outputs", self.problem.output_names, actual)
        if not actual.gradients:
            return forward
        names = [f"d{name}" for name in self.problem.leaves]
        return max(forward, self._check("gradients", names, actual))

    def _check(self, part: str, names: Sequence[str], actual: Result) -> float:
        if self.problem.agreement is None:
            return max(self._hold(name, i, actual, part) for i, name in enumerate(names))
        error = _relative(getattr(actual, part), getattr(self.oracle, part))
        allowed = self.problem.agreement[part == "gradients"]
        if not error <= allowed:
            raise AssertionError(
                f"{', '.join(names) if part == 'outputs' else part}: relative RMS error {error:.3g}"
                f" against the fp32 reference, allowed {allowed:.3g}"
            )
        return error / allowed

    def _hold(self, name: str, i: int, actual: Result, part: str) -> float:
        got, oracle, eager, eager32 = (
            getattr(r, part)[i] for r in (actual, self.oracle, self.eager, self.eager32)
        )
        default = "forward" if part == "outputs" else "gradient"
        kind = self.problem.kinds.get(name, default if got.is_floating_point() else "exact")
        # What is summed in fp32 whatever came in has no yardstick in half precision.
        wide = default == "forward" and kind in ("statistic", "parameter")
        if wide or eager.dtype == torch.float32:
            eager = eager32
        how = {"contraction": self.problem.contraction, "chain": self.problem.chain}
        return assert_parity(got, oracle, eager, name=name, kind=kind, **how).budget_used


def _relative(actual: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    pairs = list(zip(actual, oracle, strict=True))
    error = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (error / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5

"""The correctness gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from benchmarks.cases.common.problem import Outputs, Problem
from benchmarks.measure.timing import cotangent
from equiseg_fast.testing import Parity, assert_parity
from equiseg_fast.testing.policy import HALF


@dataclass(frozen=True)
class Accuracy:
    """The worst error of a provider over all outputs and gradients.

    rms_ratio, max_ratio: RMS and largest error over those of eager PyTorch (for models: the RMS
    error relative to the reference itself, and no maximum). budget: share of the allowance used.
    """

    rms_ratio: float | None
    max_ratio: float | None
    budget: float

    def worse(self, other: Accuracy) -> Accuracy:
        """Of both, number by number."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Accuracy(*(max((x for x in pair if x is not None), default=None) for pair in pairs))


@dataclass(frozen=True)
class Result:
    """Outputs of a forward, and the gradients of the leaves if there are any."""

    outputs: Outputs
    gradients: tuple[Tensor, ...]


class Gate:
    """Oracle and yardsticks of one problem, computed once for all providers.

    Operations are held to the tolerance policy of `equiseg_fast.testing`, with the reference in
    fp64 as oracle; models to `Problem.agreement`, with the reference in fp32. If that is itself a
    provider, its result is taken: check "reference" first. backward: whether there are gradients
    to be checked; forwards alone need none.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        *,
        backward: bool = True,
        fp32_reference: bool = False,
    ) -> None:
        self.problem = problem
        self.leaves = dict(problem.leaves) if backward else {}
        self.seed = seed
        self.dtypes: list[torch.dtype] | None = None
        self.oracle: Result | None = None
        if problem.agreement is None:
            with torch.set_grad_enabled(bool(self.leaves)):
                outputs = problem.calls["reference"]()
            self.dtypes = [x.dtype for x in outputs]
            self.eager = self._result(outputs, list(self.leaves.values()))
            half = any(x.dtype in HALF for x in problem.leaves.values())
            self.eager32 = self._cast(torch.float32) if half else self.eager
            self.oracle = self._cast(torch.float64)
        elif not fp32_reference:
            self.oracle = self._cast(torch.float32)

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

    def _cast(self, dtype: torch.dtype) -> Result:
        call, leaves = self.problem.cast(dtype)
        leaves = leaves if self.leaves else []
        with torch.set_grad_enabled(bool(leaves)):
            return self._result(call(), leaves)

    def _result(self, outputs: Outputs, leaves: Sequence[Tensor]) -> Result:
        return Result(tuple(x.detach() for x in outputs), self.gradients(outputs, leaves))

    def check(self, actual: Result, part: str) -> Accuracy:
        """Of the "outputs" or of the "gradients". Raises AssertionError, saying what is wrong,
        unless they are good enough."""
        problem, forward = self.problem, part == "outputs"
        names = problem.output_names if forward else [f"d{name}" for name in problem.leaves]
        if problem.agreement is None:
            return _worst([self._hold(name, i, actual, part) for i, name in enumerate(names)])
        if self.oracle is None or not getattr(self.oracle, part):
            self.oracle = actual
        error = _relative(getattr(actual, part), getattr(self.oracle, part))
        allowed = problem.agreement[0 if forward else 1]
        if not error <= allowed:
            raise AssertionError(
                f"{', '.join(names) if forward else part}: relative RMS error {error:.3g} against "
                f"the fp32 reference, allowed {allowed:.3g}"
            )
        return Accuracy(error, None, error / allowed)

    def _hold(self, name: str, i: int, actual: Result, part: str) -> Parity:
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
        return assert_parity(got, oracle, eager, name=name, kind=kind, **how)


def _worst(records: Sequence[Parity]) -> Accuracy:
    checks = [c for record in records for c in record.checks if c.yardstick > 0]
    rms, largest = ([c.ratio for c in checks if c.metric == m] for m in ("rms", "amax"))
    budget = max(record.budget_used for record in records)
    return Accuracy(max(rms, default=None), max(largest, default=None), budget)


def _relative(actual: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    pairs = list(zip(actual, oracle, strict=True))
    error = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (error / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5

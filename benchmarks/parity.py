"""The correctness gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Outputs, Problem
from benchmarks.timing import cotangent
from equiseg_fast._tolerance import HALF
from equiseg_fast.testing import Parity, assert_parity


@dataclass(frozen=True)
class Accuracy:
    """The worst error of a provider over all outputs and gradients.

    rms_ratio, max_ratio: RMS and largest error over those of eager PyTorch (for models: the RMS
    error relative to the reference itself, and no maximum). budget: share of the allowance used.
    """

    rms_ratio: float | None
    max_ratio: float | None
    budget: float


@dataclass(frozen=True)
class Result:
    """Outputs of a forward, and the gradients of the leaves if there are any."""

    outputs: Outputs
    gradients: tuple[Tensor, ...]


class Gate:
    """Oracle and yardsticks of one problem, computed once for all providers.

    Operations are held to the tolerance policy of `equiseg_fast.testing`, with the reference in
    fp64 as oracle; models to `Problem.agreement`, with the reference in fp32. If that is itself a
    provider, its result is taken: check "reference" first.
    """

    def __init__(self, problem: Problem, seed: int = 0, *, fp32_reference: bool = False) -> None:
        self.problem = problem
        self.leaves = list(problem.leaves.values())
        self.seed = seed
        self.dtypes: list[torch.dtype] | None = None
        self.oracle: Result | None = None
        if problem.agreement is None:
            outputs = problem.calls["reference"]()
            self.dtypes = [x.dtype for x in outputs]
            self.eager = self._result(outputs, self.leaves)
            half = any(x.dtype in HALF for x in self.leaves)
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
        with torch.set_grad_enabled(bool(leaves)):
            return self._result(call(), leaves)

    def _result(self, outputs: Outputs, leaves: Sequence[Tensor]) -> Result:
        return Result(tuple(x.detach() for x in outputs), self.gradients(outputs, leaves))

    def check(self, actual: Result) -> Accuracy:
        """Raises AssertionError, saying what is wrong, unless the results are good enough."""
        if self.problem.agreement is not None:
            self.oracle = self.oracle or actual
            return self._agree(actual, *self.problem.agreement)
        names = self.problem.output_names
        records = [
            self._hold(name, "forward", i, actual, "outputs") for i, name in enumerate(names)
        ]
        records += [
            self._hold(f"d{name}", "gradient", i, actual, "gradients")
            for i, name in enumerate(self.problem.leaves)
        ]
        checks = [check for record in records for check in record.checks]
        ratios = {
            metric: [c.ratio for c in checks if c.metric == metric and c.yardstick > 0]
            for metric in ("rms", "amax")
        }
        return Accuracy(
            max(ratios["rms"], default=None),
            max(ratios["amax"], default=None),
            max(record.budget_used for record in records),
        )

    def _hold(self, name: str, default: str, i: int, actual: Result, part: str) -> Parity:
        got, oracle, eager, eager32 = (
            getattr(r, part)[i] for r in (actual, self.oracle, self.eager, self.eager32)
        )
        kind = self.problem.kinds.get(name, default if got.is_floating_point() else "exact")
        # What is summed in fp32 whatever came in has no yardstick in half precision.
        wide = default == "forward" and kind in ("statistic", "parameter")
        if wide or eager.dtype == torch.float32:
            eager = eager32
        problem = self.problem
        return assert_parity(
            got,
            oracle,
            eager,
            name=name,
            kind=kind,
            contraction=problem.contraction,
            chain=problem.chain,
        )

    def _agree(self, actual: Result, forward: float, gradient: float) -> Accuracy:
        names = ", ".join(self.problem.output_names)
        errors = [(names, _relative(actual.outputs, self.oracle.outputs), forward)]
        if self.leaves:
            error = _relative(actual.gradients, self.oracle.gradients)
            errors.append(("gradients", error, gradient))
        for name, error, allowed in errors:
            if not error <= allowed:
                raise AssertionError(
                    f"{name}: relative RMS error {error:.3g} against the fp32 reference, "
                    f"allowed {allowed:.3g}"
                )
        budget = max(error / allowed for _, error, allowed in errors)
        return Accuracy(max(error for _, error, _ in errors), None, budget)


def _relative(actual: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    pairs = list(zip(actual, oracle, strict=True))
    error = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (error / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5

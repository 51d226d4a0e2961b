"""Every operation against the fp64 reference on inputs that Hypothesis draws.

Sizes (1, odd, not square), dtypes, and memory layouts of inputs and cotangents, under the policy of
`equiseg_fast.testing`. Derandomised: the same examples on every run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast.testing import LAYOUTS, check_op_parity, random_normal, with_layout
from tests.every_operation import OPERATIONS
from tests.operations import Sizes, needs_interpreter

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis not installed")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],  # to make an example smaller takes minutes in the interpreter
    "suppress_health_check": list(HealthCheck),
}
SIZES = st.builds(
    Sizes,
    modalities=st.integers(1, 4),
    batch=st.integers(1, 3),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    channels=st.integers(1, 20),
    classes=st.integers(1, 6),
    factor=st.integers(1, 3),
)
# Channels of an expanded cotangent are equal, and so are the sums of a gradient over tokens: if one
# of them is small by chance, none is large enough to measure its rounding by.
COTANGENTS = ("contiguous", "transposed", "sliced")
HALF, FULL = [torch.bfloat16, torch.float16], [torch.float32, torch.float64]


def laid_out(layout: str) -> Callable[[Tensor], Tensor]:
    """Gives tensors this layout where they have the dimensions for it."""

    def apply(x: Tensor) -> Tensor:
        needed = {"transposed": 2, "channels_last": 3}.get(layout, 1)
        return with_layout(x, layout if x.dim() >= needed else "contiguous")

    return apply


def check(
    name: str, backend: str | None, sizes: Sizes, dtype: torch.dtype, layout: str, cotangent: str,
    seed: int,
) -> None:  # fmt: skip
    if name == "add_layer_norm":
        # The normalised values of one channel or of equal ones are zero, those of two are +-1: all
        # gradients vanish, and what is left are roundings that nothing can be relative to.
        sizes = sizes._replace(channels=sizes.channels + 2)
        layout = "sliced" if layout == "expanded" else layout
    operation = OPERATIONS[name]
    inputs = operation.inputs(sizes, dtype, laid_out(layout), seed)
    function = (
        operation.function if backend is None else partial(operation.function, backend=backend)
    )
    names = list(operation.shapes(sizes))
    if dtype == torch.float64:
        check_fp64(function, operation.reference, inputs, names)
        return
    check_op_parity(
        function,
        operation.reference,
        inputs,
        differentiable=names,
        cotangent=cotangent,
        kinds=operation.kinds,
        seed=seed,
        chain=sizes.batch * sizes.height * sizes.width,
        contraction=operation.contraction(sizes),
    )


def check_fp64(function: Any, oracle: Any, inputs: dict[str, Any], names: list[str]) -> None:
    """The oracle is no yardstick for its own dtype: to nine digits instead."""
    results = []
    for f in (function, oracle):
        leaves = {n: inputs[n].detach().requires_grad_() for n in names}
        out = f(**{**inputs, **leaves})
        outs = [y for y in ([out] if isinstance(out, Tensor) else out) if y.requires_grad]
        cotangents = [random_normal(y.shape, y.dtype, seed=i) for i, y in enumerate(outs)]
        grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
        results.append([*outs, *grads])
    for actual, expected in zip(*results, strict=True):
        size = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * (1 + size))


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25, **SETTINGS)
@given(
    sizes=SIZES,
    dtype=st.sampled_from(HALF + FULL),
    layout=st.sampled_from(LAYOUTS),
    cotangent=st.sampled_from(COTANGENTS),
    seed=st.integers(0, 99),
)
def test_stock_operators(
    name: str, sizes: Sizes, dtype: torch.dtype, layout: str, cotangent: str, seed: int
) -> None:
    check(name, "torch" if name != "ohem" else None, sizes, dtype, layout, cotangent, seed)


@needs_interpreter
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "ohem"])
@settings(max_examples=3, **SETTINGS)
@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, *HALF]),
    layout=st.sampled_from(LAYOUTS),
    cotangent=st.sampled_from(COTANGENTS),
    seed=st.integers(0, 99),
)
def test_kernels(
    name: str, sizes: Sizes, dtype: torch.dtype, layout: str, cotangent: str, seed: int
) -> None:
    check(name, "triton", sizes, dtype, layout, cotangent, seed)

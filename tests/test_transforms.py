"""Transforms of `torch.func` over every operation: right, or refused.

An operation that has no rule for a transform must say so; it must never compute without derivatives
or mix up the examples.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import ops
from tests.operations import OPERATIONS, needs_interpreter

BACKENDS = ("torch", "triton", "reference")
CASES = [
    pytest.param(name, backend, marks=[needs_interpreter] if backend == "triton" else [])
    for name in OPERATIONS
    for backend in (BACKENDS if name != "ohem" else (None,))  # it has no backends
]

# On the CPU these are compositions of operators that PyTorch itself can transform; everything else
# is an `autograd.Function` of ours.
COMPOSED = {"attention", "depthwise_conv_gelu", "add_layer_norm", "mix_ffn"}


def refuses(name: str, backend: str | None) -> bool:
    return backend == "triton" or (backend == "torch" and name not in COMPOSED)


def test_every_operation_is_here() -> None:
    assert set(OPERATIONS) == set(ops.__all__) - {"explain", "use_backend"}


def function_of(name: str, backend: str | None) -> tuple[Any, Any, Tensor]:
    """An operation and its reference as functions of their first input, and that input."""
    operation = OPERATIONS[name]
    first, *rest = (inputs := operation.inputs(dtype=torch.float32))
    others = {n: inputs[n] for n in rest}

    def first_output(function: Any, x: Tensor) -> Tensor:
        out = function(**{first: x}, **others)
        return out if isinstance(out, Tensor) else out[0]

    fast = operation.function
    if backend is not None:
        fast = partial(fast, backend=backend)
    functions = (partial(first_output, f) for f in (fast, operation.reference))
    return *functions, inputs[first]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_grad(name: str, backend: str | None) -> None:
    fast, slow, x = function_of(name, backend)
    cotangent = torch.randn_like(slow(x))
    actual, expected = (
        torch.func.grad(lambda x, f=f: (f(x) * cotangent).sum())(x) for f in (fast, slow)
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    plain = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(fast(plain), plain, cotangent)
    torch.testing.assert_close(actual, by_autograd)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_vmap_is_right_or_refuses(name: str, backend: str | None) -> None:
    fast, slow, x = function_of(name, backend)
    many = torch.stack([x, 2 * x, -x])
    if refuses(name, backend):
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(fast)(many)
        return
    expected = torch.stack([slow(one) for one in many])
    torch.testing.assert_close(torch.func.vmap(fast)(many), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_forward_mode_is_right_or_refuses(name: str, backend: str | None) -> None:
    fast, slow, x = function_of(name, backend)
    tangent = torch.randn_like(x)
    # PyTorch's own attention has no forward mode either, and says so.
    if refuses(name, backend) or (name, backend) == ("attention", "torch"):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward AD"):
            torch.func.jvp(fast, (x,), (tangent,))
        return
    expected = torch.func.jvp(slow, (x,), (tangent,))
    assert all(y.abs().max() > 0 for y in expected)
    actual = torch.func.jvp(fast, (x,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

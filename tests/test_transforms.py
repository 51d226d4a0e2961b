"""Every transform of PyTorch over every operation and backend: right, or refused in one sentence.

An operation must never compute without derivatives or mix up the examples. Compilation, export and
what they need of each operation are tested with the operation.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from equiseg_fast import EQUISeg, ops, reference
from tests.every_operation import OPERATIONS
from tests.operations import Sizes, needs_interpreter

CASES = [
    pytest.param(name, backend, marks=[needs_interpreter] if backend == "triton" else [])
    for name in OPERATIONS
    for backend in (("torch", "triton") if name != "ohem" else (None,))  # it has no backends
]
SIZES = Sizes(modalities=2, batch=1, height=2, width=4, channels=2, classes=2)

Function = Callable[[Tensor], Tensor]


def test_every_operation_is_here() -> None:
    assert set(OPERATIONS) == set(ops.__all__) - {"explain", "use_backend"}
    for name, operation in OPERATIONS.items():
        assert operation.function is getattr(ops, name)
        assert operation.reference is getattr(reference, name)


def function_of(name: str, backend: str | None) -> tuple[Function, Function, Tensor]:
    """An operation and its reference as functions of their first input, and that input."""
    operation = OPERATIONS[name]
    first, *rest = (inputs := operation.inputs(SIZES))
    others = {n: inputs[n] for n in rest}

    def first_output(function: Any, x: Tensor) -> Tensor:
        out = function(**{first: x}, **others)
        return out if isinstance(out, Tensor) else out[0]

    fast = operation.function
    if backend is not None:
        fast = partial(fast, backend=backend)
    functions = (partial(first_output, f) for f in (fast, operation.reference))
    return *functions, inputs[first]


def loss(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def several(x: Tensor) -> Tensor:
    return torch.stack([x, -2 * x])


def double_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(loss(lambda g: g)(first), x)[0]


def batched_cotangents(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = f(x)
    gs = several(torch.ones_like(y))
    return torch.autograd.grad(y, x, gs, is_grads_batched=True)[0]


def pull_back(f: Function, x: Tensor) -> Tensor:
    y, pullback = torch.func.vjp(f, x)
    return pullback(torch.ones_like(y))[0]


def layer(f: Function) -> nn.Module:
    module = nn.Module()
    module.register_buffer("scale", torch.zeros(()))
    module.forward = lambda x: f(x * module.scale)  # type: ignore[method-assign]
    return module


def reentrant_checkpoint(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss(lambda x: checkpoint(f, x, use_reentrant=True))(x).backward()
    return x.grad


def offloaded(f: Function, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return double_backward(f, x)


REVERSE: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(loss(f))(x),
    "vjp": pull_back,
    "jacrev without grad mode": lambda f, x: torch.no_grad()(torch.func.jacrev(f))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(loss(f)))(x),
    "vmap": lambda f, x: torch.func.vmap(f, -1, -1)(several(x).movedim(0, -1)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(loss(f)))(several(x)),
    "grad of vmap of vmap": lambda f, x: torch.func.grad(loss(torch.vmap(torch.vmap(f))))(
        several(x)[None]
    ),
    "batched cotangents": batched_cotangents,
    "hessian": lambda f, x: torch.autograd.functional.hessian(loss(f), x, vectorize=True),
    "functional_call": lambda f, x: torch.func.functional_call(
        layer(f), {"scale": torch.ones(())}, (x,)
    ),
    "make_fx": lambda f, x: make_fx(torch.func.grad(loss(f)))(x + 1)(x),
    "checkpoint": lambda f, x: double_backward(lambda x: checkpoint(f, x, use_reentrant=False), x),
    "reentrant checkpoint": reentrant_checkpoint,
    "save_on_cpu": offloaded,
}


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(y).tangent.detach()


FORWARD: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "forward over reverse": lambda f, x: torch.func.hessian(loss(f))(x),
    "dual tensors": dual,
    "dual tensors with gradient": lambda f, x: dual(f, x.clone().requires_grad_()),
}


@cache
def expected(name: str, transform: str) -> Tensor:
    _, slow, x = function_of(name, None)
    return (REVERSE | FORWARD)[transform](slow, x)


def check(name: str, backend: str | None, transform: str) -> None:
    fast, _, x = function_of(name, backend)
    assert expected(name, transform).abs().max() > 0
    actual = (REVERSE | FORWARD)[transform](fast, x)
    torch.testing.assert_close(actual, expected(name, transform), rtol=1e-3, atol=1e-5)


# PyTorch says so of stock operators with batched cotangents.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_reverse_mode_and_vmap(name: str, backend: str | None, transform: str) -> None:
    check(name, backend, transform)


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_forward_mode_is_right_or_refused(name: str, backend: str | None, transform: str) -> None:
    if backend == "triton" or (backend == "torch" and not OPERATIONS[name].composed):
        fast, _, x = function_of(name, backend)
        with pytest.raises(RuntimeError, match=r'use reverse mode .* or backend="reference"$'):
            FORWARD[transform](fast, x)
    else:
        check(name, backend, transform)


@needs_interpreter
def test_no_examples() -> None:
    fast, _, x = function_of("depthwise_conv_gelu", "triton")
    with pytest.raises(RuntimeError, match="vmap over no examples"):
        torch.func.vmap(fast)(x[None][:0])


@pytest.mark.parametrize(("name", "backend"), [("guided_gate", "torch"), ("guided_gate", "triton")])
def test_compiled_transforms(name: str, backend: str) -> None:
    """The compiler would take the kernel of the forward and no backward: zero gradients."""
    torch._dynamo.reset()
    fast, slow, x = function_of(name, backend)
    compiled = torch.compile(torch.func.grad(loss(fast)), backend="eager", fullgraph=True)
    if backend == "triton":
        with pytest.raises(Exception, match=r"torch\.compile would lose its derivatives"):
            compiled(x)
    else:
        torch.testing.assert_close(compiled(x), torch.func.grad(loss(slow))(x))


def test_large_inputs_on_the_cpu() -> None:
    """Where blocks of queries and bands of the image serve otherwise."""
    q, k = torch.randn(1, 2048, 1, 32), torch.randn(1, 512, 1, 32)
    tangent = torch.randn_like(q)
    by_hand = [ops.attention(q + e * tangent, k, k) for e in (1e-3, -1e-3)]
    actual = dual(lambda x: ops.attention(q + x * tangent, k, k), torch.zeros(()))
    torch.testing.assert_close(actual, (by_hand[0] - by_hand[1]) / 2e-3, rtol=1e-2, atol=1e-3)


def test_attention_may_be_written_into() -> None:
    """The result of the torch backend is no view for autograd, though it shares memory."""
    q = torch.randn(1, 4, 1, 2, requires_grad=True)
    out = ops.attention(q * 1, q, q, backend="torch")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mul_(2).sum().backward()  # as for scaled_dot_product_attention itself


def test_products_with_the_hessian_of_the_whole_model() -> None:
    model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), num_classes=3, decoder_dim=8)
    model = model.eval().double()
    images = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 64, 64))
    parts = (model.encoder.block1[0].attn.q.weight, model.fusion[2].mixer[0].mlp.fc1.weight)
    directions = [torch.randn_like(p) for p in parts]

    def products(backend: str) -> tuple[Tensor, ...]:
        with ops.use_backend(backend):
            total, _ = model(images, labels=labels, order=torch.tensor([0, 1]))
            slopes = torch.autograd.grad(total, parts, create_graph=True)
            return torch.autograd.grad(slopes, parts, directions)

    for actual, expected in zip(products("torch"), products("reference"), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)

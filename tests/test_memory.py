"""What every operation takes and returns, as memory: whatever the strides, nothing shared, nothing
that depends on PyTorch's defaults for new tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import EQUISeg, EQUISegConfig
from equiseg_fast.testing import random_normal
from tests.every_operation import OPERATIONS
from tests.operations import Operation, Sizes, needs_interpreter

CASES = [
    pytest.param(name, backend, marks=[needs_interpreter] if backend == "triton" else [])
    for name in OPERATIONS
    for backend in (("torch", "reference", "triton") if name != "ohem" else (None,))
]


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def call(operation: Operation, backend: str | None, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    choice = {} if backend is None else {"backend": backend}
    return as_tuple(operation.function(**inputs, **choice))


def leaves_of(operation: Operation, inputs: dict[str, Any], sizes: Sizes) -> list[Tensor]:
    return [inputs[name].detach().requires_grad_() for name in operation.shapes(sizes)]


def step(
    name: str, backend: str | None, inputs: dict[str, Any], sizes: Sizes, cotangents: list[Tensor]
) -> list[Tensor]:
    """Results and gradients."""
    operation = OPERATIONS[name]
    leaves = leaves_of(operation, inputs, sizes)
    outs = call(
        operation, backend, inputs | dict(zip(operation.shapes(sizes), leaves, strict=True))
    )
    wanted = [y for y in outs if y.requires_grad]
    return [*outs, *torch.autograd.grad(wanted, leaves, cotangents)]


def overlapping(x: Tensor) -> Iterator[Tensor]:
    """Tensors of this shape and dtype whose elements share memory."""
    strides = x.contiguous().stride()
    for wanted in (
        (1,) * x.dim(),  # windows that slide by one
        (0,) * x.dim(),
        *((*strides[:i], 0, *strides[i + 1 :]) for i in range(x.dim())),
        *((*strides[:i], 1, *strides[i + 1 :]) for i in range(x.dim() - 1)),
    ):
        numbers = 1 + sum((n - 1) * s for n, s in zip(x.shape, wanted, strict=True))
        yield random_normal((numbers,), x.dtype, seed=numbers).as_strided(x.shape, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_overlapping_memory_is_read_like_a_copy(name: str, dtype: torch.dtype) -> None:
    """Of inputs and of cotangents: libraries below PyTorch read outside, or refuse them."""
    operation, sizes = OPERATIONS[name], Sizes(batch=1, height=2, width=4, channels=8)
    backend = None if name == "ohem" else "torch"
    inputs = operation.inputs(sizes, dtype)
    outs = call(operation, backend, inputs)
    plain = [random_normal(y.shape, y.dtype, seed=i) for i, y in enumerate(outs)
             if y.is_floating_point()]  # fmt: skip

    def check(inputs: dict[str, Any], cotangents: list[Tensor]) -> None:
        copies = {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        actual = step(name, backend, inputs, sizes, cotangents)
        expected = step(name, backend, copies, sizes, [g.contiguous() for g in cotangents])
        for a, b in zip(actual, expected, strict=True):
            size = float(b.detach().abs().max()) if b.is_floating_point() else 0.0
            atol = torch.finfo(dtype).eps * (8 * size + 1)
            torch.testing.assert_close(a, b, rtol=0.0, atol=atol)

    for key in operation.shapes(sizes):
        for x in overlapping(inputs[key]):
            check({**inputs, key: x}, plain)
    for i, g in enumerate(plain):
        for strange in overlapping(g):
            check(inputs, [*plain[:i], strange, *plain[i + 1 :]])


# Their results are saved for the backward: who changes them hears that from autograd.
SAVES_RESULT = {
    ("attention", "torch"), ("attention", "triton"), ("add_layer_norm", "torch"),
    ("add_layer_norm", "triton"), ("add_layer_norm", "reference"),
}  # fmt: skip
ONE = Sizes(modalities=1, batch=1, height=1, width=1, channels=1)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_results_are_nobody_elses(name: str, backend: str | None, training: bool) -> None:
    """No view or alias of an input or of each other; what is done in place works in autograd."""
    operation = OPERATIONS[name]
    kinds = [ONE, Sizes(modalities=2, batch=1, height=1, width=2, channels=2), Sizes(batch=0)]
    if backend != "triton":
        kinds += [Sizes(), Sizes(batch=1, height=8, width=8, channels=16, factor=1)]
    for sizes in kinds:
        inputs = operation.inputs(sizes)
        leaves = leaves_of(operation, inputs, sizes) if training else []
        inputs |= dict(zip(operation.shapes(sizes), leaves, strict=False))
        outs = call(operation, backend, inputs)
        storages = [
            x.untyped_storage().data_ptr()
            for x in (*inputs.values(), *outs)
            if isinstance(x, Tensor) and x.numel()
        ]
        assert len(storages) == len(set(storages)), sizes
        wanted = [y for y in outs if y.requires_grad]
        assert bool(wanted) == training
        if (name, backend) in SAVES_RESULT:
            continue
        for y in wanted if training else outs:
            y += 1
        if training:
            torch.autograd.grad(wanted, leaves, [torch.ones_like(y) for y in wanted])


@contextmanager
def other_defaults() -> Iterator[None]:
    """New tensors of PyTorch go to another device, in another dtype."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_operations_do_not_depend_on_defaults(name: str, backend: str | None) -> None:
    sizes = Sizes(modalities=2, batch=1, height=2, width=3, channels=4)
    inputs = OPERATIONS[name].inputs(sizes)
    cotangents = [
        random_normal(y.shape, y.dtype, seed=i)
        for i, y in enumerate(call(OPERATIONS[name], backend, inputs)) if y.is_floating_point()
    ]  # fmt: skip
    expected = step(name, backend, inputs, sizes, cotangents)
    with other_defaults():
        actual = step(name, backend, inputs, sizes, cotangents)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_does_not_depend_on_defaults(training: bool) -> None:
    """Nor do the layers that it is made of."""
    names = ("rgb", "thermal", "depth")
    config = EQUISegConfig(num_classes=5, modalities=names, modality_dropout=0.5, decoder_dim=16)
    model = EQUISeg(config).train(training)
    images = random_normal((3, 2, 3, 36, 40), seed=0)
    labels = torch.randint(0, 5, (2, 36, 40))
    presents: list[Any] = [{"rgb", "depth"}, torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()]

    def run() -> list[Tensor]:
        results = []
        for present in presents:
            model.zero_grad()
            generator = torch.Generator().manual_seed(3)
            results += [model(images, present=present).detach()]
            total, _ = model.loss(images, labels, present=present, generator=generator)
            total.backward()
            results += [total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return results

    torch.manual_seed(0)
    expected = run()
    with other_defaults():
        torch.manual_seed(0)
        actual = run()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

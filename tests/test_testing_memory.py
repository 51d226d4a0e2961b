"""Strange strides, poisoned allocations, equal bits: what the other tests rely on."""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import testing
from equiseg_fast.testing import assert_deterministic, check_op_parity, nan_poison, random_normal


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_of_cotangents_and_inputs(layout: str) -> None:
    seen: list[Tensor] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(x)
            return x.clone(memory_format=torch.contiguous_format)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            seen.append(dy)
            return dy.clone()

    x = random_normal((2, 3, 4, 5), seed=0, layout=layout)
    records = check_op_parity(
        lambda x: Watch.apply(x),
        lambda x: x.clone(),
        {"x": x},
        differentiable=["x"],
        cotangent=layout,
    )
    strides = {
        "contiguous": (60, 20, 5, 1),
        "transposed": (60, 20, 1, 4),
        "channels_last": (60, 1, 15, 3),
        "sliced": (260, 65, 13, 2),
        "expanded": (12, 4, 1, 0),
    }[layout]
    assert [t.stride() for t in seen] == [strides, strides]
    assert set(records) == {"out", "dx"}


@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        ("contiguous", (60, 20, 5, 1)),
        ("transposed", (60, 5, 15, 1)),
        ("sliced", (160, 40, 8, 1)),
        ("expanded", (0, 20, 5, 1)),
    ],
)
def test_unit_last_stride(layout: str, strides: tuple[int, ...]) -> None:
    make = partial(random_normal, (2, 3, 4, 5), torch.float16, seed=3)
    x = make(layout=layout, unit_last_stride=True)
    assert x.stride() == strides
    if layout == "sliced":
        assert x.storage_offset() > 0
        assert torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).isnan()
    if layout == "expanded":
        assert torch.equal(x[0], x[1])
    else:
        assert torch.equal(x, make())


def test_layouts_that_a_shape_cannot_have() -> None:
    for shape, layout in (((4,), "transposed"), ((4, 5), "channels_last"), ((), "sliced")):
        with pytest.raises(ValueError, match=f"'{layout}'.*dimensions, got x of shape"):
            random_normal(shape, seed=0, layout=layout)
    with pytest.raises(ValueError, match="layout must be one of"):
        random_normal((2, 2), seed=0, layout="diagonal")


KERNEL_MODULE = """
import torch

def half_written(x):
    out = torch.empty_like(x)
    out.view(-1)[1:] = 1
    return out

def allocations(x):
    return (
        torch.empty(3), torch.empty_like(x), torch.empty_strided((2, 3), (1, 2)),
        x.new_empty(4), x.new_empty_strided((2, 2), (4, 1)), torch.empty(2, requires_grad=True),
        torch.empty(3, dtype=torch.bfloat16),
    )

def integers():
    return torch.empty(3, dtype=torch.int32).zero_()
"""


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(KERNEL_MODULE, made.__dict__)
    return made


def test_poison_finds_an_output_that_was_not_written() -> None:
    kernel = module("equiseg_fast.kernels.broken")
    x = torch.ones(4, 5)
    # The fixture of conftest.py is what poisons here.
    out = kernel.half_written(x)
    assert out.isnan().sum() == 1
    with pytest.raises(AssertionError, match=r"not finite where the oracle is, at 1 of 20"):
        check_op_parity(kernel.half_written, torch.ones_like, {"x": x}, differentiable=[])


def test_poison_covers_what_it_says() -> None:
    kernel = module("equiseg_fast.kernels")
    x = torch.ones(2, 3)
    assert all(made.isnan().all() for made in kernel.allocations(x))
    assert kernel.integers().tolist() == [0, 0, 0]
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(kernel.allocations(x)))
    thread.start()
    thread.join()
    assert len(seen) == 7
    assert all(made.isnan().all() for made in seen)


@pytest.mark.parametrize("name", ["equiseg_fast.kernels_of_others", "equiseg_fast.ops.attention"])
def test_poison_leaves_other_modules_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Zeros in place of whatever the allocator hands out.
    other = module(name)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    with nan_poison():
        assert not other.half_written(torch.ones(4)).isnan().any()
    with nan_poison(modules=[name]):
        assert other.half_written(torch.ones(4)).isnan().sum() == 1


def test_poison_ends() -> None:
    before = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)
    with pytest.raises(ValueError, match="at least 2"), nan_poison():
        assert_deterministic(torch.empty_like, repeats=1)
    assert (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty) == before


def test_poison_does_not_break_the_compiler() -> None:
    def add(x: Tensor) -> Tensor:
        return torch.empty_like(x).zero_() + x.new_empty(x.shape).zero_() + x

    x = torch.ones(3)
    compiled = torch.compile(add, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)


def test_deterministic() -> None:
    x = torch.tensor([math.nan, -0.0, 1.0])
    assert_deterministic(lambda: (x, x.to(torch.bfloat16), torch.tensor(3)))
    results = iter([x, x, torch.tensor([math.nan, 0.0, 1.0])])
    with pytest.raises(AssertionError, match=r"repeat 2: output 0 \(3,\) torch.float32 differs"):
        assert_deterministic(lambda: next(results), repeats=3)
    assert not testing.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    buffer = torch.zeros(3)
    with pytest.raises(AssertionError, match="repeat 1: output 0"):
        assert_deterministic(lambda: buffer.add_(1))
    with pytest.raises(ValueError, match="at least 2"):
        assert_deterministic(lambda: x, repeats=1)


def test_deterministic_counts_calls_and_outputs() -> None:
    calls: list[int] = []

    def outputs(grow: bool) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            calls.append(1)
            return [torch.ones(2)] * (len(calls) if grow else 2)

        return call

    assert_deterministic(outputs(grow=False))
    assert len(calls) == 20
    calls.clear()
    with pytest.raises(AssertionError, match="2 outputs, first 1"):
        assert_deterministic(outputs(grow=True))


@pytest.mark.gpu
def test_values_are_the_same_on_every_device() -> None:
    make = partial(random_normal, (2, 3, 4), torch.bfloat16, seed=1, layout="sliced")
    assert torch.equal(make(device="cuda").cpu(), make())

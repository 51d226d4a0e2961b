"""Labels of every integer dtype, with every ignored label, mean what int64 labels mean."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import EQUISeg, class_prototypes, upsample_cross_entropy
from equiseg_fast.nn import PrototypeLoss
from equiseg_fast.ops._checks import INTEGER
from equiseg_fast.testing import same_bits
from tests.operations import needs_interpreter

CLASSES = 5
DTYPES = [d for d in INTEGER if d is not torch.int64]
IGNORED = (255, -1, -100, 259, 3, 2**40, -(2**63))
"""Such as no label, such as a class, and such as wrap to a class or to none in a narrow dtype."""


def labels(dtype: torch.dtype, ignored: int, *size: int) -> Tensor:
    """All classes, and the ignored label where the dtype has it."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, CLASSES, size, generator=generator, dtype=dtype)
    limits = torch.iinfo(dtype)
    if limits.min <= ignored <= limits.max:
        found[..., 0] = ignored
    return found


def with_gradient(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x, *args, **kwargs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(outputs[0].shape, generator=generator)
    return [*outputs, *torch.autograd.grad(outputs[0], x, cotangent)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(same_bits, found, expected))


FEATURES, LOGITS = torch.randn(2, 1, 4, 3), torch.randn(1, CLASSES, 2, 2)
CALLS: list[tuple[Callable[..., Any], Tensor, tuple[int, ...]]] = [
    (class_prototypes, FEATURES, (CLASSES, 2, 2)),
    (upsample_cross_entropy, LOGITS, ()),
]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations(dtype: torch.dtype, backend: str) -> None:
    for ignored in IGNORED:
        narrow = labels(dtype, ignored, 1, 4, 4)
        settings = {"ignore_index": ignored, "backend": backend}
        for function, x, args in CALLS:
            found = with_gradient(function, x, narrow, *args, **settings)
            assert_same(found, with_gradient(function, x, narrow.long(), *args, **settings))


@needs_interpreter
@pytest.mark.parametrize(("function", "x", "args"), CALLS)
def test_kernels(function: Callable[..., Any], x: Tensor, args: tuple[int, ...]) -> None:
    """The interpreter is slow: one ignored label, that would wrap to a class in a byte."""
    wide = labels(torch.int64, 3, 1, 4, 4)
    expected = with_gradient(function, x, wide, *args, ignore_index=259, backend="triton")
    for dtype in DTYPES:
        narrow = wide.to(dtype)
        found = with_gradient(function, x, narrow, *args, ignore_index=259, backend="triton")
        assert_same(found, expected)


@pytest.fixture(scope="module")
def model() -> EQUISeg:
    return EQUISeg.from_name("b0", modalities=("rgb", "depth"), num_classes=CLASSES).eval()


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("size", [(32, 32), (20, 27)], ids=["as it is", "padded"])
def test_model(model: EQUISeg, size: tuple[int, int], ignored: int) -> None:
    model.config = replace(model.config, ignore_index=ignored)
    model.prototype_loss = PrototypeLoss(CLASSES, ignore_index=ignored)
    images, order = torch.randn(2, 1, 3, *size), torch.tensor([1, 0])

    def loss(given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            total, parts = model.loss(images, given, order=order)
        return [total, *parts.values()]

    for dtype in DTYPES:
        narrow = labels(dtype, ignored, 1, *size)
        found = loss(narrow)
        assert found[0].isfinite()
        assert_same(found, loss(narrow.long()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.uint32, torch.uint64])
def test_dtypes_of_which_there_are_no_labels(model: EQUISeg, dtype: torch.dtype) -> None:
    given = torch.zeros(1, 32, 32, dtype=dtype)
    features = torch.randn(2, 1, 4, 3)
    for call in (
        lambda: class_prototypes(features, given, CLASSES, 2, 2),
        lambda: upsample_cross_entropy(torch.randn(1, CLASSES, 2, 2), given),
        lambda: PrototypeLoss(CLASSES)(features, given, torch.tensor([1, 0]), 2, 2),
        lambda: model.loss(torch.randn(2, 1, 3, 32, 32), given),
    ):
        with pytest.raises(TypeError, match=r"labels must have dtype int64, .*; got (bool|uint)"):
            call()

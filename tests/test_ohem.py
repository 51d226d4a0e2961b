"""Hard-pixel mining against the reference and by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import ohem, reference
from equiseg_fast.ops import _checks
from tests.operations import DEVICE, Operation, generator

OPERATION = Operation(
    ohem,
    reference.ohem,
    lambda s: {"loss": (s.batch, s.height, s.width)},
    lambda s, seed: {
        "valid": torch.rand(s.batch, s.height, s.width, generator=generator(seed)) < 0.8
    },
)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("function", [ohem, reference.ohem])
def test_a_pixel_of_nan_is_never_dropped(function: Any, few: bool) -> None:
    loss = torch.full((64,), 0.01 if few else 2.0)
    loss[7] = torch.nan
    valid = torch.ones(64, dtype=torch.bool)
    assert function(loss, valid).isnan()
    valid[7] = False
    assert function(loss, valid).isfinite()


@pytest.mark.parametrize("function", [ohem, reference.ohem])
def test_sums_are_wide(function: Any) -> None:
    loss = torch.full((100_000,), 2.5, dtype=torch.float16)
    found = function(loss, torch.ones_like(loss, dtype=torch.bool))
    assert found.dtype == torch.float16
    assert found == 2.5


@pytest.mark.parametrize("kept", ["hard", "ranked", "ranked with ties", "none", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counted", [False, True])
def test_equals_the_reference(
    counted: bool, kept: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where pixels can be counted, and where nobody may wait for their number."""
    if not counted:
        monkeypatch.setattr(_checks, "has_values", lambda _: False)
    loss = torch.rand(3, 40, 5, dtype=dtype, device=DEVICE)
    valid = torch.rand(loss.shape, device=DEVICE) < 0.7
    if kept.startswith("ranked"):
        loss = loss * 0.36  # a few pixels are hard, fewer than one in sixteen
    if kept.endswith("ties"):
        loss = (loss * 20).round() / 20
    if kept == "none":
        valid.zero_()
    if kept == "empty":
        loss, valid = loss[:0], valid[:0]
    results = []
    for fn in (ohem, reference.ohem):
        x = loss.clone().requires_grad_()
        value = fn(x, valid)
        (grad,) = torch.autograd.grad(value, x)
        results.append((value, grad))
    (value, grad), (expected, expected_grad) = results
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad.sum(), expected_grad.sum())
    if not kept.endswith("ties"):
        torch.testing.assert_close(grad, expected_grad)
    assert not grad[~valid].any()


@pytest.mark.parametrize(("thresh", "ratio"), [(0.7, 1), (0.3, 2), (1.0, 16), (0.5, 10**6)])
def test_arguments(thresh: float, ratio: int) -> None:
    loss = torch.rand(200, device=DEVICE)
    valid = torch.rand(200, device=DEVICE) < 0.9
    torch.testing.assert_close(
        ohem(loss, valid, thresh=thresh, min_kept_ratio=ratio),
        reference.ohem(loss, valid, thresh=thresh, min_kept_ratio=ratio),
    )


@pytest.mark.parametrize("fn", [ohem, reference.ohem])
def test_a_loss_on_the_threshold_is_not_hard(fn: Callable[..., Tensor]) -> None:
    loss = torch.tensor([0.0, 0.0, 2.0, 4.0], device=DEVICE)
    assert fn(loss, torch.ones_like(loss, dtype=torch.bool), thresh=1.0) == 3.0


def test_double_backward() -> None:
    x = torch.rand(50, dtype=torch.float64, device=DEVICE, requires_grad=True)
    valid = torch.ones(50, dtype=torch.bool, device=DEVICE)
    assert torch.autograd.gradgradcheck(lambda x: ohem(x.square(), valid), (x,))


def test_transforms() -> None:
    loss, valid = torch.rand(4, 30, device=DEVICE), torch.rand(4, 30, device=DEVICE) < 0.8
    actual = torch.func.vmap(torch.func.grad(ohem))(loss, valid)
    expected = torch.stack([torch.func.grad(ohem)(x, v) for x, v in zip(loss, valid)])  # noqa: B905
    torch.testing.assert_close(actual, expected)


def test_bad_input() -> None:
    loss, valid = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ((loss.tolist(), valid), {}, TypeError, "loss must be a tensor .*; got list"),
        ((loss.long(), valid), {}, TypeError, "loss must have dtype float64, .*; got int64"),
        ((loss, valid.long()), {}, TypeError, "valid must have dtype bool; got int64"),
        ((loss, valid[:1]), {}, ValueError, r"valid must have shape that of loss = \[2, 3\]"),
        ((loss, valid.to("meta")), {}, ValueError, "valid must be on the device of loss"),
        ((loss, valid), {"thresh": 0.0}, ValueError, r"thresh must be in \(0, 1\]; got 0.0"),
        ((loss, valid), {"thresh": 1.5}, ValueError, r"thresh must be in \(0, 1\]; got 1.5"),
        ((loss, valid), {"min_kept_ratio": 0}, ValueError, "min_kept_ratio must be at least 1"),
    ]
    for args, kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            ohem(*args, **kwargs)

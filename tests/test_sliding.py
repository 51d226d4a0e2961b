"""Sliding windows: every pixel counts once, no seams, and what a model is given."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import EQUISeg
from equiseg_fast.sliding import bands, sliding_window


class Windows:
    """A model whose logits are the images' own values, and which keeps the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.present: Any = None

    def __call__(self, images: Any, *, present: Any = None) -> Tensor:
        x = images if isinstance(images, Tensor) else torch.stack(list(images.values()))
        self.shapes.append(tuple(x.shape[1:]))
        self.present = present
        return x.sum(dim=0)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("window", [(16, 16), (17, 8), (37, 11), (5, 53), (1, 40), (99, 99)])
def test_weights_of_every_pixel_sum_to_one(window: tuple[int, int], overlap: float) -> None:
    images = {"a": torch.randn(2, 3, 37, 53)}
    out = sliding_window(Windows(), images, window=window, overlap=overlap)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, images["a"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [(37, 53), (64, 64)])
def test_a_window_that_holds_all_is_one_plain_pass(window: tuple[int, int]) -> None:
    images = {"a": torch.randn(2, 3, 37, 53)}
    model = Windows()
    out = sliding_window(model, images, window=window)
    assert model.shapes == [(2, 3, 37, 53)]
    assert torch.equal(out, images["a"])


@pytest.mark.parametrize("down", [False, True])
def test_seams_vanish(down: bool) -> None:
    """Where windows disagree as much as they can, one goes over into the next."""
    calls = 0

    def disagree(images: dict[str, Tensor], *, present: None) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(images["a"], float(calls % 2))

    size = (161, 1) if down else (1, 161)
    out = sliding_window(
        disagree, {"a": torch.zeros(1, 1, *size)}, window=(32, 32), overlap=0.5, batch_size=1
    ).flatten()
    assert calls > 8
    assert out.max() > 0.99
    assert out.min() < 0.01
    assert out.diff().abs().max() < 1.2 * math.pi / 32, "an average of equals jumps by a half"


def test_windows_overlap_as_asked_and_go_in_batches() -> None:
    model = Windows()
    x = torch.randn(2, 3, 40, 100)
    whole = sliding_window(model, {"a": x}, window=(20, 20), overlap=0.5, batch_size=4)
    assert model.shapes == [(8, 3, 20, 20), (8, 3, 20, 20), (2, 3, 20, 20)] * 3
    one = sliding_window(Windows(), {"a": x}, window=(20, 20), overlap=0.5, batch_size=1)
    assert torch.equal(whole, one)


def test_no_more_than_a_row_of_windows_is_held() -> None:
    x = torch.randn(1, 2, 203, 8)
    parts = list(bands(Windows(), {"a": x}, (20, 8), 0.5, None, 4))
    assert len(parts) == 20
    assert max(part.untyped_storage().nbytes() for part in parts) == 4 * 2 * 20 * 8
    torch.testing.assert_close(torch.cat(parts, dim=-2), x)


def test_masks_go_with_their_images() -> None:
    model = Windows()
    mask = torch.tensor([[True, False], [True, True]])
    images = {"a": torch.randn(2, 3, 8, 24), "b": torch.randn(2, 3, 8, 24)}
    sliding_window(model, images, window=(8, 8), overlap=0.0, present=mask)
    assert model.present.tolist() == [[True, False] * 3, [True, True] * 3]
    sliding_window(model, images, window=(8, 8), present={"a"})
    assert model.present == {"a"}


def test_equiseg() -> None:
    model = EQUISeg.from_name("nano", modalities=("a", "b"), num_classes=4).eval()
    images = torch.randn(2, 2, 3, 40, 72)
    mask = torch.tensor([[True, False], [True, True]])
    with torch.no_grad():
        whole = model(images, present=mask)
    assert torch.equal(whole, sliding_window(model, images, window=(64, 72), present=mask))
    named = dict(zip("ab", images, strict=True))
    out = sliding_window(model, named, window=(32, 32), present=mask)
    assert out.shape == whole.shape
    assert not out.requires_grad
    torch.testing.assert_close(out, sliding_window(model, images, window=(32, 32), present=mask))
    second = {"b": named["b"][1:]}
    alone = sliding_window(model, second, window=(32, 32), present={"b"})
    torch.testing.assert_close(out[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 8)}, r"window\[0\] must be at least 1; got 0"),
        ({"window": (8,)}, r"window must be \(height, width\); got \(8,\)"),
        ({"window": 8}, "window must be a sequence of two integers; got 8"),
        ({"window": (8, 8.0)}, "window must be a sequence of two integers; got 8.0 in it"),
        ({"overlap": 1.0}, r"overlap must be in \[0, 1\); got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"images": {}}, "images must hold at least one modality"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    given = {"images": {"a": torch.zeros(1, 3, 8, 8)}, "window": (8, 8), **options}
    with pytest.raises((TypeError, ValueError), match=message):
        sliding_window(Windows(), given.pop("images"), **given)


def test_a_model_that_trains_is_refused() -> None:
    """Its batch norms would learn from windows."""
    model = torch.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"model must be in evaluation mode, model\.eval\(\)"):
        sliding_window(model, {"a": torch.zeros(1, 3, 8, 8)}, window=(8, 8))

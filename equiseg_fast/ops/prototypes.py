"""Class prototypes: the mean feature of every class, per image and modality."""

from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._registry import without_autocast


def class_prototypes(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    height: int,
    width: int,
    *,
    ignore_index: int = 255,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean feature of every class in one read of the features.

    x: `[M, B, L, C]` tokens with L = height * width, floating.
    labels: `[B, s * height, s * width]` integer for a whole s >= 1, on the device of x; the pixel
        `(s i, s j)` labels token `(i, j)`, which equals nearest resizing. Values outside
        `0..num_classes - 1` and `ignore_index` belong to no class.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns prototypes `[M, B, num_classes, C]` in fp32 (fp64 for fp64 x), zero rows for absent
    classes, and counts `[B, num_classes]` int64. Sums are fp32 also under autocast. Raises
    TypeError or ValueError naming the argument. Source: the prototypes of the self-guided module
    of EQUISeg (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tokens("x", x, height, width)
    _checks.check_tensor("labels", labels, _checks.INTEGER, "[B, s*height, s*width]")
    _checks.check_same_device(x=x, labels=labels)
    stride = labels.shape[-1] // width
    if stride < 1 or labels.shape != (x.shape[1], stride * height, stride * width):
        raise ValueError(
            f"labels must have shape [B, s*height, s*width] with B = {x.shape[1]}, height = "
            f"{height}, width = {width} and a whole s >= 1; got {list(labels.shape)}"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    _backend.resolve("class_prototypes", backend, x.device, _reasons(x))
    with without_autocast(x.device.type):
        return reference.class_prototypes(
            x, labels, num_classes, height, width, ignore_index=ignore_index
        )


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(x), _backend.NO_KERNEL]


_backend.register_reasons("class_prototypes", _reasons)

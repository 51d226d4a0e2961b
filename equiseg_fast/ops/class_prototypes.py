"""Class prototypes: the mean feature of every class, per image and modality."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._math import statistics_dtype
from ._registry import by_reference, differentiable, register, without_autocast

MAX_CLASSES = 256


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

    x: `[M, B, L, C]` tokens with L = height * width, floating, M and C >= 1, any strides.
    labels: `[B, s * height, s * width]` integer for a whole s >= 1, on the device of x; the pixel
        `(s i, s j)` labels token `(i, j)`, which equals nearest resizing. Values outside
        `0..num_classes - 1` and `ignore_index` belong to no class.
    backend: "triton" (num_classes <= 256), "torch", "reference", "auto"; None takes the current
        default.

    Returns prototypes `[M, B, num_classes, C]` in fp32 (fp64 for fp64 x), zero rows for absent
    classes, and counts `[B, num_classes]` int64. Sums are fp32 also under autocast; a feature that
    is not finite spoils its channel in all classes of its image and modality. Minimum traffic:
    read x and one label per token, write the prototypes (1 FLOP per element); backward reads the
    labels and writes the gradient of x, which is not saved. The backward is deterministic. Raises
    TypeError or ValueError naming the argument. Source: the prototypes of the self-guided module
    of EQUISeg (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tokens("x", x, height, width)
    if x.shape[0] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one modality and channel; got {list(x.shape)}")
    _checks.check_tensor("labels", labels, _checks.INTEGER, "[B, s*height, s*width]")
    _checks.check_same_device(x=x, labels=labels)
    stride = labels.shape[-1] // width
    if stride < 1 or labels.shape != (x.shape[1], stride * height, stride * width):
        raise ValueError(
            f"labels must have shape [B, s*height, s*width] with B = {x.shape[1]}, height = "
            f"{height}, width = {width} and a whole s >= 1; got {list(labels.shape)}"
        )
    _checks.check_sizes(num_classes=num_classes)
    _checks.check_ignore_index(ignore_index)
    chosen = _backend.resolve("class_prototypes", backend, x.device, x, labels, num_classes)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference.class_prototypes(
                x, labels, num_classes, height, width, ignore_index=ignore_index
            )
    small = labels[:, ::stride, ::stride]
    return (_TORCH if chosen == "torch" else _TRITON)(x, small, num_classes, ignore_index)


def _reasons(
    x: Tensor, labels: object = None, num_classes: int = 1, *_: object, **__: object
) -> _backend.Reasons:
    reasons = _backend.triton_reasons(x)
    if num_classes > MAX_CLASSES:
        reasons.append(f"{num_classes} classes are more than {MAX_CLASSES}")
    return reasons


_backend.register_reasons("class_prototypes", _reasons)


def _classes(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The class of every token, `[B, L]` int64; `num_classes` where there is none."""
    classes = labels.flatten(1).long()
    none = (classes < 0) | (classes >= num_classes) | (classes == ignore_index)
    return classes.masked_fill(none, num_classes)


def _torch_forward(
    x: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x)
    classes = _classes(labels, num_classes, ignore_index)
    rows = x.shape[1] * (num_classes + 1)
    index = classes + torch.arange(0, rows, num_classes + 1, device=x.device)[:, None]
    counts = index.new_zeros(rows).index_add_(0, index.flatten(), torch.ones_like(index).flatten())
    counts = counts.view(x.shape[1], num_classes + 1)[:, :num_classes].contiguous()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        index = index + torch.arange(len(x), device=x.device).view(-1, 1, 1) * rows
        sums = x.new_zeros((len(x) * rows, x.shape[-1]), dtype=dtype)
        sums.index_add_(0, index.flatten(), x.to(dtype).flatten(0, 2))
        sums = sums.view(*x.shape[:2], num_classes + 1, x.shape[3])[:, :, :num_classes]
    else:
        # Elsewhere an indexed sum uses atomics, in an order that differs from run to run.
        known = torch.arange(num_classes, device=x.device)[:, None]
        with without_autocast(x.device.type):
            member = (known == classes[:, None]).to(dtype)
            sums = torch.stack([member @ one for one in x.to(dtype)])
    return sums / counts.clamp(min=1)[..., None], counts


def _torch_backward(
    grad: Tensor, labels: Tensor, counts: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """One lookup per token. Differentiable in grad, so that it is the double backward as well."""
    num_classes = counts.shape[1]
    classes = _classes(labels, num_classes, ignore_index)
    # The row of zeros is where tokens without a class look.
    rows = torch.nn.functional.pad(grad / counts.clamp(min=1)[..., None], (0, 0, 0, 1)).to(dtype)
    first = torch.arange(0, grad.shape[0] * grad.shape[1], device=grad.device) * (num_classes + 1)
    index = classes + first.view(grad.shape[0], grad.shape[1], 1)
    # Written without `flatten`, which batched cotangents do not know.
    chosen = rows.reshape(-1, grad.shape[-1]).index_select(0, index.flatten())
    return chosen.reshape(*index.shape, grad.shape[-1])


def _fake_forward(
    x: Tensor, labels: object, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    modalities, batch, _, channels = x.shape
    dtype = statistics_dtype(x)
    return (
        x.new_empty((modalities, batch, num_classes, channels), dtype=dtype),
        x.new_empty((batch, num_classes), dtype=torch.int64),
    )


def _fake_backward(
    grad: Tensor, labels: Tensor, counts: object, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    modalities, batch, _, channels = grad.shape
    tokens = labels.shape[1] * labels.shape[2]
    return grad.new_empty((modalities, batch, tokens, channels), dtype=dtype)


_FORWARD = register(
    "class_prototypes_fwd",
    "(Tensor x, Tensor labels, SymInt num_classes, int ignore_index) "
    "-> (Tensor prototypes, Tensor counts)",
    kernels="class_prototypes",
    torch=_torch_forward,
    fake=_fake_forward,
    # A product with the classes of the tokens; the backward only looks up.
    flops=lambda x, labels, num_classes, _: 2 * prod(x) * num_classes,
)
_BACKWARD = register(
    "class_prototypes_bwd",
    "(Tensor grad, Tensor labels, Tensor counts, int ignore_index, ScalarType dtype) -> Tensor dx",
    kernels="class_prototypes",
    torch=_torch_backward,
    fake=_fake_backward,
)


def _saves(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The prototypes are linear in x: neither the backward nor its derivative needs x."""
    x, labels, _, ignore_index = inputs
    return (labels, output[1]), (ignore_index, x.dtype)


def _backward(grad: Tensor, *saved: Any) -> Tensor:
    return (_torch_backward if by_reference(grad) else _BACKWARD)(grad, *saved)


_TRITON, _TORCH = (
    differentiable(*functions, None, name="ClassPrototypes", tensors=1, saves=_saves)
    for functions in ((_FORWARD, _backward), (_torch_forward, _torch_backward))
)

"""Cross-entropy of upsampled logits, per pixel."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._math import statistics_dtype
from ._registry import differentiable, register, without_autocast

MAX_CLASSES = 256
_CHUNK = 32
_LABELS = "[B, H, W]"


def upsample_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, backend: str | None = None
) -> Tensor:
    """Bilinear upsampling (align_corners=False) to the labels' size, then cross-entropy.

    logits: `[B, K, h, w]`, floating, any strides; channels-last memory with K a multiple of 16 is
        read in place. labels: `[B, H, W]` integer on the device of logits, any size (whole or
        fractional factors, 1, or below), values in 0..K-1 or `ignore_index`.
    backend: "triton" (K <= 256), "torch", "reference", "auto"; None takes the current default.

    Returns the loss of every pixel, `[B, H, W]` in fp32 (fp64 for fp64 logits), 0 where ignored;
    computed in fp32 also under autocast. Apart from "reference" (and "torch" on a GPU or under
    the compiler) nothing of the size `[B, K, H, W]` exists, forward or backward. Saved: logits,
    labels and `[B, H, W]` fp32. At least K h w elements and 12 bytes a pixel are moved forward,
    11 K FLOP a pixel. The backward is deterministic. A label that is neither a class nor ignored
    is a ValueError on the CPU, where looking waits for nothing. Raises TypeError or ValueError
    naming the argument. Source: the loss of SegFormer (arXiv 2105.15203) and CMNeXt (arXiv
    2303.01480), at full size.
    """
    _checks.check_tensor("logits", logits, _checks.FLOATING, "[B, K, h, w]")
    _checks.check_tensor("labels", labels, _checks.INTEGER, _LABELS)
    _checks.check_same_device(logits=logits, labels=labels)
    _check(logits, labels)
    _checks.check_ignore_index(ignore_index)
    chosen = _backend.resolve("upsample_cross_entropy", backend, logits.device, logits, labels)
    if chosen == "triton":
        return _TRITON(logits, labels, ignore_index)[0]
    _checks.check_label_values(labels, logits.shape[1], ignore_index)
    with without_autocast(logits.device.type):
        if chosen == "reference":
            return _reference(logits, labels, ignore_index)
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            return _CHUNKED(logits, labels, ignore_index)
        return _cross_entropy(_upsampled(logits, labels), labels, ignore_index)


def _check(logits: Tensor, labels: Tensor) -> None:
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels must have the batch size of logits, {logits.shape[0]}; got {labels.shape[0]}"
        )
    if min(logits.shape[1:]) < 1:
        raise ValueError(
            f"logits must have at least one class and one position; got shape {list(logits.shape)}"
        )
    if min(labels.shape[1:]) < 1:
        raise ValueError(f"labels must have at least one pixel; got shape {list(labels.shape)}")


def _reasons(logits: Tensor, labels: Tensor, **_: object) -> _backend.Reasons:
    reasons = _backend.triton_reasons(logits)
    if logits.shape[1] > MAX_CLASSES:
        reasons.append(f"{logits.shape[1]} classes are more than {MAX_CLASSES}")
    rows, columns = logits.shape[2:]
    if (rows + 1) * (columns + 1) >= 2**31:
        reasons.append(f"{rows} x {columns} positions exceed 32 bits")
    for samples, size in zip(logits.shape[2:], labels.shape[1:], strict=True):
        if (2 * size + 1) * (samples + 1) >= 2**31:
            reasons.append(f"positions of {size} pixels over {samples} samples exceed 32 bits")
    return reasons


_backend.register_reasons("upsample_cross_entropy", _reasons)


# ---- stock PyTorch operators --------------------------------------------------------------------


def _upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    size = (labels.shape[1], labels.shape[2])
    wide = logits.to(statistics_dtype(logits))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False)


def _cross_entropy(full: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(full, labels.long(), ignore_index=ignore_index, reduction="none")


class _Upsampling:
    """Interpolation of `[B, K, h, w]` logits in chunks of output rows, and its transpose.

    Chunks are `[B, W, K, n]`, classes by n rows: interpolating along the width is then the same
    for K * n neighbours in memory, which stock operators vectorise for channels-last maps, and the
    softmax runs over vectors of rows. Along the height it is a product with a narrow band.
    """

    def __init__(self, logits: Tensor, size: tuple[int, int]) -> None:
        dtype = statistics_dtype(logits)
        self.samples = logits.to(dtype).permute(0, 3, 1, 2).contiguous()
        self.height, self.width = size
        rows, unit = logits.shape[2], 2 * self.height
        arange = partial(torch.arange, device=logits.device)
        # The position of output row y is (2 y + 1) rows - height, in units of 1 / unit input rows.
        source = (2 * arange(self.height) + 1) * rows - self.height
        source = source.clamp(0, unit * (rows - 1)) - unit * arange(rows)[:, None]
        self.band = (1 - source.abs().to(dtype) / unit).clamp(min=0)

    def chunks(self) -> list[tuple[slice, slice]]:
        """Output rows, and the input rows that they are made of."""
        rows, unit = self.samples.shape[-1], 2 * self.height
        pairs = []
        for start in range(0, self.height, _CHUNK):
            stop = min(start + _CHUNK, self.height)
            first, last = ((2 * y + 1) * rows - self.height for y in (start, stop - 1))
            pairs.append((slice(start, stop), slice(max(first, 0) // unit, last // unit + 2)))
        return pairs

    def forward(self, outputs: slice, inputs: slice) -> Tensor:
        """The upsampled logits of some rows, `[B, W, K, n]`."""
        lines = self.samples[..., inputs] @ self.band[inputs, outputs]
        batch, _, classes, n = lines.shape
        maps = lines.flatten(2).unsqueeze(1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=(1, self.width), mode="bilinear", align_corners=False)
        return maps.permute(0, 2, 3, 1).reshape(batch, self.width, classes, n)

    def add_transpose(self, into: Tensor, grad: Tensor, outputs: slice, inputs: slice) -> None:
        """Add the gradient of `forward` for a cotangent to `into`, of the shape of `samples`."""
        batch, columns, classes, _ = into.shape
        maps = grad.flatten(2).unsqueeze(1).permute(0, 3, 1, 2)
        lines = torch.ops.aten.upsample_bilinear2d_backward(
            maps, [1, self.width], [batch, maps.shape[1], 1, columns], False
        )
        lines = lines.permute(0, 2, 3, 1).reshape(batch, columns, classes, -1)
        into[..., inputs] += lines @ self.band[inputs, outputs].T


def _targets(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Classes (0 where ignored) as `[B, W, 1, H]` int64, and which pixels are ignored."""
    labels = labels.long()
    ignored = labels == ignore_index
    return labels.masked_fill(ignored, 0).transpose(1, 2).unsqueeze(2), ignored


def _chunked_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    loss = logits.new_empty(labels.shape, dtype=statistics_dtype(logits))
    if not loss.numel():
        return loss
    upsampling = _Upsampling(logits, (labels.shape[1], labels.shape[2]))
    targets, ignored = _targets(logits, labels, ignore_index)
    for outputs, inputs in upsampling.chunks():
        log_p = upsampling.forward(outputs, inputs).log_softmax(dim=2)
        loss[:, outputs] = log_p.gather(2, targets[..., outputs]).squeeze(2).transpose(1, 2)
    return loss.neg_().masked_fill_(ignored, 0.0)


def _chunked_backward(grad: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    with without_autocast(logits.device.type):
        return _chunked_gradient(grad, logits, labels, ignore_index)


def _chunked_gradient(grad: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if not labels.numel():
        return torch.zeros_like(logits)
    upsampling = _Upsampling(logits, (labels.shape[1], labels.shape[2]))
    targets, ignored = _targets(logits, labels, ignore_index)
    weight = grad.masked_fill(ignored, 0.0).transpose(1, 2).unsqueeze(2)
    total = torch.zeros_like(upsampling.samples)
    for outputs, inputs in upsampling.chunks():
        w = weight[..., outputs].contiguous()
        p = upsampling.forward(outputs, inputs).softmax(dim=2).mul_(w)
        p.scatter_add_(2, targets[..., outputs], -w)
        upsampling.add_transpose(total, p, outputs, inputs)
    return total.permute(0, 2, 3, 1).to(logits.dtype)


def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return reference.upsample_cross_entropy(logits, labels, ignore_index=ignore_index)


_CHUNKED = differentiable(
    _chunked_forward, _chunked_backward, _reference, name="ChunkedCrossEntropy", tensors=1,
    saves=2,
)  # fmt: skip


# ---- registered operations ----------------------------------------------------------------------


def _torch_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    full = _upsampled(logits, labels)
    return _cross_entropy(full, labels, ignore_index).contiguous(), full.logsumexp(dim=1)


def _torch_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    return _channels_last(logits).copy_(_chunked_backward(grad, logits, labels, ignore_index))


def _channels_last(logits: Tensor) -> Tensor:
    batch, classes, h, w = logits.shape
    return logits.new_empty((batch, h, w, classes)).permute(0, 3, 1, 2)


def _fake_forward(logits: Tensor, labels: Tensor, _: int) -> tuple[Tensor, Tensor]:
    loss, lse = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    return loss, lse


def _fake_backward(grad: object, logits: Tensor, *_: object) -> Tensor:
    return _channels_last(logits)


_FORWARD = register(
    "upsample_cross_entropy_fwd",
    "(Tensor logits, Tensor labels, int ignore_index) -> (Tensor loss, Tensor lse)",
    kernels="upsample_cross_entropy",
    torch=_torch_forward,
    fake=_fake_forward,
)
_BACKWARD = register(
    "upsample_cross_entropy_bwd",
    "(Tensor grad, Tensor logits, Tensor labels, Tensor lse, int ignore_index) -> Tensor",
    kernels="upsample_cross_entropy",
    torch=_torch_backward,
    fake=_fake_backward,
)


def _saves(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    return (*inputs[:2], output[1]), inputs[2:]


def _reference_of_saved(logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return _reference(logits, labels, ignore_index)


_TRITON = differentiable(
    _FORWARD, _BACKWARD, _reference_of_saved, name="UpsampleCrossEntropy", tensors=1, saves=_saves
)

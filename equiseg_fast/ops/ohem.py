"""Online hard example mining: the mean of the hard pixels of a loss."""

from math import log

import torch
from torch import Tensor

from . import _checks
from ._math import statistics_dtype


def ohem(loss: Tensor, valid: Tensor, *, thresh: float = 0.7, min_kept_ratio: int = 16) -> Tensor:
    """Online hard example mining: the mean of the hard pixels.

    loss: floating, any shape, the loss of every pixel. valid: bool of the same shape, the pixels
        that count. thresh: in (0, 1], hard pixels have a predicted probability below it.
    min_kept_ratio: at least one in so many valid pixels is kept.

    Returns a scalar in the dtype of loss: the mean over the valid pixels whose loss exceeds
    `-log(thresh)`; if those are fewer than `#valid // min_kept_ratio`, over that many with the
    largest loss; 0 without any selected pixel. A valid pixel of NaN is always among them. Sums are
    in fp32 (fp64 for fp64). Nothing waits for the device and no shape depends on data. Raises
    TypeError or ValueError naming the argument. Source: the segmentation loss of CMNeXt (arXiv
    2303.01480).
    """
    _checks.check_tensor("loss", loss, _checks.FLOATING, "[...]")
    _checks.check_tensor("valid", valid, (torch.bool,), "[...]")
    _checks.check_shape("valid", valid, tuple(loss.shape), "that of loss")
    _checks.check_same_device(loss=loss, valid=valid)
    thresh = _checks.number("thresh", thresh)
    if not 0.0 < thresh <= 1.0:
        raise ValueError(f"thresh must be in (0, 1]; got {thresh}")
    _checks.check_sizes(min_kept_ratio=min_kept_ratio)
    if not _checks.has_values(valid):
        return _ranked(loss.flatten(), valid.flatten(), -log(thresh), min_kept_ratio)
    return _counted(loss.flatten(), valid.flatten(), -log(thresh), min_kept_ratio)


def _ranked(loss: Tensor, valid: Tensor, bound: float, min_kept_ratio: int) -> Tensor:
    """Selects by a mask and by rank, so that nothing waits for the device."""
    hard = valid & ~(loss <= bound)
    least = valid.sum() // min_kept_ratio
    ranked = loss.detach().masked_fill(~valid, float("-inf"))
    # `least` is known to the device only, but is never more than this.
    largest = ranked.topk(loss.shape[0] // min_kept_ratio).indices
    rank = torch.arange(largest.shape[0], device=loss.device)
    hardest = torch.zeros_like(valid).scatter(0, largest, rank < least)
    keep = torch.where(hard.sum() >= least, hard, hardest)
    total = torch.where(keep, loss, 0.0).sum(dtype=statistics_dtype(loss))
    return (total / keep.sum().clamp(min=1)).to(loss.dtype)


def _counted(loss: Tensor, valid: Tensor, bound: float, min_kept_ratio: int) -> Tensor:
    """Ranks only where the hard pixels are too few, which trained networks alone have."""
    least = int(valid.count_nonzero()) // min_kept_ratio
    hard = valid & ~(loss <= bound)
    kept = int(hard.count_nonzero())
    if kept >= least:
        chosen = torch.where(hard, loss, 0.0)
    else:
        ranked = loss.detach().masked_fill(~valid, float("-inf"))
        chosen, kept = loss[ranked.topk(least, sorted=False).indices], least
    return (chosen.sum(dtype=statistics_dtype(loss)) / max(kept, 1)).to(loss.dtype)

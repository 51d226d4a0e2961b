"""Logits of images that are too large for one pass, from windows that overlap."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Integral
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast.ops._checks import check_sequence, check_sizes, rate

Images = Mapping[str, Tensor] | Tensor
Present = Tensor | Collection[str] | None


def sliding_window(
    model: Callable[..., Tensor],
    images: Images,
    *,
    window: Sequence[int],
    overlap: float = 0.5,
    present: Present = None,
    batch_size: int = 4,
) -> Tensor:
    """Logits `[B, K, H, W]` fp32, averaged over windows that overlap; without gradients.

    Windows lie evenly from edge to edge. Each counts most in its middle and next to nothing at its
    border (a squared sine along both axes, scaled so that the weights of every pixel sum to 1): no
    seam shows where one begins. A window that is as large as the images is one plain pass.

    model: an `EQUISeg` in evaluation mode, or whatever takes `(images, present=present)` and
        returns logits at the size of the images, for each image on its own.
    images, present: as for `EQUISeg.forward`.
    window: (height, width) in pixels; multiples of 32 need no padding.
    overlap: in [0, 1), how much of a window the next one covers again at least.
    batch_size: windows of every image per pass.

    Raises TypeError or ValueError naming what is wrong.
    """
    parts = bands(model, images, window, overlap, present, batch_size)
    return torch.cat(list(parts), dim=-2)


def check_window(window: Sequence[int], overlap: float) -> tuple[int, int]:
    """The window as (height, width); overlap is in [0, 1)."""
    check_sequence("window", window, Integral, "two integers")
    if len(window) != 2:
        raise ValueError(f"window must be (height, width); got {tuple(window)}")
    height, width = window
    check_sizes(**{"window[0]": height, "window[1]": width})
    rate("overlap", overlap)
    return height, width


@torch.no_grad()
def bands(
    model: Callable[..., Tensor],
    images: Images,
    window: Sequence[int],
    overlap: float,
    present: Present,
    batch_size: int,
) -> Iterator[Tensor]:
    """What `sliding_window` returns, from top to bottom, `[B, K, rows, W]` at a time.

    Rows leave as soon as no further window reaches them: however tall the images are, the logits of
    one row of windows are held, on the device that they were computed on.
    """
    height, width = check_window(window, overlap)
    check_sizes(batch_size=batch_size)
    if getattr(model, "training", False):
        raise ValueError("model must be in evaluation mode, model.eval(); got one in training mode")
    first = images if isinstance(images, Tensor) else next(iter(images.values()), None)
    if first is None:
        raise ValueError("images must hold at least one modality; got none")
    rows = _axis(first.shape[-2], height, overlap, first.device)
    columns = _axis(first.shape[-1], width, overlap, first.device)

    sums: Tensor | None = None
    finished = 0
    for i, (top, down) in enumerate(rows):
        if sums is not None:
            sums = F.pad(sums[..., finished:, :], (0, 0, 0, finished))
        for j in range(0, len(columns), batch_size):
            group = columns[j : j + batch_size]
            boxes = [
                (..., slice(top, top + len(down)), slice(left, left + len(across)))
                for left, across in group
            ]
            masks = present.repeat(1, len(group)) if isinstance(present, Tensor) else present
            logits = model(_crops(images, boxes), present=masks)
            if sums is None:
                shape = (len(logits) // len(group), logits.shape[1], len(down), first.shape[-1])
                sums = logits.new_zeros(shape, dtype=torch.float32)
            for part, (left, across) in zip(logits.chunk(len(group)), group, strict=True):
                weights = down[:, None] * across
                sums[..., left : left + len(across)].addcmul_(part.float(), weights)
        assert sums is not None  # there is at least one column
        finished = rows[i + 1][0] - top if i + 1 < len(rows) else len(down)
        yield sums[..., :finished, :]


def _crops(images: Images, boxes: Sequence[tuple[EllipsisType, slice, slice]]) -> Images:
    """The boxes of all images, box by box along the axis of the images."""
    if isinstance(images, Tensor):
        return torch.cat([images[box] for box in boxes], dim=-4)
    return {name: torch.cat([x[box] for box in boxes]) for name, x in images.items()}


def _axis(length: int, size: int, overlap: float, device: torch.device) -> list[tuple[int, Tensor]]:
    """Windows along one axis: (first pixel, weights fp32 that sum to 1 at every pixel)."""
    size = min(size, length)
    step = max(1, int(size * (1 - overlap)))
    last = math.ceil((length - size) / step)
    starts = [round(i * (length - size) / max(last, 1)) for i in range(last + 1)]
    profile = torch.sin((torch.arange(size, dtype=torch.float64) + 0.5) * (math.pi / size)) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += profile
    return [
        (start, (profile / total[start : start + size]).to(device, torch.float32))
        for start in starts
    ]

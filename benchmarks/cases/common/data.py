"""Inputs of the benchmarks: three real sensors, pseudo-labels, and random data where none exist.

The sensors are `skimage.data.stereo_motorcycle` (the Motorcycle scene of Middlebury 2014, quarter
size), which scikit-image ships: the left camera, the right camera and the disparity of the left.
It comes without labels of classes; ours are bands of disparity and are called pseudo-labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common.problem import Shape
from benchmarks.cases.common.random_data import generator, random_normal

NAMES = ("left", "right", "disparity")
SIZE = (480, 736)
BANDS = 8
IGNORE = 255
NUM_CLASSES = 25
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WHAT = (
    f"Three sensors of {SIZE[0]} x {SIZE[1]} are the centre of skimage.data.stereo_motorcycle (500 "
    "x 741 pixels). Left and right camera: RGB normalised with the ImageNet mean and deviation. "
    "Disparity of the left camera: divided by its largest finite value, 0 where it was not "
    "measured, repeated to three channels. Pseudo-labels, not annotations: "
    f"{BANDS} bands of equally many pixels by disparity, ignored where it was not measured. Images "
    "of other numbers and sizes are normal noise, their labels patches of random classes."
)


@dataclass(frozen=True)
class Sensors:
    """images `[3, 1, 3, H, W]` fp32 ready for a model; labels `[1, H, W]` int64, pseudo-labels."""

    images: Tensor
    labels: Tensor


@cache
def motorcycle() -> Sensors:
    """The three sensors at their real resolution, cropped at the centre to multiples of 32."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise RuntimeError(
            "the quick suite reads its sensor data from scikit-image: "
            "pip install 'equiseg-fast[bench]'"
        ) from error
    left, right, disparity = stereo_motorcycle()
    top, start = ((n - m) // 2 for n, m in zip(disparity.shape, SIZE, strict=True))
    window = (slice(top, top + SIZE[0]), slice(start, start + SIZE[1]))
    left, right = left[window], right[window]
    disparity = np.where(np.isfinite(disparity), disparity, np.nan)[window]

    known = torch.from_numpy(disparity.copy()).float()
    depth = (known / known.nan_to_num(0.0).max()).nan_to_num(0.0)
    maps = [*(_normalised(x) for x in (left, right)), depth.expand(3, -1, -1)]
    return Sensors(torch.stack(maps)[:, None], _bands(known)[None])


def _normalised(image: np.ndarray) -> Tensor:
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _bands(disparity: Tensor) -> Tensor:
    measured = disparity.isfinite()
    edges = disparity[measured].quantile(torch.arange(1, BANDS) / BANDS)
    labels = torch.bucketize(disparity.nan_to_num(0.0), edges)
    return labels.masked_fill(~measured, IGNORE)


def _is_sensor_size(batch: int, height: int, width: int) -> bool:
    return batch == 1 and (height, width) == SIZE


def images(shape: Shape, seed: int, device: torch.device) -> Tensor:
    """`[M, B, 3, H, W]` fp32: the sensors if they have just this size, else random normal."""
    size = (shape.batch, shape.height, shape.width)
    if shape.modalities == len(NAMES) and _is_sensor_size(*size):
        return motorcycle().images.to(device)
    return random_normal((shape.modalities, size[0], 3, *size[1:]), seed=seed, device=device)


def labels(batch: int, height: int, width: int, seed: int, device: torch.device) -> Tensor:
    """`[B, H, W]` int64: the pseudo-labels if they have just this size, else patches of random
    classes with 5 % ignored, because labels come in regions and never as noise."""
    if _is_sensor_size(batch, height, width):
        return motorcycle().labels.to(device)
    drawn = {"generator": generator(device, seed), "device": device}
    size = (batch, 1, max(height // 64, 1), max(width // 64, 1))
    coarse = torch.randint(0, NUM_CLASSES, size, **drawn)
    full = F.interpolate(coarse.float(), size=(height, width), mode="nearest").long()[:, 0]
    ignored = torch.rand((batch, height, width), **drawn) < 0.05
    return full.masked_fill(ignored, IGNORE)

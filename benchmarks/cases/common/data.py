"""Inputs of the benchmarks: the Motorcycle scene of Middlebury 2014 (quarter size), which
scikit-image ships, and random data where no real ones exist.

Random data are drawn where they are used: the host would need seconds for what a GPU draws in
microseconds. The same seed gives the same values on one kind of device, not across kinds.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common.problem import Shape

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


@cache
def motorcycle() -> tuple[Tensor, Tensor]:
    """The three sensors at their real resolution, cropped at the centre to multiples of 32: images
    `[3, 1, 3, H, W]` fp32 ready for a model, and pseudo-labels `[1, H, W]` int64."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise RuntimeError(
            "the quick suite reads its sensor data from scikit-image: "
            "pip install 'equiseg-fast[bench]'"
        ) from error
    maps = stereo_motorcycle()
    top, start = ((n - m) // 2 for n, m in zip(maps[2].shape, SIZE, strict=True))
    window = (slice(top, top + SIZE[0]), slice(start, start + SIZE[1]))
    left, right, disparity = (torch.from_numpy(x[window].copy()) for x in maps)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    cameras = [(x.permute(2, 0, 1).float() / 255 - mean) / std for x in (left, right)]

    measured, known = disparity.isfinite(), disparity.float().nan_to_num(0.0, 0.0, 0.0)
    depth = known / known.max()
    edges = known[measured].quantile(torch.arange(1, BANDS) / BANDS)
    bands = torch.bucketize(known, edges).masked_fill(~measured, IGNORE)
    return torch.stack([*cameras, depth.expand(3, -1, -1)])[:, None], bands[None]


def images(shape: Shape, seed: int, device: torch.device) -> Tensor:
    """`[M, B, 3, H, W]` fp32: the sensors if they have just this size, else random normal."""
    size = (shape.modalities, shape.batch, 3, shape.height, shape.width)
    if size == (3, 1, 3, *SIZE) and device.type != "meta":
        return motorcycle()[0].to(device)
    return random_normal(size, torch.float32, seed, device)


def labels(size: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """`[B, H, W]` int64: the pseudo-labels if they have just this size, else patches of random
    classes with 5 % ignored, because labels come in regions and never as noise."""
    batch, height, width = size
    if tuple(size) == (1, *SIZE) and device.type != "meta":
        return motorcycle()[1].to(device)
    drawn = {"generator": _generator(device, seed), "device": device}
    patches = (batch, 1, max(height // 64, 1), max(width // 64, 1))
    coarse = torch.randint(0, NUM_CLASSES, patches, **drawn)
    full = F.interpolate(coarse.float(), size=(height, width), mode="nearest").long()[:, 0]
    return full.masked_fill(torch.rand(full.shape, **drawn) < 0.05, IGNORE)


def random_normal(
    size: Sequence[int], dtype: torch.dtype, seed: int, device: torch.device, scale: float = 1.0
) -> Tensor:
    """Contiguous normal random numbers, drawn in fp32 and rounded once; scale: their deviation."""
    values = torch.randn(tuple(size), generator=_generator(device, seed), device=device)
    return values.mul_(scale).to(dtype)


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    """A generator of its own on that device; None on "meta", where nothing is drawn."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

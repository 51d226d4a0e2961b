"""Random changes of training samples: one geometry for all that belongs to a scene, and light for
its cameras."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from equiseg_fast.ops._checks import check_sequence, check_sizes, number, positive

from .samples import Sample
from .sensors import Sensor

SMOOTH = ("camera", "thermal")
"""Kinds of sensors whose images are interpolated. Between two ranges, or a point of a lidar and its
empty neighbour, lies nothing that anybody measured: all others, and labels, keep the nearest."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """The augmentation that published multimodal segmenters train with.

    All sensors, labels and the distance together: a random resized crop and a horizontal flip.
    Cameras alone, each by its own draw: brightness, contrast and saturation, then a 3x3 Gaussian
    blur. As in the code of DeLiVER (github.com/jamycheung/DELIVER, `augmentations_mm.py`), except
    that there crops may begin a pixel too far, measurements are interpolated, and images that
    shrink are sampled, where here they are averaged.

    crop: (height, width) of what comes out. The scene is resized so that its shorter side becomes
    u * height (less, where the longer side would exceed 4 u * width), and a random part is cut out;
    what is missing on the right and at the bottom is 0, and ignored in labels. scale: lowest and
    highest u, drawn uniformly. flip, jitter, blur: probabilities. With jitter, brightness, contrast
    and saturation are multiplied by 0.5 to 1.5 each.

    Raises TypeError or ValueError naming the field on a value that it cannot have.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.2
    blur: float = 0.2

    def __post_init__(self) -> None:
        for field in ("crop", "scale"):
            pair = getattr(self, field)
            check_sequence(field, pair, object, "two numbers")
            if len(pair) != 2:
                raise ValueError(f"{field} must have two numbers; got {pair!r}")
        check_sizes(**{"crop[0]": self.crop[0], "crop[1]": self.crop[1]})
        object.__setattr__(self, "crop", (int(self.crop[0]), int(self.crop[1])))
        low, high = (positive(f"scale[{i}]", x) for i, x in enumerate(self.scale))
        if low > high:
            raise ValueError(f"scale must be lowest and highest; got {self.scale!r}")
        object.__setattr__(self, "scale", (low, high))
        for field in ("flip", "jitter", "blur"):
            chance = number(field, getattr(self, field))
            if not 0 <= chance <= 1:
                raise ValueError(f"{field} must be a probability, 0 to 1; got {chance}")
            object.__setattr__(self, field, chance)

    def __call__(
        self,
        sample: Sample,
        sensors: Sequence[Sensor],
        ignore_index: int,
        generator: torch.Generator,
    ) -> Sample:
        """A raw sample changed, all images fp32 of the size of the crop.

        sample: raw, its images of one size, from 0 to 1 / scale for cameras. generator: of the
        CPU; all that is random comes from it, the same number of draws whatever is absent. Raises
        ValueError naming the sample and what in it has another shape.
        """
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {generator!r}")
        size = _size_of(sample, sensors)
        smooth, nearest = self._geometry(size, _draw(4, generator))
        images = {}
        for sensor in sensors:
            x = sample.images[sensor.name].float()
            if sensor.kind == "camera":
                x = self._light(x, 1 / sensor.scale, _draw(5, generator))
            images[sensor.name] = smooth(x) if sensor.kind in SMOOTH else nearest(x, 0)
        return replace(
            sample,
            images=images,
            labels=None if sample.labels is None else nearest(sample.labels, ignore_index),
            distance=None if sample.distance is None else nearest(sample.distance, 0),
        )

    def _geometry(
        self, size: tuple[int, int], draws: list[float]
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]:
        """What takes `[.., H, W]` to the crop, interpolating, and to the nearest and a filling."""
        zoom, down, right, mirror = draws
        low, high = self.scale
        u = low + (high - low) * zoom
        box = int(u * self.crop[0]), int(u * 4 * self.crop[1])
        factor = min(max(box) / max(size), min(box) / min(size))
        resized = [max(1, int(factor * n + 0.5)) for n in size]
        ranges = []
        for draw, n, crop in zip((down, right), resized, self.crop, strict=True):
            start = int(draw * (max(0, n - crop) + 1))
            ranges.append(torch.arange(start, min(n, start + crop)))
        if mirror < self.flip:
            ranges[1] = ranges[1].flip(0)
        missing = (0, self.crop[1] - len(ranges[1]), 0, self.crop[0] - len(ranges[0]))

        def smooth(x: Tensor) -> Tensor:
            x = F.interpolate(x[None], resized, mode="bilinear", antialias=True)[0]
            return F.pad(x[:, ranges[0][:, None], ranges[1]], missing)

        def nearest(x: Tensor, filling: int) -> Tensor:
            # Of the pixel in which the middle of the new one lies.
            rows, columns = (
                ((r + 0.5) * (n / new)).long().clamp(max=n - 1)
                for r, n, new in zip(ranges, size, resized, strict=True)
            )
            return F.pad(x[..., rows[:, None], columns], missing, value=filling)

        return smooth, nearest

    def _light(self, x: Tensor, white: float, draws: list[float]) -> Tensor:
        """A camera's image `[C, H, W]`, 0 to white, in another light or out of focus; 0 stays 0."""
        change, brightness, contrast, saturation, defocus = draws
        if change < self.jitter:
            x = (x * (0.5 + brightness)).clamp(0, white)
            # By NumPy, whose sum does not depend on the number of threads.
            x = _blend(x, float(_grey(x).numpy().mean(dtype="float64")), 0.5 + contrast, white)
            x = _blend(x, _grey(x), 0.5 + saturation, white)
        if defocus < self.blur:
            side = math.exp(-1 / (2 * 0.8**2))  # a standard deviation of 0.8 pixels
            weights = [w / (1 + 2 * side) for w in (side, 1.0, side)]
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            for axis in (1, 2):
                n = x.shape[axis] - 2
                before, here, after = (w * x.narrow(axis, i, n) for i, w in enumerate(weights))
                x = before + here + after
            x = x.clamp(0, white)
        return x


def _draw(count: int, generator: torch.Generator) -> list[float]:
    draws: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return draws


def _grey(x: Tensor) -> Tensor:
    """`[C, H, W]` -> `[1, H, W]`: luma of red, green and blue, the mean of other channels."""
    if len(x) != 3:
        return x.mean(0, keepdim=True)
    red, green, blue = (w * channel for w, channel in zip(_LUMA, x, strict=True))
    return (red + green + blue)[None]


def _blend(x: Tensor, other: Tensor | float, share: float, white: float) -> Tensor:
    return (share * x + (1 - share) * other).clamp(0, white)


def _size_of(sample: Sample, sensors: Sequence[Sensor]) -> tuple[int, int]:
    """(height, width) that all images of a sample, its labels and distance share."""
    for sensor in sensors:
        if sensor.name not in sample.images:
            raise ValueError(
                f"{sample.name}: images must have {sensor.name}; got {list(sample.images)}"
            )
    first = sensors[0]
    height, width = sample.images[first.name].shape[-2:]
    shapes = {s.name: (sample.images[s.name], [s.channels, height, width]) for s in sensors}
    for name in ("labels", "distance"):
        x = getattr(sample, name)
        if x is not None:
            shapes[name] = (x, [height, width])
    for name, (x, shape) in shapes.items():
        if list(x.shape) != shape:
            raise ValueError(
                f"{sample.name}: {name} must have shape {shape}, the size of {first.name}; got "
                f"{list(x.shape)}"
            )
    return height, width

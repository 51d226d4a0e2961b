"""Sensors: what a modality is, and how its values become what a model sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equiseg_fast.ops._checks import check_choice, check_sequence, number, positive

Kind = Literal["camera", "thermal", "depth", "event", "lidar", "other"]
KINDS: tuple[Kind, ...] = ("camera", "thermal", "depth", "event", "lidar", "other")

Palette = tuple[tuple[int, int, int], ...]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sensor:
    """One modality. A model sees (value * scale - mean) / std of it, channel by channel.

    name: that of the modality, and of its folder. kind: decides which degradations and
    augmentations apply, and how it is resized. scale: positive, multiplies the values as they are
    in files (1/255 for 8 bits). mean, std: of every channel after scaling; there are as many
    channels as numbers in them. Sequences may be lists, and are tuples afterwards.

    Raises TypeError or ValueError naming the field on a value that it cannot have.
    """

    name: str
    kind: Kind = "other"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a string that is not empty; got {self.name!r}")
        check_choice("kind", self.kind, KINDS)
        object.__setattr__(self, "scale", positive("scale", self.scale))
        for field, convert in (("mean", number), ("std", positive)):
            values = getattr(self, field)
            check_sequence(field, values, object, "numbers")
            values = tuple(convert(f"{field}[{i}]", x) for i, x in enumerate(values))
            object.__setattr__(self, field, values)
        if not 1 <= len(self.mean) <= 16 or len(self.std) != len(self.mean):
            raise ValueError(
                "mean and std must have one number per channel, for 1 to 16 channels; got "
                f"{len(self.mean)} and {len(self.std)}"
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def normalise(self, values: Tensor) -> Tensor:
        """Values as in files, `[.., C, H, W]` -> what the model sees, fp32."""
        mean, std = self._statistics(values)
        return (values.float() * self.scale - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        """What the model sees, `[.., C, H, W]` -> values as in files, fp32."""
        mean, std = self._statistics(x)
        return (x.float() * std + mean) / self.scale

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(s, device=x.device)[:, None, None] for s in (self.mean, self.std))
        return mean, std


def camera(name: str = "rgb") -> Sensor:
    """A colour camera of 8 bits with the statistics of ImageNet, as published encoders want it."""
    return Sensor(name, "camera", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)


_USUAL: dict[str, tuple[Kind, int]] = {
    **dict.fromkeys(("rgb", "camera", "frame_camera", "image", "img", "color"), ("camera", 3)),
    **dict.fromkeys(("thermal", "infrared", "ir", "nir"), ("thermal", 1)),
    "depth": ("depth", 1),
    "hha": ("depth", 3),
    **dict.fromkeys(("event", "events", "event_camera"), ("event", 3)),
    "lidar": ("lidar", 1),
}
"""Names that say what a sensor is: its kind and its channels."""


def sensor(name: str) -> Sensor:
    """The usual settings of a sensor with a usual name, in any case, for files of 8 bits.

    Cameras have the statistics of ImageNet, all others values in [0, 1] as they are. Raises
    TypeError for what is no name, and ValueError listing the usual names for any other.
    """
    if not isinstance(name, str):
        raise TypeError(f"sensors must be Sensor or names of usual ones; got {name!r}")
    if not is_usual(name):
        raise ValueError(
            "sensors must be declared with kind, scale, mean and std unless they are called "
            f"{', '.join(_USUAL)}; got {name!r}"
        )
    kind, channels = _USUAL[name.lower()]
    if kind == "camera":
        return camera(name)
    return Sensor(name, kind, mean=(0.0,) * channels, std=(1.0,) * channels)


def is_usual(name: str) -> bool:
    """Whether `sensor` knows the name."""
    return isinstance(name, str) and name.lower() in _USUAL


def as_sensors(sensors: Sequence[Sensor | str]) -> tuple[Sensor, ...]:
    """Sensors, or names of usual ones, as `check_sensors` gives them."""
    check_sequence("sensors", sensors, object, "Sensor or names")
    return check_sensors([x if isinstance(x, Sensor) else sensor(x) for x in sensors])


def check_sensors(sensors: Sequence[Sensor]) -> tuple[Sensor, ...]:
    """The sensors as a tuple: 1 to 8 of them with unique names."""
    check_sequence("sensors", sensors, Sensor, "Sensor")
    names = [sensor.name for sensor in sensors]
    if not 1 <= len(names) <= 8 or len(set(names)) != len(names):
        raise ValueError(f"sensors must be 1 to 8 with unique names; got {names}")
    return tuple(sensors)


def named(
    name: str, chosen: Sequence[Sensor | str], sensors: Sequence[Sensor]
) -> tuple[Sensor, ...]:
    """Those chosen of the sensors of a dataset, each by its name or as one of that name with
    other settings; name: of the argument."""
    check_sequence(name, chosen, object, "names or Sensor")
    known = {sensor.name: sensor for sensor in sensors}
    for x in chosen:
        if (x.name if isinstance(x, Sensor) else x) not in list(known):  # x may be anything
            raise ValueError(f"{name} must be of {', '.join(known)}; got {x!r}")
    return check_sensors([x if isinstance(x, Sensor) else known[x] for x in chosen])


def check_palette(palette: Sequence[Sequence[int]] | None, count: int) -> Palette | None:
    """Colours of `count` classes as a tuple of (red, green, blue), each 0 to 255."""
    if palette is None:
        return None
    check_sequence("palette", palette, Sequence, "colours (red, green, blue)")
    if len(palette) != count:
        raise ValueError(f"palette must have {count} colours, one per class; got {len(palette)}")
    for colour in palette:
        check_sequence("palette", colour, int, "colours (red, green, blue)")
        if len(colour) != 3 or not all(0 <= x <= 255 for x in colour):
            raise ValueError(f"palette must have colours of three 0 to 255; got {list(colour)}")
    return tuple((int(r), int(g), int(b)) for r, g, b in palette)

"""What weather, darkness and defects make of the raw values of sensors, by their kind.

A degradation of severity 0 changes nothing and one of 1 is the worst. It follows from the seed, the
name of the sample, that of the degradation and that of the sensor; the same chance serves all
severities, so that what is lost at one is lost at all above. Labels never change. Values stay those
of files: a camera and an event sensor end at 1 / scale, and are whole numbers where that is 255 or
more. Sensors that are absent stay so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch

from equiseg_fast.ops._checks import check_choice, check_seed, number

from .samples import Sample, SensorDataset, Wrapped
from .sensors import Kind, Sensor

Array = np.ndarray
GAMMA = 2.2


@dataclass(frozen=True)
class View:
    """What a degradation may know: the sensor, metres `[H, W]` from the camera, and its chance."""

    sensor: Sensor
    distance: Array
    known: bool
    """Whether distance is that of the scene, and not of a flat road under the horizon."""
    rng: np.random.Generator

    @property
    def white(self) -> float:
        return 1 / self.sensor.scale


Effect = Callable[[Array, float, View], Array]
"""(values `[C, H, W]`, severity above 0, view) -> new values."""


def degradations_for(sensors: Sequence[Sensor]) -> list[str]:
    """Names of all that can happen to one of these sensors."""
    kinds = {sensor.kind for sensor in sensors}
    happens = [name for name, effects in DEGRADATIONS.items() if kinds & effects.keys()]
    return happens + [f"dead_{sensor.name}" for sensor in sensors]


def degrade(
    sample: Sample, sensors: Sequence[Sensor], name: str, severity: float, seed: int
) -> Sample:
    """A raw sample under a degradation; the one given is not changed.

    name: one of `degradations_for(sensors)`. severity: 0 to 1. Where the sample has no distance, it
    is that of a flat road, 1.6 m below a camera of 70 degrees whose horizon is at half height.
    """
    _check(sensors, name, severity, seed)
    if severity == 0:
        return sample
    images = dict(sample.images)
    known = sample.distance is not None
    for i, sensor in enumerate(sensors):
        if not sample.present[i]:
            continue
        effect = _effect(name, sensor)
        if effect is None:
            continue
        values = images[sensor.name].float().numpy()
        if sample.distance is not None:
            distance = sample.distance.numpy()
        else:
            distance = flat_road(*values.shape[1:])
        chance = np.random.default_rng(
            (seed % 2**64, *(crc32(text.encode()) for text in (sample.name, name, sensor.name)))
        )
        changed = effect(values, float(severity), View(sensor, distance, known, chance))
        images[sensor.name] = torch.from_numpy(np.ascontiguousarray(changed, np.float32))
    return replace(sample, images=images)


def _check(sensors: Sequence[Sensor], name: str, severity: float, seed: int) -> None:
    check_choice("name", name, degradations_for(sensors))
    if not 0 <= number("severity", severity) <= 1:
        raise ValueError(f"severity must be in [0, 1]; got {severity}")
    check_seed(seed)


def _effect(name: str, sensor: Sensor) -> Effect | None:
    if name == f"dead_{sensor.name}":
        return dead
    return DEGRADATIONS.get(name, {}).get(sensor.kind)


class Degraded(Wrapped):
    """A dataset under a degradation: all its samples, at one severity."""

    def __init__(self, dataset: SensorDataset, name: str, severity: float, seed: int = 0) -> None:
        _check(dataset.sensors, name, severity, seed)
        super().__init__(dataset)
        self.name, self.severity, self.seed = name, severity, seed

    def raw(self, index: int) -> Sample:
        return degrade(self.dataset.raw(index), self.sensors, self.name, self.severity, self.seed)


def flat_road(height: int, width: int) -> Array:
    """Metres `[H, W]` to a flat road, 1.6 m below a camera of 70 degrees; 200 above the horizon."""
    focal = 0.72 * width
    below = (np.arange(height, dtype=np.float32) + 0.5 - height / 2)[:, None]
    distance = np.where(below > 0, 1.6 * focal / np.maximum(below, 0.5), 200.0)
    return np.broadcast_to(np.minimum(distance, 200.0), (height, width)).astype(np.float32)


def dead(x: Array, severity: float, _: View) -> Array:
    """The last rows are not read out, at severity 1 none is: zeros."""
    x = x.copy()
    x[:, round((1 - severity) * x.shape[1]) :] = 0
    return x


def _linear(x: Array, view: View) -> Array:
    """Light, 1 at white, of what a camera wrote with its gamma."""
    return np.clip(x / np.float32(view.white), 0, 1) ** np.float32(GAMMA)


def _written(light: Array, view: View) -> Array:
    x = np.clip(light, 0, 1) ** np.float32(1 / GAMMA) * np.float32(view.white)
    return np.rint(x) if view.white >= 255 else x


def _night(x: Array, severity: float, view: View) -> Array:
    """Down to a 2000th of the light and the beam of headlights where distance is known; half of it
    made up by gain, which shows photon noise (white are 10 000 electrons) and 4 electrons of the
    readout."""
    dim = 2000.0**-severity
    light = _linear(x, view)
    if view.known:
        beam = np.minimum(1, (6 / np.maximum(view.distance, 1)) ** 2)
        lit = dim + severity * 0.004 * beam
    else:
        lit = np.float32(dim)
    electrons = 10_000 * light * np.minimum(lit, 1)
    shot, read = view.rng.standard_normal((2, *x.shape), np.float32)
    electrons = electrons + np.sqrt(electrons) * shot + 4 * min(1.0, 4 * severity) * read
    return _written(electrons / np.float32(10_000) * np.float32(dim**-0.5), view)


def _over_exposure(x: Array, severity: float, view: View) -> Array:
    """Up to 5 stops too much; what is beyond white glares around itself."""
    light = _linear(x, view) * np.float32(2.0 ** (5 * severity))
    excess = np.clip(light - 1, 0, 2)
    sigma = 0.03 * x.shape[1]
    glare = np.stack([_cv2().GaussianBlur(plane, (0, 0), sigma) for plane in excess])
    return _written(light + np.float32(0.3 * severity) * glare, view)


def _motion_blur(x: Array, severity: float, view: View) -> Array:
    """The camera turns while it exposes, mostly sideways, over up to an eighth of the width."""
    cv2 = _cv2()
    length = severity * x.shape[2] / 8
    angle = view.rng.uniform(-0.35, 0.35)
    half = int(np.ceil(length / 2))
    steps = np.linspace(-length / 2, length / 2, 8 * half + 1)
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    across, along = half + steps * np.cos(angle), half + steps * np.sin(angle)
    for di in (0, 1):
        for dj in (0, 1):
            i, j = np.floor(along).astype(int) + di, np.floor(across).astype(int) + dj
            weight = (1 - np.abs(along - i)) * (1 - np.abs(across - j))
            inside = (i >= 0) & (j >= 0) & (i <= 2 * half) & (j <= 2 * half)
            np.add.at(kernel, (i[inside], j[inside]), weight[inside])
    kernel /= kernel.sum()
    planes = [
        cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_REFLECT) for plane in _linear(x, view)
    ]
    return _written(np.stack(planes), view)


def _clear(severity: float, view: View) -> Array:
    """Share of light that passes the fog one way; at severity 1 one sees 20 m (5 % of contrast)."""
    return np.exp(np.float32(-0.15 * severity**2) * view.distance)


def _fog_camera(x: Array, severity: float, view: View) -> Array:
    """Koschmieder: light fades, and the airlight takes its place."""
    clear = _clear(severity, view)
    return _written(_linear(x, view) * clear + np.float32(0.65) * (1 - clear), view)


def _fog_depth(x: Array, severity: float, view: View) -> Array:
    """No match where less than a sixth of contrast is left."""
    limit = 0.12 + 0.1 * view.rng.random(view.distance.shape, np.float32)
    return x * (_clear(severity, view) > limit)


def _fog_event(x: Array, severity: float, view: View) -> Array:
    """Contrast fades, and with it the steps that are counted: whole ones."""
    part = view.rng.random(x.shape, np.float32)
    return np.copysign(np.floor(np.abs(x) * _clear(severity, view) + part), x)


def _fog_lidar(x: Array, severity: float, view: View) -> Array:
    """Light fades both ways; of the returns that are lost, some come from the fog before them."""
    chance = view.rng.random((3, *view.distance.shape), np.float32)
    clear = _clear(severity, view) ** 2
    back = chance[0] < clear
    near = ~back & (chance[1] < 0.3) & (x[0] > 0)
    y = x * back
    y[0] += np.where(near, x[0] * (0.05 + 0.35 * chance[2]), 0)
    if len(y) > 1:  # the light that came back
        y[1] *= np.maximum(clear, 0.05)
        y[1] += np.where(near, 0.1 * x[1], 0)
    return y


def _lidar_dropout(x: Array, severity: float, view: View) -> Array:
    """Points and whole lines are lost, at severity 1 nearly all."""
    height, width = x.shape[1:]
    point = view.rng.random((height, width), np.float32) < 0.9 * severity
    line = np.repeat(view.rng.random(48), -(-height // 48))[:height] < 0.6 * severity
    return x * ~(point | line[:, None])


def _lidar_jitter(x: Array, severity: float, view: View) -> Array:
    """Points stray, by up to 4 % of the width and 20 % of their range (standard deviations)."""
    height, width = x.shape[1:]
    stray = view.rng.standard_normal((3, height, width), np.float32) * np.float32(severity)
    i, j = np.nonzero(x.any(axis=0))
    to_i = np.rint(i + 0.02 * width * stray[0, i, j]).astype(int)
    to_j = np.rint(j + 0.04 * width * stray[1, i, j]).astype(int)
    values = x[:, i, j].copy()
    values[0] *= np.maximum(0.1, 1 + 0.2 * stray[2, i, j])
    inside = (to_i >= 0) & (to_i < height) & (to_j >= 0) & (to_j < width)
    # the nearest of those that meet is written last
    order = np.argsort(-values[0][inside], kind="stable")
    y = np.zeros_like(x)
    y[:, to_i[inside][order], to_j[inside][order]] = values[:, inside][:, order]
    return y


def _event_noise(x: Array, severity: float, view: View) -> Array:
    """Events without cause in up to a third of the pixels, as strong as the median of those there
    are, and up to 2 % of hot pixels at 1 / scale. A third channel that is empty stays empty."""
    some = np.abs(x[x != 0])
    unit = float(np.median(some)) if some.size else view.white
    chance = view.rng.random((2, *x.shape), np.float32)
    sign = np.where(view.rng.random(x.shape, np.float32) < 0.5, -1, 1) if len(x) == 1 else 1
    y = x + sign * unit * (chance[0] < 0.33 * severity)
    y = np.where(chance[1] < 0.02 * severity, sign * view.white, y)
    if len(x) > 2:
        y *= x.any(axis=(1, 2), keepdims=True)
    # what was there before stays, also beyond 1 / scale
    most = np.maximum(np.abs(x), view.white)
    return np.clip(y, -most, most)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            'this degradation needs OpenCV: pip install "equiseg-fast[train]"'
        ) from error
    return cv2


DEGRADATIONS: dict[str, dict[Kind, Effect]] = {
    "night": {"camera": _night},
    "over_exposure": {"camera": _over_exposure},
    "motion_blur": {"camera": _motion_blur},
    "fog": {"camera": _fog_camera, "depth": _fog_depth, "event": _fog_event, "lidar": _fog_lidar},
    "lidar_dropout": {"lidar": _lidar_dropout},
    "lidar_jitter": {"lidar": _lidar_jitter},
    "event_noise": {"event": _event_noise},
}
"""By name, what happens to sensors of which kinds; besides these there is "dead_<sensor>" for every
sensor of whatever kind, whose rows are not read out any more."""

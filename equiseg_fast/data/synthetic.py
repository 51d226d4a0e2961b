"""Streets that are rendered while you wait, in which every sensor sees what the others cannot."""

from collections.abc import Sequence

import numpy as np
import torch

from equiseg_fast.ops._checks import check_seed, check_sequence, check_sizes

from ._render import Array, Canvas, noise
from ._street import CLASSES, PALETTE, SKY, Builder, Street
from .samples import Sample, SensorDataset
from .sensors import Sensor, named

FAR = 1000.0
"""Distance of the sky, metres."""
DEPTH_RANGE = 60.0
LIDAR_RANGE = 80.0
MOST_EVENTS = 10.0

# Mean and standard deviation of scaled values over 600 scenes of 96 x 128; a test measures again.
SENSORS = (
    Sensor("rgb", "camera", 1 / 255, (0.448, 0.467, 0.480), (0.165, 0.170, 0.200)),
    Sensor("depth", "depth", 1 / DEPTH_RANGE, (0.164,), (0.186,)),
    Sensor("event", "event", 1 / MOST_EVENTS, (0.014, 0.014), (0.070, 0.070)),
    Sensor("lidar", "lidar", 1 / 100, (0.019, 0.040), (0.064, 0.116)),
)


class SyntheticScenes(SensorDataset):
    """`length` rendered street scenes, 13 classes, up to four sensors.

    - rgb (camera, 3 channels, 0 to 255) alone sees colour: sidewalk from terrain, but also people
      on posters, which it cannot tell from people.
    - depth (1 channel, metres along the optical axis): a stereo camera that reaches 60 m, with
      noise that grows with the square of depth and no value (0) here and there. The ground is one
      plane to it.
    - event (2 channels, positive and negative counts of 80 ms, up to 10): where the logarithm of
      light moves, by the camera's own slow motion and by what moves. It alone tells a car that
      moves from one that stands.
    - lidar (2 channels, range in metres up to 80 and reflectance in percent; 0 between points):
      24 scan lines. Signs, plates and, less so, markings shine in the dark as by day.

    size: (H, W), multiples of 32. sensors: some of them in the order wanted, by name or as `Sensor`
        with statistics of one's own; None is all.

    A scene follows from (seed, index) alone, bit for bit on one machine, whatever else is rendered.
    """

    classes = CLASSES
    palette = PALETTE

    def __init__(
        self,
        size: tuple[int, int] = (96, 128),
        length: int = 1000,
        seed: int = 0,
        sensors: Sequence[str | Sensor] | None = None,
    ) -> None:
        check_sequence("size", size, int, "two integers")
        if len(size) != 2 or any(n < 32 or n % 32 for n in size):
            raise ValueError(f"size must be (H, W), multiples of 32; got {size}")
        check_sizes(length=length)
        check_seed(seed)
        if seed < 0:
            raise ValueError(f"seed must be at least 0; got {seed}")
        self.size, self.length, self.seed = (int(size[0]), int(size[1])), int(length), int(seed)
        self.sensors = SENSORS if sensors is None else _chosen(sensors)

    def __len__(self) -> int:
        return self.length

    def raw(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        scene = Scene(self.size, rng)
        # all sensors draw, so that one does not change with which others are asked for
        values = {
            "rgb": scene.rgb(),
            "depth": scene.stereo(),
            "event": scene.events(),
            "lidar": scene.lidar(),
        }
        return Sample(
            f"synthetic-{self.seed}-{index:06d}",
            {s.name: torch.from_numpy(np.ascontiguousarray(values[s.name])) for s in self.sensors},
            torch.ones(len(self.sensors), dtype=torch.bool),
            torch.from_numpy(scene.labels.astype(np.int64)),
            torch.from_numpy(scene.distance),
        )


def _chosen(sensors: Sequence[str | Sensor]) -> tuple[Sensor, ...]:
    channels = {sensor.name: sensor.channels for sensor in SENSORS}
    chosen = named("sensors", sensors, SENSORS)
    for x in chosen:
        if x.channels != channels[x.name]:
            raise ValueError(f"sensors: {x.name} has {channels[x.name]} channels; got {x.channels}")
    return chosen


class Scene:
    """A street, its light, and what sensors make of it: fp32 arrays `[C, H, W]`."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.rng = rng
        azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.1)
        ahead = np.cos(azimuth) * np.cos(elevation)
        sun = (np.sin(azimuth) * np.cos(elevation), np.sin(elevation), ahead)
        lane = rng.uniform(1.7, 2.6)
        place = (lane * rng.uniform(0.3, 1.2), rng.uniform(1.4, 2.0), 0.0)
        yaw, pitch = rng.normal(0, 0.07), rng.normal(-0.05, 0.02)
        focal = 0.72 * size[1]
        self.canvas = Canvas(size, focal, place, yaw, pitch, sun)
        self.street: Street = Builder(self.canvas, rng, lane).build()
        depth = self.canvas.depth
        self.sky = ~np.isfinite(depth)
        classes = np.array(self.street.classes)
        self.labels = np.where(self.sky, SKY, classes[self.canvas.thing])
        slant = np.sqrt(1 + self.canvas.x**2 + self.canvas.y**2)
        self.distance = np.where(self.sky, np.float32(FAR), depth * slant).astype(np.float32)
        self.light = self._light(elevation)

    def _light(self, elevation: float) -> Array:
        """Linear light `[3, H, W]` that reaches the camera."""
        rng, canvas = self.rng, self.canvas
        overcast = rng.random() < 0.3
        warm = np.clip(1 - elevation / 0.9, 0, 1) * (not overcast)
        sun = np.array((1.0, 1 - 0.25 * warm, 1 - 0.55 * warm), np.float32)
        sun *= rng.uniform(0.05, 0.25) if overcast else rng.uniform(0.8, 1.3)
        shade = np.array((0.92, 1.0, 1.1), np.float32)
        shade *= rng.uniform(0.7, 0.9) if overcast else rng.uniform(0.2, 0.45)
        light = canvas.albedo * (shade[:, None, None] + sun[:, None, None] * canvas.lambert)
        # the sky fades toward the horizon; clouds are flat
        high = np.clip(canvas.rays[1] * 2.2, 0, 1)
        zenith = np.array((0.5, 0.52, 0.55) if overcast else (0.16, 0.3, 0.62), np.float32)
        horizon = np.array((0.62, 0.64, 0.66), np.float32) * (0.6 + 0.4 * sun)
        sky = horizon[:, None, None] + (zenith - horizon)[:, None, None] * high
        rise = np.maximum(canvas.rays[1], 0.06)
        cover = self._clouds(canvas.rays[0] / rise, canvas.rays[2] / rise)
        sky += (0.8 - sky) * cover
        haze = 1 - np.exp(np.minimum(self.distance, 300.0) * np.float32(-1 / rng.uniform(250, 900)))
        light += (horizon[:, None, None] - light) * haze
        return np.where(self.sky, sky, light)

    def _clouds(self, x: Array, z: Array) -> Array:
        amount = self.rng.uniform(-0.4, 0.6)
        return np.clip(0.5 * noise(x + 50, z + 50, 6.0) + np.float32(amount), 0, 0.9)

    def rgb(self) -> Array:
        """A camera whose exposure is automatic but for half a stop, with a gamma of 2.2."""
        rng = self.rng
        exposure = 0.24 / float(self.light.mean()) * 2 ** rng.uniform(-0.9, 0.6)
        grain = rng.standard_normal(self.light.shape, np.float32)
        linear = np.clip(self.light * np.float32(exposure), 1e-4, 1)
        return np.clip(np.rint(linear ** np.float32(1 / 2.2) * 255 + 2.5 * grain), 0, 255)

    def stereo(self) -> Array:
        rng = self.rng
        depth = np.where(self.sky, np.float32(FAR), self.canvas.depth)
        error = rng.standard_normal(depth.shape, np.float32)
        seen = (depth < DEPTH_RANGE) & (rng.random(depth.shape, np.float32) > 0.02)
        # half a percent at 5 m, and in proportion to depth beside
        noisy = depth + error * depth * depth * np.float32(0.001)
        return np.where(seen, np.clip(noisy, 0.1, DEPTH_RANGE), 0)[None].astype(np.float32)

    def events(self) -> Array:
        """Change of the logarithm of light by the flow of 80 ms, in steps of a contrast."""
        rng, canvas = self.rng, self.canvas
        seconds, contrast = 0.08, 0.12
        own = np.array((0, 0, rng.uniform(0.3, 2.0)))
        turn = rng.normal(0, 0.05)
        moves = (np.array(self.street.velocities) - own) @ canvas.axes.T * seconds
        right, up, ahead = np.moveaxis(moves.astype(np.float32)[canvas.thing], -1, 0)
        inverse = np.where(self.sky, 0, 1 / canvas.depth) * np.float32(canvas.focal)
        sideways = (right - canvas.x * ahead) * inverse
        sideways -= np.float32(turn * seconds * canvas.focal) * (1 + canvas.x**2)
        upward = (up - canvas.y * ahead) * inverse
        brightness = np.log(self.light.mean(axis=0) + np.float32(0.01))
        padded = np.pad(brightness, 1, mode="edge")
        across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
        along = (padded[:-2, 1:-1] - padded[2:, 1:-1]) / 2
        change = -(across * np.clip(sideways, -4, 4) + along * np.clip(upward, -4, 4))
        change += np.float32(0.04) * rng.standard_normal(change.shape, np.float32)
        counts = np.minimum(np.floor(np.abs(change) / np.float32(contrast)), MOST_EVENTS)
        return np.stack([counts * (change > 0), counts * (change < 0)]).astype(np.float32)

    def lidar(self) -> Array:
        """24 lines of points 0.8 degrees apart, rigid on the camera; weak returns are lost."""
        rng, canvas = self.rng, self.canvas
        height, width = canvas.size
        azimuth = np.radians(np.arange(-45, 45, 0.8) + rng.uniform(0, 0.8))
        lines = np.radians(np.linspace(-24, 7, 24))[:, None]
        column = np.floor(width / 2 + canvas.focal * np.tan(azimuth))
        row = np.floor(height / 2 - canvas.focal * np.tan(lines) / np.cos(azimuth))
        column = np.broadcast_to(column, row.shape)
        seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        i, j = row[seen].astype(int), column[seen].astype(int)
        distance, reflectance = self.distance[i, j], canvas.reflectance[i, j]
        spread = rng.standard_normal((2, i.size), np.float32)
        # every factor of 2 in distance leaves a quarter of the light
        power = (reflectance + 2) * (40 / np.maximum(distance, 1)) ** 2
        back = (distance < LIDAR_RANGE) & (rng.random(i.size, np.float32) < np.minimum(power, 0.95))
        i, j = i[back], j[back]
        values = np.zeros((2, height, width), np.float32)
        values[0, i, j] = np.clip(distance + 0.02 * spread[0], 0.1, LIDAR_RANGE)[back]
        values[1, i, j] = np.clip(reflectance * (1 + 0.1 * spread[1]), 1, 100)[back]
        return values

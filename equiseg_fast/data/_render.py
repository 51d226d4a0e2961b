"""A pinhole camera with a z-buffer that paints boxes, flat shapes and balls: what `synthetic` and
`_street` build scenes of. numpy in fp32, one sample per pixel, so that labels are exact."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Array = np.ndarray
Point = tuple[float, float, float]
Colour = tuple[float, float, float]
Texture = Callable[[int, Array, Array], tuple[Array | Colour, Array | float]]
"""(axis of the face, two coordinates in metres from the low corner) -> albedo and reflectance."""

NEAR = 0.5


@lru_cache(maxsize=1)
def _tile() -> Array:
    """Noise `[256, 256]` without seams, of mean 0 and standard deviation 1, finer parts weaker."""
    white = np.random.default_rng(2503).standard_normal((256, 256))
    rows, columns = np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]
    pitch = np.sqrt(rows**2 + columns**2)
    pitch[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(white) * pitch**-0.9, s=(256, 256))
    return np.clip(tile / tile.std(), -2.5, 2.5).astype(np.float32)


def noise(a: Array, b: Array, per_metre: float) -> Array:
    """Noise at coordinates in metres, `per_metre` cells of the tile to each."""
    i = (a * np.float32(per_metre)).astype(np.int32) & 255
    j = (b * np.float32(per_metre)).astype(np.int32) & 255
    return _tile()[i, j]


class Canvas:
    """Buffers `[H, W]` and a camera at `position` (x right, y up, z ahead, metres).

    size: (H, W). focal: pixels. yaw, pitch: radians, to the right and up. sun: unit vector to it.
    """

    def __init__(
        self,
        size: tuple[int, int],
        focal: float,
        position: Point,
        yaw: float,
        pitch: float,
        sun: Point,
    ) -> None:
        height, width = size
        self.size, self.focal = size, focal
        self.position = np.array(position, np.float32)
        self.sun = np.array(sun, np.float32)
        c, s, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        self.axes = np.array(
            [(c, 0, -s), (-s * sp, cp, -c * sp), (s * cp, sp, c * cp)], np.float32
        )  # right, up, ahead
        self.x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2)[None] / np.float32(focal)
        self.y = (height / 2 - 0.5 - np.arange(height, dtype=np.float32))[:, None]
        self.y = self.y / np.float32(focal)
        right, up, ahead = self.axes[:, :, None, None]
        self.rays = self.x * right + self.y * up + ahead  # [3, H, W], of depth 1
        self.rays[np.abs(self.rays) < 1e-6] = 1e-6
        self.depth = np.full(size, np.inf, np.float32)
        self.thing = np.zeros(size, np.int16)
        self.albedo = np.zeros((3, *size), np.float32)
        self.lambert = np.zeros(size, np.float32)
        self.reflectance = np.zeros(size, np.float32)

    def view(self, point: Point) -> Array:
        """A point of the world in the camera's right, up and ahead."""
        return self.axes @ (np.array(point, np.float32) - self.position)

    def window(self, low: Array, high: Array) -> tuple[slice, slice]:
        """Rows and columns within normalised coordinates (x, y): may be empty."""
        height, width = self.size
        ends = np.array((low[0], high[0], -high[1], -low[1]), np.float32) * np.float32(self.focal)
        left, right, top, bottom = ends + np.array((width, width, height, height)) / 2
        return (
            slice(max(0, int(top)), max(0, min(height, int(bottom) + 2))),
            slice(max(0, int(left)), max(0, min(width, int(right) + 2))),
        )

    def paint(
        self,
        at: tuple[slice, slice],
        inside: Array,
        depth: Array | float,
        thing: int,
        albedo: Array | Colour,
        lambert: Array | float,
        reflectance: Array | float,
    ) -> None:
        """Paint what is inside and nearer than all that was painted before."""
        buffer = self.depth[at]
        visible = inside & (depth < buffer)
        np.copyto(buffer, depth, where=visible)
        np.copyto(self.thing[at], thing, where=visible)
        np.copyto(self.lambert[at], lambert, where=visible)
        np.copyto(self.reflectance[at], reflectance, where=visible)
        for channel in range(3):
            np.copyto(self.albedo[channel][at], albedo[channel], where=visible)

    def box(self, low: Point, high: Point, thing: int, texture: Texture) -> None:
        """A box along the axes of the world, seen from outside."""
        corners = np.array([(x, y, z) for x in (low[0], high[0]) for y in (low[1], high[1])
                            for z in (low[2], high[2])], np.float32)  # fmt: skip
        seen = (corners - self.position) @ self.axes.T
        if seen[:, 2].max() < NEAR:
            return
        if seen[:, 2].min() < NEAR:
            # beside the camera: what is all to its right ends at the middle, and so on
            to_left, to_right = seen[:, 0].min() < 0, seen[:, 0].max() > 0
            limit = self.x[0, -1] + 1
            at = self.window(np.array((-limit * to_left, -9)), np.array((limit * to_right, 9)))
        else:
            flat = seen[:, :2] / seen[:, 2:]
            at = self.window(flat.min(0), flat.max(0))
        rays = self.rays[:, at[0], at[1]]
        if rays.size == 0:
            return
        for axis in range(3):
            if self.position[axis] < low[axis]:
                plane, toward = low[axis], -1.0
            elif self.position[axis] > high[axis]:
                plane, toward = high[axis], 1.0
            else:
                continue
            depth = (np.float32(plane) - self.position[axis]) / rays[axis]
            inside = (depth > NEAR) & (depth < self.depth[at])
            along = []
            # across first, then up or away
            for other in ((2, 1), (0, 2), (0, 1))[axis]:
                place = depth * rays[other] + (self.position[other] - np.float32(low[other]))
                inside &= (place >= 0) & (place <= np.float32(high[other] - low[other]))
                along.append(place)
            rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            if rows.size == 0:
                continue
            # most of a face is out of sight
            part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            top, left = at[0].start, at[1].start
            where = (
                slice(top + rows[0], top + rows[-1] + 1),
                slice(left + columns[0], left + columns[-1] + 1),
            )
            albedo, reflectance = texture(axis, along[0][part], along[1][part])
            lambert = max(0.0, toward * float(self.sun[axis]))
            self.paint(where, inside[part], depth[part], thing, albedo, lambert, reflectance)

    def flat(
        self, foot: Point, half_width: float, bottom: float, top: float
    ) -> tuple[tuple[slice, slice], Array, Array, float] | None:
        """Window and metres (right `[1, w]`, up `[h, 1]` of the foot) of a shape that faces us, and
        its depth; None where it is out of sight."""
        x, y, z = (float(v) for v in self.view(foot))
        if z < 2 * NEAR:
            return None
        at = self.window(
            np.array((x - half_width, y + bottom)) / z, np.array((x + half_width, y + top)) / z
        )
        across = self.x[:, at[1]] * np.float32(z) - np.float32(x)
        up = self.y[at[0]] * np.float32(z) - np.float32(y)
        if across.size == 0 or up.size == 0:
            return None
        return at, across, up, z

    def post(
        self, foot: Point, radius: float, top: float, thing: int, albedo: Colour, reflectance: float
    ) -> None:
        """An upright cylinder."""
        placed = self.flat(foot, radius, 0.0, top)
        if placed is None:
            return
        at, across, up, z = placed
        bulge = np.sqrt(np.maximum(0, 1 - (across / radius) ** 2))
        inside = (np.abs(across) <= radius) & (up >= 0) & (up <= top)
        right, _, ahead = self.axes @ self.sun
        lambert = np.maximum(0, across / radius * right - bulge * ahead)
        lambert, depth = (
            np.broadcast_to(v, inside.shape) for v in (lambert, z - np.float32(radius) * bulge)
        )
        self.paint(at, inside, depth, thing, albedo, lambert, reflectance)

    def ball(
        self, centre: Point, radius: float, thing: int, albedo: Colour, ragged: float, grain: float
    ) -> None:
        """A ball of leaves: its outline and colour vary by noise."""
        placed = self.flat(centre, radius * 1.15, -radius * 1.15, radius * 1.15)
        if placed is None:
            return
        at, across, up, z = placed
        across, up = np.broadcast_arrays(across, up)
        leaves = noise(across + np.float32(centre[0]), up + np.float32(centre[2]), grain)
        square = (across**2 + up**2) / np.float32(radius**2)
        inside = square < 1 + np.float32(ragged) * leaves
        bulge = np.sqrt(np.maximum(0, 1 - square))
        right, above, ahead = self.axes @ self.sun
        lambert = np.maximum(0, (across * right + up * above) / radius - bulge * ahead)
        tint = np.maximum(0.3, 1 + 0.3 * leaves)
        colour = np.array(albedo, np.float32)[:, None, None] * tint
        self.paint(at, inside, z - np.float32(radius) * bulge, thing, colour, lambert, 45.0)

    def figure(
        self,
        foot: Point,
        extent: Point,
        thing: int,
        parts: Callable[[Array, Array], list[tuple[Array, Colour, float]]],
    ) -> None:
        """A flat shape of parts (inside, albedo, reflectance), each before those that follow.

        extent: (half width, bottom, top) in metres.
        """
        placed = self.flat(foot, *extent)
        if placed is None:
            return
        at, across, up, z = placed
        lambert = max(0.15, 0.7 * float(-(self.axes[2] @ self.sun)))
        for inside, albedo, reflectance in parts(across, up):
            self.paint(at, inside, z, thing, albedo, lambert, reflectance)

    def ground(self) -> tuple[tuple[slice, slice], Array, Array, Array] | None:
        """Window, depth, and world x and z of the plane y = 0 below the horizon."""
        falls = self.rays[1] < -self.position[1] / 400.0
        rows = np.flatnonzero(falls.any(axis=1))
        if rows.size == 0:
            return None
        at = (slice(int(rows[0]), self.size[0]), slice(None))
        rays = self.rays[:, at[0]]
        depth = -self.position[1] / np.minimum(rays[1], np.float32(-1e-4))
        return at, depth, depth * rays[0] + self.position[0], depth * rays[2] + self.position[2]

    def shadow(
        self, x: Array, z: Array, boxes: list[tuple[Point, Point]], balls: list[tuple[Point, float]]
    ) -> Array:
        """bool: which points (x, 0, z) one of the boxes or balls hides from the sun."""
        sx, sy, sz = (float(v) for v in self.sun)
        dark = np.zeros(x.shape, bool)
        # on the way to the sun, in units of its direction: from where to where a ray is in a box
        x_way, z_way = x / np.float32(sx), z / np.float32(sz)
        for low, high in boxes:
            near_x, far_x = sorted((low[0] / sx, high[0] / sx))
            near_z, far_z = sorted((low[2] / sz, high[2] / sz))
            first = np.maximum(np.float32(near_x) - x_way, np.float32(near_z) - z_way)
            last = np.minimum(np.float32(far_x) - x_way, np.float32(far_z) - z_way)
            np.maximum(first, np.float32(low[1] / sy), out=first)
            np.minimum(last, np.float32(high[1] / sy), out=last)
            dark |= first < last
        for centre, radius in balls:
            dx, dz = np.float32(centre[0]) - x, np.float32(centre[2]) - z
            along = dx * np.float32(sx) + dz * np.float32(sz) + np.float32(centre[1] * sy)
            dark |= dx * dx + dz * dz + np.float32(centre[1] ** 2 - radius**2) < along * along
        return dark

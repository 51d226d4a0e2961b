"""What stands where in a street, and what it is made of."""

from dataclasses import dataclass, field

import numpy as np

from ._render import Array, Canvas, Colour, Point, noise
from ._shapes import RETRO, Parts, cyclist, person, plate

CLASSES = (
    "road",
    "marking",
    "sidewalk",
    "terrain",
    "vegetation",
    "building",
    "sky",
    "pole",
    "sign",
    "car",
    "moving car",
    "pedestrian",
    "two-wheeler",
)
PALETTE = (
    (128, 64, 128),
    (255, 255, 255),
    (244, 35, 232),
    (152, 251, 152),
    (60, 120, 30),
    (90, 90, 90),
    (70, 160, 220),
    (190, 150, 130),
    (240, 220, 0),
    (0, 0, 142),
    (0, 190, 255),
    (220, 20, 60),
    (255, 140, 0),
)
(ROAD, MARKING, SIDEWALK, TERRAIN, VEGETATION, BUILDING, SKY, POLE, SIGN, CAR, MOVING_CAR,
 PEDESTRIAN, TWO_WHEELER) = range(len(CLASSES))  # fmt: skip

# of the laser, in percent: a sidewalk and terrain are the same to it
REFLECTANCE = {ROAD: 14.0, MARKING: 70.0, SIDEWALK: 32.0, TERRAIN: 32.0}


@dataclass
class Street:
    """A scene that is built: the canvas, and of every thing its class and velocity in m/s."""

    canvas: Canvas
    classes: list[int] = field(default_factory=list)
    velocities: list[Point] = field(default_factory=list)
    boxes: list[tuple[Point, Point]] = field(default_factory=list)
    balls: list[tuple[Point, float]] = field(default_factory=list)

    def add(self, what: int, velocity: Point = (0.0, 0.0, 0.0)) -> int:
        self.classes.append(what)
        self.velocities.append(velocity)
        return len(self.classes) - 1


class Builder:
    """Builds the street of one generator on a canvas."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator, lane: float) -> None:
        self.canvas, self.rng = canvas, rng
        self.street = Street(canvas)
        self.lane = lane  # centre of the right lane; the camera drives about there
        self.half = 2 * lane
        self.walk = rng.uniform(2.6, 4.4)
        self.curve = rng.normal(0, 0.0012)
        self.crossing = rng.uniform(14, 32) if rng.random() < 0.45 else 1e3
        self.taken: list[tuple[float, float]] = []

    def build(self) -> Street:
        for what in (ROAD, MARKING, SIDEWALK, TERRAIN):
            self.street.add(what)
        self.street.add(SKY)
        # roughly from near to far: what is hidden costs little
        self.people()
        self.posts()
        self.cars()
        self.trees()
        for side in (-1, 1):
            self.row_of_buildings(side)
        self.end_of_street()
        self.ground()
        return self.street

    def middle(self, z: float) -> float:
        """x of the middle of the road."""
        return self.curve * z * z

    def place(self, low: float, high: float, apart: float) -> tuple[float, float] | None:
        """A free (lateral, z) on the road or beside, or None."""
        for _ in range(4):
            z = self.rng.uniform(low, high)
            lateral = self.rng.choice((-1.0, 1.0))
            if all(lateral != s or abs(z - other) > apart for s, other in self.taken):
                self.taken.append((lateral, z))
                return lateral, z
        return None

    def colour(self, low: float, high: float, spread: float) -> Colour:
        r, g, b = np.clip(
            self.rng.uniform(low, high) + self.rng.normal(0, spread, 3), 0.03, 0.9
        ).tolist()
        return r, g, b

    def row_of_buildings(self, side: int) -> None:
        rng = self.rng
        z = rng.uniform(-6, 2)
        back = self.half + self.walk
        while z < 85:
            length, height = rng.uniform(7, 18), rng.uniform(5, 17)
            if abs(z + length / 2 - self.crossing) < length / 2 + 5:
                z = self.crossing + 6.5
                continue
            edge = side * (back + rng.uniform(0, 5)) + self.middle(z + length / 2)
            if z > 4 and rng.random() < 0.25:
                self.hedge(edge, side, z, length)
            else:
                low = (min(edge, edge + side * 12), 0.0, z)
                high = (max(edge, edge + side * 12), height, z + length)
                self.building(low, high)
            z += length + (rng.uniform(2, 7) if rng.random() < 0.3 else 0.0)

    def building(self, low: Point, high: Point) -> None:
        rng = self.rng
        wall = np.array(self.colour(0.15, 0.6, 0.07), np.float32)
        glass = np.array(self.colour(0.06, 0.35, 0.04), np.float32)
        storey, spacing = rng.uniform(2.7, 3.6), rng.uniform(1.8, 3.2)
        wide, tall = rng.uniform(0.35, 0.65), rng.uniform(0.4, 0.65)
        # people on posters: only distance tells them from those on the sidewalk
        poster = rng.uniform(1, 6) if rng.random() < 0.35 else None
        cloth = np.array(self.colour(0.1, 0.6, 0.15), np.float32)

        def texture(axis: int, across: Array, up: Array) -> tuple[Array, float]:
            rough = 1 + 0.08 * noise(across, up, 6.0)
            window = (across % spacing < wide * spacing) & (up % storey > (1 - tall) * storey)
            window &= up > 0.8
            colour = np.where(window, glass[:, None, None], wall[:, None, None] * rough)
            colour *= np.where((up < storey) & (up > storey - 0.25), 0.7, 1.0)  # a ledge
            if poster is not None and axis == 0:
                for inside, shade, _ in person(across % 9.0 - poster, up - 0.3, cloth, cloth * 0.4):
                    colour = np.where(inside, np.array(shade, np.float32)[:, None, None], colour)
            return colour.astype(np.float32), 38.0

        self.canvas.box(low, high, self.street.add(BUILDING), texture)
        self.street.boxes.append((low, high))

    def hedge(self, edge: float, side: int, z: float, length: float) -> None:
        height = self.rng.uniform(1.0, 3.5)
        base = np.array(self.leaf(), np.float32)[:, None, None]
        low = (min(edge, edge + side * 2), 0.0, z)
        high = (max(edge, edge + side * 2), height, z + length)

        def texture(_: int, across: Array, up: Array) -> tuple[Array, float]:
            return base * np.maximum(0.3, 1 + 0.35 * noise(across, up, 9.0)), 45.0

        self.canvas.box(low, high, self.street.add(VEGETATION), texture)
        self.street.boxes.append((low, high))

    def leaf(self) -> Colour:
        rng = self.rng
        return rng.uniform(0.05, 0.16), rng.uniform(0.13, 0.26), rng.uniform(0.03, 0.09)

    def trees(self) -> None:
        rng = self.rng
        for _ in range(rng.integers(2, 6)):
            z, side = rng.uniform(9, 50), rng.choice((-1, 1))
            x = side * (self.half + rng.uniform(1.0, self.walk + 1.5)) + self.middle(z)
            thing, height, leaf = self.street.add(VEGETATION), rng.uniform(2.0, 3.2), self.leaf()
            self.canvas.post((x, 0, z), 0.18, height + 0.6, thing, (0.14, 0.10, 0.07), 30.0)
            radius = rng.uniform(1.1, 1.9)
            for _ in range(3):
                dx, dy, dz = rng.uniform(-0.7, 0.7, 3) * radius
                centre = (x + dx, height + radius + dy, z + dz)
                self.canvas.ball(centre, radius, thing, leaf, 0.25, 12.0)
            self.street.balls.append(((x, height + radius, z), radius * 1.2))

    def posts(self) -> None:
        rng = self.rng
        for _ in range(rng.integers(3, 6)):
            z, side = rng.uniform(6, 26), rng.choice((-1, 1))
            x = side * (self.half + 0.5) + self.middle(z)
            thing, gray = self.street.add(POLE), rng.uniform(0.1, 0.5)
            top = rng.uniform(4, 7)
            self.canvas.post((x, 0, z), 0.13, top, thing, (gray, gray, gray), 30.0)
            self.street.boxes.append(((x - 0.13, 0, z - 0.13), (x + 0.13, top, z + 0.13)))
        for _ in range(rng.integers(3, 6)):
            z, side = rng.uniform(6, 20), rng.choice((-1, 1))
            x = side * (self.half + rng.uniform(0.4, 0.9)) + self.middle(z)
            top = rng.uniform(2.2, 3.0)
            self.canvas.post((x, 0, z), 0.06, top, self.street.add(POLE), (0.4, 0.4, 0.4), 40.0)
            kind, size = rng.integers(4), rng.uniform(0.42, 0.6)

            def parts(a: Array, b: Array, kind: int = int(kind), r: float = size) -> Parts:
                return plate(a, b, kind, r)

            # just before its post
            face = (x, top, z - 0.1)
            self.canvas.figure(
                face, (size * 1.2, -size * 1.2, size * 1.2), self.street.add(SIGN), parts
            )

    def cars(self) -> None:
        rng = self.rng
        for _ in range(rng.integers(2, 5)):
            if (at := self.place(8, 40, 6)) is not None:
                x = at[0] * (self.half - 1.0)
                self.car(x + self.middle(at[1]), at[1], (0.0, 0.0, 0.0))
        self.taken.clear()
        for _ in range(rng.integers(1, 4)):
            if (at := self.place(9, 40, 8)) is not None:
                speed = rng.uniform(5, 12) * at[0] if rng.random() < 0.75 else 0.0
                x = at[0] * self.lane * rng.uniform(0.75, 1.1)
                self.car(x + self.middle(at[1]), at[1], (0.0, 0.0, speed))
        if self.crossing < 100 and rng.random() < 0.7:
            speed = rng.uniform(5, 10) * rng.choice((-1, 1)) if rng.random() < 0.75 else 0.0
            self.car(rng.uniform(-9, 9), self.crossing - np.sign(speed) * 1.6, (speed, 0, 0), True)
        self.taken.clear()

    def car(self, x: float, z: float, velocity: Point, across: bool = False) -> None:
        """A body and a cabin, along the road or across it."""
        rng = self.rng
        paint = np.array(self.colour(0.05, 0.65, 0.1), np.float32)[:, None, None]
        coating, van = rng.uniform(15, 70), rng.random() < 0.2
        length, wide = rng.uniform(3.8, 4.8), 1.8
        body, roof = (1.1, 2.1) if van else (0.88, 1.48)
        thing = self.street.add(MOVING_CAR if any(velocity) else CAR, velocity)
        flank = 2 if across else 0
        dark = np.array((0.03, 0.03, 0.03), np.float32)[:, None, None]

        def of_body(axis: int, a: Array, b: Array) -> tuple[Array, Array | float]:
            if axis == flank:
                wheel = np.zeros(b.shape, bool)
                for centre in (0.8, length - 0.8):
                    wheel |= (a - centre) ** 2 + (b - 0.1) ** 2 < 0.12
                return np.where(wheel, dark, paint), coating
            if axis == 1:
                return np.broadcast_to(paint, (3, *b.shape)), coating
            lamp = (b > 0.38) & (b < 0.58) & (np.abs(a - wide / 2) > wide / 2 - 0.35)
            plate = (b > 0.2) & (b < 0.36) & (np.abs(a - wide / 2) < 0.28)
            colour = np.where(b < 0.18, dark, paint)
            colour = np.where(lamp, np.array((0.5, 0.08, 0.06), np.float32)[:, None, None], colour)
            colour = np.where(plate, np.float32(0.7), colour)
            return colour, np.where(lamp | plate, RETRO, coating)

        def of_cabin(axis: int, a: Array, b: Array) -> tuple[Array, Array | float]:
            height = roof - body
            glass = (b > 0.08) & (b < height - 0.1)
            if axis == flank:
                glass &= a % 1.1 > 0.1
            if axis == 1:
                glass = np.zeros(b.shape, bool)
            blue = np.array((0.06, 0.08, 0.10), np.float32)[:, None, None]
            return np.where(glass, blue, paint), np.where(glass, 4.0, coating)

        def at(along: tuple[float, float], half: float, low: float, high: float) -> None:
            u, v = along
            corners = ((x + u, low, z - half), (x + v, high, z + half)) if across else (
                (x - half, low, z + u), (x + half, high, z + v))  # fmt: skip
            self.canvas.box(*corners, thing, of_cabin if low == body else of_body)
            self.street.boxes.append(corners)

        at((-length / 2, length / 2), wide / 2, 0.22, body)
        cabin = (-length / 2 + 0.1, length / 2 - 0.9) if van else (-length * 0.38, length * 0.22)
        at(cabin, wide / 2 - 0.1, body, roof)

    def people(self) -> None:
        rng = self.rng
        for _ in range(rng.integers(3, 7)):
            z, side = rng.uniform(5, 22), rng.choice((-1, 1))
            crossing = rng.random() < 0.2
            lateral = rng.uniform(0.2, 1) * self.half if crossing else self.half + rng.uniform(
                0.4, self.walk)  # fmt: skip
            x = side * lateral + self.middle(z)
            velocity = (0.0, 0.0, 0.0)
            if crossing or rng.random() < 0.6:
                speed = rng.uniform(1.0, 2.2) * rng.choice((-1, 1))
                velocity = (speed, 0.0, 0.0) if crossing else (0.3 * speed, 0.0, speed)
            shirt = np.array(self.colour(0.05, 0.55, 0.2), np.float32)
            trousers = np.array(self.colour(0.04, 0.25, 0.06), np.float32)
            size = rng.uniform(0.9, 1.08)

            def body(
                a: Array, b: Array, size: float = size, s: Array = shirt, t: Array = trousers
            ) -> Parts:
                return person(a / size, b / size, s, t)

            thing = self.street.add(PEDESTRIAN, velocity)
            self.canvas.figure((x, 0, z), (0.45, 0.0, 1.95), thing, body)
            self.street.boxes.append(((x - 0.25, 0, z - 0.15), (x + 0.25, 1.7, z + 0.15)))
        for _ in range(rng.integers(2, 5)):
            z, side = rng.uniform(6, 20), rng.choice((-1, 1))
            x = side * (self.half + rng.uniform(-1.0, self.walk)) + self.middle(z)
            sideways, moving = rng.random() < 0.6, rng.random() < 0.5
            shirt = np.array(self.colour(0.05, 0.55, 0.2), np.float32)
            speed = rng.uniform(3, 6) * rng.choice((-1, 1)) if moving else 0.0
            velocity = (speed, 0.0, 0.0) if sideways else (0.0, 0.0, speed)

            def rider(a: Array, b: Array, sideways: bool = sideways, s: Array = shirt) -> Parts:
                return cyclist(a, b, s, sideways)

            thing = self.street.add(TWO_WHEELER, velocity)
            self.canvas.figure((x, 0, z), (1.0, 0.0, 1.95), thing, rider)
            self.street.boxes.append(((x - 0.4, 0, z - 0.2), (x + 0.4, 1.5, z + 0.2)))

    def end_of_street(self) -> None:
        """What closes the view far away: houses, woods, or nothing."""
        choice, height = self.rng.random(), self.rng.uniform(5, 14)
        low, high = (-90.0, 0.0, 95.0), (90.0, height, 100.0)
        if choice < 0.45:
            self.building(low, high)
        elif choice < 0.8:
            leaf = np.array(self.leaf(), np.float32)[:, None, None]

            def woods(_: int, across: Array, up: Array) -> tuple[Array, float]:
                return leaf * np.maximum(0.3, 1 + 0.3 * noise(across, up, 1.5)), 45.0

            self.canvas.box(low, high, self.street.add(VEGETATION), woods)

    def ground(self) -> None:
        rng = self.rng
        placed = self.canvas.ground()
        if placed is None:
            return
        at, depth, x, z = placed
        s = x - np.float32(self.curve) * z * z
        aside = np.abs(s)
        cross = np.abs(z - self.crossing)
        # grass behind the sidewalk, and perhaps between it and the road
        edge, verge = self.half + self.walk, rng.uniform(-0.5, 1.6)
        what = np.full(s.shape, TERRAIN, np.int16)
        what[((aside > self.half + verge) & (aside < edge)) | (cross < 6.5)] = SIDEWALK
        what[(aside < self.half) | (cross < 4.5)] = ROAD
        line = np.abs(s) < 0.14
        if rng.random() < 0.7:
            line &= (z + rng.uniform(0, 8)) % 7.0 < 3.5
        line |= np.abs(aside - (self.half - 0.35)) < 0.1
        line &= cross > 4.5
        zebra = self.crossing - 6.4 if self.crossing < 100 else rng.uniform(8, 40)
        if rng.random() < 0.6:
            line &= np.abs(z - zebra) > 2.4
            line |= (np.abs(z - zebra) < 1.5) & (aside < self.half - 0.4) & (s % 1.2 < 0.6)
        what[line & (what == ROAD)] = MARKING
        coarse, fine = noise(x, z, 1.3), noise(x, z, 11.0)
        # what is too small for a pixel is gray
        fine = fine * np.clip(12 / depth, 0, 1)
        asphalt, slab = rng.uniform(0.08, 0.2), rng.uniform(0.18, 0.4)
        grass = np.array((0.14, 0.22, 0.07) if rng.random() < 0.75 else (0.26, 0.2, 0.12))
        seams = ((x % 0.9 < 0.07) | (z % 0.9 < 0.07)) & (depth < 14)
        tints = np.empty((4, 3), np.float32)
        tints[ROAD] = asphalt * np.array((1.0, 1.0, 1.03))
        tints[MARKING] = rng.uniform(0.4, 0.75)
        tints[SIDEWALK] = slab * np.array((1.05, 1.0, 0.93))
        tints[TERRAIN] = grass * rng.uniform(0.7, 1.2)
        # patches of tar and worn paint; grass is rougher than stone
        rough = np.array((0.10, 0.12, 0.07, 0.30), np.float32)[what]
        grain = 1 + rough * fine + np.array((0.10, 0.16, 0.05, 0.12), np.float32)[what] * coarse
        grain = grain * np.where(seams & (what == SIDEWALK), 0.7, 1.0)
        dark = self.canvas.shadow(x, z, self.street.boxes, self.street.balls)
        lambert = np.where(dark, 0.0, self.canvas.sun[1]).astype(np.float32)
        albedo = np.moveaxis(tints[what], -1, 0) * np.maximum(0.2, grain)
        shine = np.array([REFLECTANCE[k] for k in range(4)], np.float32)[what]
        for kind in range(4):
            self.canvas.paint(at, what == kind, depth, kind, albedo, lambert, shine)

"""Flat shapes of streets: functions of metres right and up that give parts (inside, albedo,
reflectance in percent), each before those that follow."""

import numpy as np

from ._render import Array, Colour

Parts = list[tuple[Array, Colour, float]]

RETRO = 100.0
"""Reflectance of what throws light back to where it came from."""


def person(a: Array, b: Array, shirt: Array, trousers: Array) -> Parts:
    """A standing person; a to the right, b above the foot, in metres of one who is 1.75 tall."""
    skin: Colour = (0.42, 0.28, 0.2)
    side = np.abs(a)
    cloth, legs = tuple(shirt.tolist()), tuple(trousers.tolist())
    return [
        (a * a + (b - 1.6) ** 2 < 0.024, skin, 40.0),
        ((side < 0.27 - 0.06 * np.abs(b - 1.2)) & (b > 0.8) & (b < 1.46), cloth, 40.0),
        ((side < 0.04 + 0.2 * (1 - b / 1.2)) & (side > 0.03) & (b > 0) & (b < 0.85), legs, 30.0),
        ((side < 0.22) & (b > 0.4) & (b < 0.85), legs, 30.0),
    ]


def cyclist(a: Array, b: Array, shirt: Array, sideways: bool) -> Parts:
    """A rider on a two-wheeler, from the side or from behind."""
    rubber: Colour = (0.03, 0.03, 0.03)
    cloth = tuple(shirt.tolist())
    skin: Colour = (0.42, 0.28, 0.2)
    if not sideways:
        return [
            (a * a + (b - 1.65) ** 2 < 0.026, skin, 40.0),
            ((np.abs(a) < 0.26) & (b > 0.85) & (b < 1.5), cloth, 40.0),
            ((np.abs(a) < 0.35) & (b > 0.95) & (b < 1.05), rubber, 20.0),
            ((np.abs(a) < 0.07) & (b > 0) & (b < 0.7), rubber, 10.0),
            ((np.abs(a) < 0.2) & (b > 0.35) & (b < 0.9), (0.08, 0.08, 0.12), 30.0),
        ]
    wheel = np.minimum((a - 0.55) ** 2, (a + 0.55) ** 2) + (b - 0.34) ** 2
    return [
        ((a - 0.12) ** 2 + (b - 1.6) ** 2 < 0.026, skin, 40.0),
        ((np.abs(a - 0.35 * (b - 1.2)) < 0.2) & (b > 0.8) & (b < 1.48), cloth, 40.0),
        ((np.abs(a - 0.1) < 0.12) & (b > 0.3) & (b < 0.85), (0.08, 0.08, 0.12), 30.0),
        ((np.abs(a) < 0.55) & (np.abs(b - 0.55) < 0.08), (0.3, 0.05, 0.05), 30.0),
        ((wheel < 0.116) & (wheel > 0.05), rubber, 10.0),
        (wheel <= 0.05, (0.14, 0.14, 0.15), 10.0),
    ]


def plate(a: Array, b: Array, kind: int, r: float) -> Parts:
    """A traffic sign about its centre: 0 forbids, 1 warns, 2 bids, 3 gives the right of way."""
    if kind == 0:
        square = a * a + b * b
        return [
            (square < (r * 0.7) ** 2, (0.8, 0.8, 0.78), RETRO),
            (square < r * r, (0.6, 0.03, 0.04), RETRO),
        ]
    if kind == 1:
        edge = (r - b) * 0.58 - np.abs(a)
        return [
            ((edge > 0.15) & (b > -0.6 * r), (0.8, 0.8, 0.75), RETRO),
            ((edge > 0) & (b > -r), (0.65, 0.03, 0.04), RETRO),
        ]
    if kind == 2:
        inside = np.maximum(np.abs(a), np.abs(b)) < r * 0.9
        return [
            (inside & (np.abs(a) < r * 0.2), (0.75, 0.75, 0.75), RETRO),
            (inside, (0.03, 0.10, 0.5), RETRO),
        ]
    return [(np.abs(a) + np.abs(b) < r * 1.2, (0.75, 0.5, 0.03), RETRO)]

"""Pictures of what sensors saw and of labels, for people."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from equiseg_fast._files import replace_file

from .samples import Sample, SensorDataset
from .sensors import Sensor

Panel = np.ndarray | Callable[[Any], None] | None
"""A picture uint8 `[H, W, 3]`, what draws into given axes of matplotlib, or None for nothing."""

# viridis (CC0) without its darkest part, which would look like the black of no value
_COLOURS = np.array(
    [
        (66, 64, 134),
        (51, 99, 141),
        (38, 130, 142),
        (31, 160, 136),
        (63, 188, 115),
        (132, 212, 75),
        (216, 226, 25),
        (253, 231, 37),
    ],
    np.float32,
)
_RED, _BLUE = np.array((200, 20, 30), np.float32), np.array((20, 60, 210), np.float32)


def show(sensor: Sensor, values: Any) -> np.ndarray:
    """A picture, uint8 `[H, W, 3]`, of values as in files, `[C, H, W]` tensor or array.

    Cameras look as they are. Depth and lidar range (channel 0) are yellow when near and blue when
    far, black without a value. Events are red (positive) and blue (negative) on white: one signed
    channel, or one of each sign. The rest is gray, or as it is when it has three channels. But for
    cameras the range is that of the values, without the outermost percent.
    """
    x = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float32)
    if x.ndim != 3 or x.shape[0] != sensor.channels:
        raise ValueError(
            f"values of {sensor.name} must be [{sensor.channels}, H, W]; got {list(x.shape)}"
        )
    x = np.nan_to_num(x, posinf=0, neginf=0)
    if sensor.kind == "camera":
        picture = np.clip(x * sensor.scale, 0, 1)
        return _bytes(_three(picture) * 255)
    if sensor.kind in ("depth", "lidar"):
        return _distances(x[0], dilate=sensor.kind == "lidar")
    if sensor.kind == "event":
        return _events(x)
    low, high = _robust(x)
    return _bytes(_three((x - low) / (high - low)) * 255)


def palette_of(
    count: int, palette: Sequence[Sequence[int]] | np.ndarray | None = None
) -> np.ndarray:
    """uint8 `[count, 3]`: the colours given, or those of PASCAL VOC after its black."""
    if palette is not None:
        colours = np.asarray(palette)
        if colours.ndim != 2 or colours.shape[1] != 3 or len(colours) < count:
            raise ValueError(
                f"palette must have 3 numbers for each of {count} classes; got {colours.shape}"
            )
        if colours.min() < 0 or colours.max() > 255:
            raise ValueError("palette must have numbers of 0 to 255")
        return colours[:count].astype(np.uint8)
    # bit k of the class number is spread over the three channels, highest bits first
    number = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((number >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def colour_labels(labels: Any, palette: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Labels `[H, W]`, tensor or array of integers, in the colours of a palette: uint8 `[H, W, 3]`.

    Ignored pixels are black. Raises ValueError for a class that the palette has no colour of.
    """
    y = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    ignored = y == ignore_index
    wrong = ~ignored & ((y < 0) | (y >= len(palette)))
    if wrong.any():
        raise ValueError(
            f"labels must be in 0..{len(palette) - 1} or {ignore_index}; got {y[wrong].flat[0]}"
        )
    colours = np.asarray(palette, np.uint8)[np.where(ignored, 0, y)]
    colours[ignored] = 0
    return colours


def contact_sheet(
    dataset: SensorDataset, indices: Sequence[int], path: str | os.PathLike[str]
) -> None:
    """Write a PNG: one row per sample, one column per sensor and one of the labels."""
    samples = [dataset.raw(i) for i in indices]
    rows = [(sample.name, panels(dataset, sample)) for sample in samples]
    sheet(rows, path, classes=dataset.classes, palette=dataset.palette)


def panels(dataset: SensorDataset, sample: Sample) -> list[tuple[str, Panel]]:
    """Titles and pictures of a raw sample, sensors first and labels last; None where absent."""
    pictures: list[tuple[str, Panel]] = [
        (sensor.name, show(sensor, sample.images[sensor.name]) if sample.present[i] else None)
        for i, sensor in enumerate(dataset.sensors)
    ]
    labels = sample.labels
    palette = palette_of(len(dataset.classes), dataset.palette)
    coloured = None if labels is None else colour_labels(labels, palette, dataset.ignore_index)
    return [*pictures, ("labels", coloured)]


def sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Panel]]]],
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
    palette: Sequence[Sequence[int]] | np.ndarray | None = None,
) -> None:
    """Write rows of (name, [(title, panel), ..]) as a PNG.

    A title stands above a panel where it differs from that of the panel above. Classes, if given,
    are explained below in the colours of `palette_of`. The file is there whole or not at all.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            'sheets of pictures need matplotlib: pip install "equiseg-fast[train]"'
        ) from error

    if not rows:
        raise ValueError("a sheet needs at least one row")
    columns = max(len(row) for _, row in rows)
    shapes = [x.shape[:2] for _, row in rows for _, x in row if isinstance(x, np.ndarray)]
    height, width = shapes[0] if shapes else (1, 1)
    # inches: panels of 2.6 across, high enough to be drawn in, a line for titles, and below that
    # many lines of legend
    across, line = 2.6, 0.22
    down = max(across * height / width, 1.0) + line
    per_line = max(1, int(columns * across / 1.5))
    below = line * (-(-len(classes) // per_line) + 1) if classes else 0.05
    size = (columns * across + 0.35, len(rows) * down + below)
    figure = Figure(figsize=size, dpi=110, facecolor="white")
    above: list[str] = []
    for r, (name, row) in enumerate(rows):
        titles = [title for title, _ in row]
        bottom = size[1] - (r + 1) * down
        figure.text(
            0.17 / size[0],
            (bottom + (down - line) / 2) / size[1],
            name,
            rotation=90,
            fontsize=8,
            ha="center",
            va="center",
        )
        for c, (title, panel) in enumerate(row):
            box = (
                (0.35 + c * across) / size[0],
                bottom / size[1],
                (across - 0.06) / size[0],
                (down - line) / size[1],
            )
            axes = figure.add_axes(box)
            axes.set_axis_off()
            if panel is None:
                axes.set_box_aspect(height / width)  # as `imshow` has it, for titles in one line
                axes.text(0.5, 0.5, "none", ha="center", va="center", fontsize=9, color="gray")
            elif isinstance(panel, np.ndarray):
                axes.imshow(panel, interpolation="nearest")
            else:
                panel(axes)
            if above[c : c + 1] != [title]:
                axes.set_title(title, fontsize=9, pad=3)
        above = titles
    if classes:
        colours = palette_of(len(classes), palette) / 255
        figure.legend(
            handles=[
                Patch(facecolor=tuple(colour), edgecolor="gray", linewidth=0.5, label=name)
                for name, colour in zip(classes, colours, strict=True)
            ],
            loc="lower center",
            ncols=per_line,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.4,
        )
    replace_file(Path(path), FigureCanvasAgg(figure).print_png)


def _distances(x: np.ndarray, *, dilate: bool) -> np.ndarray:
    valid = x > 0
    low, high = _robust(x[valid])
    scale = np.log(high / low)
    nearness = 1 - np.log(np.where(valid, x, high) / low) / scale
    if dilate:
        # single points of large pictures vanish when a sheet shows them small; the nearest wins
        nearness = np.where(valid, np.clip(nearness, 0, 1), -1)
        for _ in range(round(min(x.shape) / 300)):
            padded = np.pad(nearness, 1, constant_values=-1)
            for rows in (padded[:-2, 1:-1], padded[2:, 1:-1]):
                nearness = np.maximum(nearness, rows)
            padded = np.pad(nearness, 1, constant_values=-1)
            for beside in (padded[1:-1, :-2], padded[1:-1, 2:]):
                nearness = np.maximum(nearness, beside)
        valid = nearness >= 0
    at = np.clip(nearness, 0, 1) * (len(_COLOURS) - 1)
    channels = [np.interp(at, np.arange(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)]
    return _bytes(np.stack(channels, axis=-1) * valid[..., None])


def _events(x: np.ndarray) -> np.ndarray:
    if len(x) == 1:
        positive, negative = np.maximum(x[0], 0), np.maximum(-x[0], 0)
    else:  # some files leave the middle one of three channels empty, others the last
        positive, negative = x[0], x[2] if len(x) > 2 and not x[1].any() else x[1]
    counts = np.abs(np.stack([positive, negative]))
    _, high = _robust(counts[counts > 0])
    # few events must be seen beside many
    strength = np.sqrt(np.clip(counts / high, 0, 1))[..., None]
    white = np.float32(255)
    ink = strength[0] * (white - _RED) + strength[1] * (white - _BLUE)
    return _bytes(white - ink)


def _robust(x: np.ndarray) -> tuple[float, float]:
    """The range of values without the outermost percent on both sides, never empty."""
    if x.size == 0:
        return 1.0, 2.0
    low, high = (float(v) for v in np.percentile(x, (1, 99)))
    return low, high if high > low else low + 1.0


def _three(x: np.ndarray) -> np.ndarray:
    """`[C, H, W]` -> `[H, W, 3]`: gray unless there are three channels or more."""
    rgb = x[:3] if len(x) >= 3 else np.broadcast_to(x[:1], (3, *x.shape[1:]))
    return np.moveaxis(rgb, 0, -1)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)

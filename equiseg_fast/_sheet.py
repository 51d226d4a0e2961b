"""The picture of an evaluation: what sensors saw, what the model said, and where it was wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._files import replace_file
from .data import SensorDataset, collate, colour_labels, palette_of, show
from .models import EQUISeg
from .robustness import CLEAN, Condition, Conditioned, conditions

WRONG, RIGHT, IGNORED = (214, 39, 40), (232, 236, 238), (40, 40, 40)
# tab10 without red and gray, which mean wrong and right beside it
SENSOR_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sample under one condition: pictures uint8 `[H, W, 3]`, None where a sensor is absent.

    shares: contribution of every sensor in every stage, `[4, M]`, summing to 1 over the sensors.
    """

    name: str
    inputs: list[np.ndarray | None]
    truth: np.ndarray
    prediction: np.ndarray
    errors: np.ndarray
    right: float
    shares: np.ndarray


def draw_sheet(
    path: Path,
    model: EQUISeg,
    dataset: SensorDataset,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int,
) -> None:
    """Write a PNG with two rows for each sample of the dataset: as it is, and with a bad camera."""
    rows = [
        _row(model, Conditioned(dataset, condition, seed=seed), index, device, dtype)
        for index in range(len(dataset))
        for condition in (CLEAN, bad_camera(dataset))
    ]
    _draw(path, rows, dataset)


def bad_camera(dataset: SensorDataset) -> Condition:
    """Night at its worst where there is a camera, and otherwise zeros from the first sensor."""
    for condition in conditions(dataset.sensors, ("degradations",)):
        if condition.name == "night" and condition.amount == 1.0:
            return condition
    return Condition("emm", (dataset.sensors[0].name,))


def _row(
    model: EQUISeg,
    dataset: Conditioned,
    index: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Row:
    sample = dataset[index]
    batch = collate([sample]).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        prediction = model(batch.images, present=batch.mask)[0].argmax(dim=0).cpu()
        stages = model.stages(batch.images, present=batch.mask)
    palette = palette_of(len(dataset.classes), dataset.palette)
    labels = sample.labels
    assert labels is not None  # Conditioned sees to it
    counts = labels != dataset.ignore_index
    right = (prediction == labels) & counts
    errors = np.full((*labels.shape, 3), WRONG, np.uint8)
    errors[right.numpy()] = RIGHT
    errors[~counts.numpy()] = IGNORED
    return Row(
        f"{sample.name}\n{dataset.condition}",
        [
            # What the model saw, in the units of the sensor.
            show(sensor, sensor.denormalise(sample.images[sensor.name]))
            if sample.present[i]
            else None
            for i, sensor in enumerate(dataset.sensors)
        ],
        colour_labels(labels, palette, dataset.ignore_index),
        colour_labels(prediction, palette, -1),
        errors,
        right.sum().item() / max(counts.sum().item(), 1),
        torch.stack([s.contributions[:, 0].mean(dim=-1) for s in stages]).cpu().numpy(),
    )


def _draw(path: Path, rows: list[Row], dataset: SensorDataset) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [sensor.name for sensor in dataset.sensors]
    colours = dict(zip(names, SENSOR_COLOURS, strict=False))
    height, width = rows[0].truth.shape[:2]
    # In inches: pictures are 2.4 wide, and high enough for bars of four stages; every row has a
    # line for titles above.
    across, line, side = 2.4, 0.24, 0.5
    down = max(across * height / width, 1.0)
    columns = len(names) + 4
    classes = len(dataset.classes)
    lines = -(-classes // max(1, int((side + columns * across) / 1.4)))
    below = line * (lines + 0.5)
    wide, high = side + columns * across, len(rows) * (down + line) + below
    figure = Figure(figsize=(wide, high), dpi=110, facecolor="white")

    def place(r: int, c: int) -> Any:
        x, y = side + c * across, high - (r + 1) * (down + line)
        box = ((x + 0.03) / wide, (y + 0.03) / high, (across - 0.06) / wide, (down - 0.06) / high)
        return figure.add_axes(box)

    for r, row in enumerate(rows):
        middle = high - (r + 1) * (down + line) + down / 2
        figure.text(
            side / 2 / wide, middle / high, row.name, rotation=90, fontsize=8, ha="center",
            va="center", linespacing=1.4,
        )  # fmt: skip
        titles = [*names, "labels", "prediction"] if r == 0 else [""] * (len(names) + 2)
        titles += [f"red is wrong: {1 - row.right:.1%}"]
        pictures = [*row.inputs, row.truth, row.prediction, row.errors]
        for c, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
            axes = place(r, c)
            axes.set_axis_off()
            axes.set_title(title, fontsize=9, pad=3)
            if picture is None:
                axes.text(0.5, 0.5, "absent", ha="center", va="center", fontsize=9, color="gray")
            else:
                axes.imshow(picture, interpolation="nearest")
        axes = place(r, columns - 1)
        if r == 0:
            axes.set_title("contributions, stages 1 to 4", fontsize=9, pad=3)
        _bars(axes, row.shares, colours)
    palette = palette_of(len(dataset.classes), dataset.palette) / 255
    figure.legend(
        handles=[
            Patch(facecolor=tuple(colour), edgecolor="gray", linewidth=0.5, label=name)
            for name, colour in zip(dataset.classes, palette, strict=True)
        ],
        loc="lower center",
        ncols=-(-classes // lines),
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.4,
    )
    replace_file(path, FigureCanvasAgg(figure).print_png)


def _bars(axes: Any, shares: np.ndarray, colours: dict[str, str]) -> None:
    """One bar per stage, divided among the sensors."""
    edges = np.concatenate([np.zeros((4, 1)), shares.cumsum(axis=1)], axis=1)
    for i, (name, colour) in enumerate(colours.items()):
        axes.barh(range(4), shares[:, i], 0.78, left=edges[:, i], color=colour)
        for stage in range(4):
            if shares[stage, i] >= 0.12:
                axes.text(
                    edges[stage, i : i + 2].mean(), stage, f"{name}\n{shares[stage, i]:.0%}",
                    ha="center", va="center", fontsize=6, color="white", linespacing=0.95,
                )  # fmt: skip
    axes.set_xlim(-0.04, 1)
    axes.set_ylim(3.5, -0.5)
    axes.set_axis_off()

"""The picture of an evaluation: what sensors saw, what the model said, and where it was wrong."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equiseg_fast.data import SensorDataset, collate, colour_labels, palette_of
from equiseg_fast.data.pictures import Panel, panels, sheet
from equiseg_fast.models import EQUISeg
from equiseg_fast.robustness import CLEAN, Condition, Conditioned, conditions

WRONG, RIGHT, IGNORED = (214, 39, 40), (232, 236, 238), (40, 40, 40)
# tab10 without red and gray, which mean wrong and right beside it
SENSOR_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf"
)  # fmt: skip


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
    sheet(rows, path, classes=dataset.classes, palette=dataset.palette)


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
) -> tuple[str, list[tuple[str, Panel]]]:
    """One sample under one condition, for `sheet`."""
    sample = dataset[index]
    batch = collate([sample]).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        prediction = model(batch.images, present=batch.mask)[0].argmax(dim=0).cpu()
        stages = model.stages(batch.images, present=batch.mask)
    labels = sample.labels
    assert labels is not None  # Conditioned sees to it
    counts = labels != dataset.ignore_index
    wrong = (prediction != labels) & counts
    errors = np.full((*labels.shape, 3), RIGHT, np.uint8)
    errors[wrong.numpy()] = WRONG
    errors[~counts.numpy()] = IGNORED
    share = wrong.sum().item() / max(counts.sum().item(), 1)
    contributions = torch.stack([s.contributions[:, 0].mean(dim=-1) for s in stages]).cpu().numpy()
    colours = dict(zip([x.name for x in dataset.sensors], SENSOR_COLOURS, strict=False))
    palette = palette_of(len(dataset.classes), dataset.palette)
    # What the model saw, in the units of the sensors.
    seen = {x.name: x.denormalise(sample.images[x.name]) for x in dataset.sensors}
    return f"{sample.name}\n{dataset.condition}", [
        *panels(dataset, replace(sample, images=seen)),
        ("prediction", colour_labels(prediction, palette, -1)),
        (f"red is wrong: {share:.1%}", errors),
        ("contributions, stages 1 to 4", partial(_bars, shares=contributions, colours=colours)),
    ]


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

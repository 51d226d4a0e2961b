"""The picture of the sensors: the inputs, and who contributes what when one is blank or absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import data
from benchmarks.reporting.plots.style import pyplot

if TYPE_CHECKING:
    from benchmarks.sensors import Contributions

MODALITY_COLOURS = ("#4c72b0", "#55a868", "#dd8452")


def draw(found: Contributions, folder: Path) -> str:
    """The three inputs, and who contributes what at each stage; returns the file name."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    sensors = data.motorcycle()
    figure = plt.figure(figsize=(12.5, 10.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.35))
    _inputs(top, sensors)
    axes = bottom.subplots(2, 4, sharey=True, sharex=True)
    _stack(axes[0, 0], "all present", found)
    axes[1, 0].set_visible(False)
    for column, name in enumerate(data.NAMES, start=1):
        _stack(axes[0, column], f"{name} blanked", found, " (zeros)")
        _stack(axes[1, column], f"{name} absent", found, " (masked)")
    for axis in (axes[0, 0], axes[1, 1]):
        axis.set_ylabel("contribution to the fused map")
        axis.tick_params(labelleft=True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in MODALITY_COLOURS]
    bottom.legend(handles, data.NAMES, loc=(0.055, 0.33), title="modality", frameon=False)
    bottom.text(
        0.012,
        0.30,
        "Mean over channels of the\n"
        "softmax weights of the gate,\n"
        "per stage; dotted: equal shares.\n\n"
        "blanked: the image is zeros and\n"
        "the model is not told.\n"
        "absent: the model is told and\n"
        "never reads it.\n\n"
        f"B0, {len(found.losses)} training steps on the\n"
        "pseudo-labels (an untrained gate\n"
        f"gives 1/3); loss {_average(found.losses[:5]):.1f} to "
        f"{_average(found.losses[-5:]):.1f}\n"
        "(first and last five steps).",
        va="top",
        fontsize=9,
    )
    figure.savefig(folder / "sensors.png", dpi=120)
    plt.close(figure)
    return "sensors.png"


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _inputs(figure: Any, sensors: data.Sensors) -> None:
    (axes, bars) = figure.subplots(2, 4, height_ratios=(1, 0.05))
    labels = sensors.labels[0].numpy()
    axes[0].imshow(sensors.left)
    axes[1].imshow(sensors.right)
    depth = axes[2].imshow(sensors.disparity, cmap="viridis")
    bands = axes[3].imshow(
        labels.astype(float), cmap=pyplot().get_cmap("tab10", data.BANDS), vmin=-0.5,
        vmax=data.BANDS - 0.5, alpha=(labels != data.IGNORE).astype(float), interpolation="nearest",
    )  # fmt: skip
    titles = ("left camera", "right camera", "disparity", "pseudo-labels")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_axis_off()
    for axis in bars[:2]:
        axis.set_visible(False)
    bar = {"orientation": "horizontal"}
    figure.colorbar(depth, cax=bars[2], **bar).set_label("pixels; white: not measured")
    figure.colorbar(bands, cax=bars[3], ticks=range(data.BANDS), **bar).set_label(
        "disparity band; white: ignored"
    )


def _stack(axis: Any, key: str, found: Contributions, suffix: str = "") -> None:
    """One stacked bar per stage."""
    table = found.weights[key].nan_to_num(0.0)
    below = table.new_zeros(len(table))
    for m, colour in enumerate(MODALITY_COLOURS):
        part = table[:, m]
        axis.bar(range(1, 5), part, bottom=below, color=colour, width=0.8)
        for stage, (value, start) in enumerate(zip(part, below, strict=True), start=1):
            if value > 0.04:
                axis.text(
                    stage, start + value / 2, f"{100 * value:.0f} %", ha="center", va="center",
                    color="white", fontsize=8,
                )  # fmt: skip
        below = below + part
    number = 3 - int(found.weights[key][0].isnan().sum())
    for level in (i / number for i in range(1, number)):
        axis.axhline(level, color="black", lw=0.7, ls=":")
    axis.set_ylim(0, 1)
    axis.set_xticks(range(1, 5), [f"stage {s}" for s in range(1, 5)])
    axis.tick_params(labelbottom=True)
    axis.set_title(key + suffix)

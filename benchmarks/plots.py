"""Pictures of a run. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import data
from benchmarks.record import Record
from benchmarks.registry import PROVIDERS
from benchmarks.report import grouped, milliseconds, significant

if TYPE_CHECKING:
    from benchmarks.sensors import Contributions

COLOURS = {
    "baseline": "#8c8c8c",
    "reference": "#4c72b0",
    "torch": "#dd8452",
    "triton": "#2a9d4e",
    "compile": "#8172b3",
    "transformers": "#64b5cd",
    "sdpa_flash": "#c44e52",
    "sdpa_efficient": "#937860",
    "sdpa_cudnn": "#da8bc3",
}
MODALITY_COLOURS = ("#4c72b0", "#55a868", "#dd8452")
GROUPS_PER_PANEL = 8
GAP = 0.6


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
    }
    plt.rcParams.update(style)
    return plt


def draw(records: Sequence[Record], folder: Path) -> list[str]:
    """Latency and memory bars of everything that was measured; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for stem, field, unit, title in (
        ("latency", "p50_us", "ms", "Time per call"),
        ("memory", "peak_mib", "MiB", "Peak memory allocated by a call"),
    ):
        panels = _panels([r for r in records if getattr(r, field) is not None])
        # A page holds a quick run; larger suites get a page per operation.
        pages = {stem: panels}
        if len(panels) > 12:
            pages = {f"{stem}-{op}": [p for p in panels if p[0] == op] for op, _ in panels}
        for page, chosen in pages.items():
            if chosen:
                _bars(chosen, field, unit, title, folder / f"{page}.png")
                names.append(f"{page}.png")
    return names


def _panels(records: Sequence[Record]) -> list[tuple[str, list[list[Record]]]]:
    """(operation, groups of providers), with at most GROUPS_PER_PANEL groups each."""
    by_op: dict[str, list[list[Record]]] = {}
    for group in grouped(records):
        by_op.setdefault(group[0].op, []).append(group)
    return [
        (op, groups[i : i + GROUPS_PER_PANEL])
        for op, groups in by_op.items()
        for i in range(0, len(groups), GROUPS_PER_PANEL)
    ]


def _bars(
    panels: Sequence[tuple[str, list[list[Record]]]], field: str, unit: str, title: str, path: Path
) -> None:
    """Horizontal bars relative to the eager baseline, each with its absolute value."""
    plt = _pyplot()
    columns = min(3, len(panels))
    needed = [sum(len(g) + GAP for g in groups) for _, groups in panels]
    heights = [max(needed[i : i + columns]) for i in range(0, len(panels), columns)]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(4.8 * columns, 1.0 + sum(0.7 + 0.2 * height for height in heights)),
        height_ratios=[0.7 + 0.2 * height for height in heights],
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, (op, groups)) in enumerate(zip(axes.flat, panels, strict=False)):
        _panel(axis, op, groups, field, heights[i // columns])
    used = {r.provider for _, groups in panels for group in groups for r in group}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in PROVIDERS if p in used]
    figure.legend(
        handles,
        [p for p in PROVIDERS if p in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
    )
    sample = panels[0][1][0][0]
    note = "whiskers: p20 to p80, " if field == "p50_us" else ""
    figure.suptitle(
        f"{title}, relative to the eager baseline ({note}shorter is better)\n"
        f"suite {sample.suite}, numbers in {unit}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, op: str, groups: Sequence[list[Record]], field: str, rows: float) -> None:
    y = 0.0
    ticks, labels = [], []
    widest = 0.0
    for group in groups:
        base = next((r for r in group if r.provider == "baseline"), group[0])
        scale = getattr(base, field) or 1.0
        start = y
        for record in group:
            value = getattr(record, field)
            error = None
            if field == "p50_us":
                low, high = value - record.p20_us, record.p80_us - value
                error = [[low / scale], [high / scale]]
            axis.barh(
                y, value / scale, height=0.85, color=COLOURS[record.provider],
                xerr=error, error_kw={"lw": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            end = (record.p80_us if field == "p50_us" else value) / scale
            widest = max(widest, end)
            text = milliseconds(value) if field == "p50_us" else significant(value)
            axis.annotate(
                text,
                (end, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            y += 1
        ticks.append((start + y - 1) / 2)
        labels.append(_tick(group[0], groups))
        y += GAP
    axis.axvline(1.0, color="#8c8c8c", lw=0.8, ls=":")
    axis.set_xlim(0, 1.18 * widest)
    axis.set_yticks(ticks, labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(rows - GAP, -0.6)
    axis.set_title(op, loc="left")
    axis.set_xlabel("x eager baseline")


def _tick(record: Record, groups: Sequence[list[Record]]) -> str:
    """What tells this group from the others of the panel."""
    shape = record.shape
    shapes = {g[0].shape for g in groups}
    parts = []
    if len({(s.variant, s.height, s.width, s.batch, s.modalities) for s in shapes}) > 1:
        parts.append(shape.label)
    elif shape.stage:
        parts.append(f"stage {shape.stage}")
    if len({g[0].dtype for g in groups}) > 1:
        parts.append(record.dtype)
    return "\n".join([*parts, record.mode])


def draw_sensors(found: Contributions, folder: Path) -> str:
    """The three inputs, and who contributes what at each stage; returns the file name."""
    plt = _pyplot()
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
        labels.astype(float), cmap=_pyplot().get_cmap("tab10", data.BANDS), vmin=-0.5,
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

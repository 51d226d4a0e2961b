"""The tables that `equiseg_fast.evaluate` prints."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from equiseg_fast.data import SensorDataset
from equiseg_fast.models import EQUISegConfig
from equiseg_fast.robustness import (
    CLEAN,
    FAILURES,
    LEVELS,
    PROTOCOLS,
    RATIOS,
    SEVERITIES,
    Condition,
    Subset,
    proper_subsets,
    summary,
)

Results = Mapping[Condition, dict[str, Any]]
MOST_SUBSETS = 32


def show_plan(
    console: Console,
    config: EQUISegConfig,
    dataset: SensorDataset,
    todo: Sequence[Condition],
    left: Sequence[Condition],
    seconds: float,
    device: torch.device,
) -> None:
    """What an evaluation would do. seconds: of one image."""
    console.print(_headline(config, dataset))
    names = list(dict.fromkeys(c.name for c in todo if c.protocol == "degradations"))
    says = {
        "clean": "nothing fails; counts in emm, rmm and masked as well",
        "emm": "sensors are zero, and count as present",
        "rmm": f"elements are zero at ratios {', '.join(f'{r:g}' for r in RATIOS)}",
        "nm": f"noise on all sensors, {', '.join(LEVELS)}",
        "masked": _masked(config),
        "degradations": f"{', '.join(names)}; severities {', '.join(f'{s:g}' for s in SEVERITIES)}",
    }
    table = Table("protocol", _right("conditions"), _right("left"), "what happens")
    for protocol in PROTOCOLS:
        count = sum(c.protocol == protocol for c in todo)
        if count:
            to_run = sum(c.protocol == protocol for c in left)
            table.add_row(protocol, str(count), str(to_run), says[protocol])
    console.print(table)
    subsets = [_plus(a) for a in proper_subsets(config.modalities)[1:]]
    if any(c.sensors for c in todo):
        said = ", ".join(subsets)
        if len(subsets) >= MOST_SUBSETS:
            said = f"all {len(subsets)} sets of 1 to {len(config.modalities) - 1} sensors"
        console.print(f"Sensors that fail, in turn: {said}.")
    passes = len(left) * len(dataset)
    console.print(
        f"{len(left)} conditions of {len(dataset)} images: {passes} passes. The model takes "
        f"{seconds:.3g} s per image on {device}: {_duration(passes * seconds)} without reading."
    )


def show_tables(
    console: Console, config: EQUISegConfig, dataset: SensorDataset, results: Results
) -> None:
    """All results, in percent."""
    console.print(f"{_headline(config, dataset)}; all scores in percent")
    miou = {condition: result["miou"] for condition, result in results.items()}
    if CLEAN in results:
        console.print(_classes(dataset, results))
    if any(c.sensors for c in results):
        console.print(_subsets(config, miou))
    if any(c.protocol == "nm" for c in results):
        console.print(_noise(miou))
    if any(c.protocol == "degradations" for c in results):
        console.print(_degradations(miou))
    of_all = summary(miou, config.modalities)
    if "mean_of_EMM_Avg_RMM_Avg_0.5_NM_low" in of_all:
        mean = _percent(of_all["mean_of_EMM_Avg_RMM_Avg_0.5_NM_low"])
        console.print(f"Mean of EMM_Avg, RMM_Avg at r = 0.5, and NM low: {mean}")
    _notes(console, config, dataset, results)


def _notes(
    console: Console, config: EQUISegConfig, dataset: SensorDataset, results: Results
) -> None:
    zero = {c: r["miou_absent_as_zero"] for c, r in results.items()}
    if any(not math.isclose(r["miou"], zero[c]) for c, r in results.items()):
        averages = summary(zero, config.modalities)
        found = {
            "clean": averages.get("clean"),
            "EMM_Avg": averages.get("EMM_Avg"),
            **{f"RMM_Avg at r = {r}": x for r, x in averages.get("RMM_Avg", {}).items()},
            **{f"NM {level}": x for level, x in averages.get("NM", {}).items()},
        }
        texts = ", ".join(f"{n}: {_percent(x)}" for n, x in found.items() if x is not None)
        console.print(
            "mIoU is over classes that occur. With 0 for those that do not, as DeLiVER's authors "
            f"count: {texts}"
        )
    if left_out := {str(c): r["left_out"] for c, r in results.items() if r["left_out"]}:
        console.print(
            "Images that had no sensor left, and are not counted: "
            + ", ".join(f"{count} under {name}" for name, count in left_out.items())
        )
    if config.missing == "zero" and any(c.protocol == "masked" for c in results):
        console.print(f"masked: {_masked(config)}")


def _headline(config: EQUISegConfig, dataset: SensorDataset) -> str:
    return (
        f"EQUISeg-{config.variant.upper()} of {', '.join(config.modalities)}; "
        f"{len(dataset)} images, {len(dataset.classes)} classes"
    )


def _masked(config: EQUISegConfig) -> str:
    if config.missing == "zero":
        return 'this model takes absent sensors for zeros (missing: "zero"), so it equals emm'
    return "sensors are absent, by the mask of the model"


def _classes(dataset: SensorDataset, results: Results) -> Table:
    """IoU of every class, clean and with each one sensor zero."""
    alone = {s.name: Condition("emm", (s.name,)) for s in dataset.sensors}
    shown = {"clean": CLEAN, **{f"{n} zero": c for n, c in alone.items() if c in results}}
    table = Table("IoU", *(_right(name) for name in shown))
    for k, name in enumerate(dataset.classes):
        table.add_row(name, *(_percent(results[c]["iou"][k]) for c in shown.values()))
    table.add_section()
    for title, key in (("mIoU", "miou"), ("pixels right", "pixel_accuracy")):
        row = (_percent(results[c][key]) for c in shown.values())
        table.add_row(title, *row, style="bold" if key == "miou" else "")
    return table


def _subsets(config: EQUISegConfig, miou: Mapping[Condition, float]) -> Table:
    """mIoU of the protocols over subsets, and their averages."""
    columns: dict[str, tuple[str, float]] = {"EMM": ("emm", 0.0), "masked": ("masked", 0.0)}
    columns |= {f"RMM {r:g}": ("rmm", r) for r in RATIOS}
    columns = {
        title: key
        for title, key in columns.items()
        if any((c.protocol, c.amount) == key for c in miou)
    }
    count = len(config.modalities)
    subsets = proper_subsets(config.modalities)
    table = Table("mIoU without", *(_right(title) for title in columns))
    if len(subsets) >= MOST_SUBSETS:
        subsets = [a for a in subsets if len(a) <= 1 or len(a) == count - 1]
        table.caption = f"sets of 2 to {count - 2} sensors are in evaluation.json"

    def cell(key: tuple[str, float], a: Subset) -> str:
        return _percent(miou.get(Condition(key[0], a, key[1]) if a else CLEAN))

    for a in subsets:
        table.add_row(_plus(a) or "nothing (clean)", *(cell(key, a) for key in columns.values()))
    table.add_section()
    of_all = summary(miou, config.modalities)

    def averages(title: str) -> dict[str, Any]:
        prefix, _, ratio = title.partition(" ")
        found = {"Avg": of_all.get(f"{prefix}_Avg"), "E": of_all.get(f"{prefix}_E", {})}
        if ratio:
            found = {name: (x or {}).get(ratio) for name, x in found.items()}
        return {"Avg": found["Avg"], **{f"E({p})": x for p, x in (found["E"] or {}).items()}}

    for name in ("Avg", *(f"E({p:g})" for p in FAILURES)):
        row = (_percent(averages(title).get(name)) for title in columns)
        table.add_row(name, *row, style="bold" if name == "Avg" else "")
    return table


def _noise(miou: Mapping[Condition, float]) -> Table:
    table = Table("mIoU with noise", *(_right(f"NM {level}") for level in LEVELS))
    table.add_row(
        "all sensors", *(_percent(miou.get(Condition("nm", name=level))) for level in LEVELS)
    )
    return table


def _degradations(miou: Mapping[Condition, float]) -> Table:
    """mIoU by what happens and how badly; nothing at severity 0."""
    table = Table("mIoU, severity", *(_right(f"{s:g}") for s in (0, *SEVERITIES)))
    for name in dict.fromkeys(c.name for c in miou if c.protocol == "degradations"):
        at = [miou.get(CLEAN)]
        at += [miou.get(Condition("degradations", amount=s, name=name)) for s in SEVERITIES]
        table.add_row(name, *map(_percent, at))
    return table


def _right(title: str) -> Any:
    return Column(title, justify="right")


def _plus(names: Subset) -> str:
    return " + ".join(names)


def _percent(x: float | None) -> str:
    return "" if x is None else "-" if math.isnan(x) else f"{100 * x:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"

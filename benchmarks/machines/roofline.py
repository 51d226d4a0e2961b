"""How fast EQUISeg could run at best on a GPU that nobody here may have.

    python -m benchmarks roofline --gpu h200 --variant b2 --size 1024x1024 --batch 2 --mode step

The floor of a part is the longest of four times: its bytes at the memory's bandwidth, its matrix
products at the tensor cores' peak, its other FLOPs at the FP32 peak, its exponentials at the rate
of the special function units. Floors of parts add up. Bytes are taken to come from memory: of small
tensors that stay in the L2 cache it is no floor. All of it is a prediction from published or
calibrated peaks; nothing here was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.cases import operations
from benchmarks.cases.common import model_cost
from benchmarks.cases.common.cost import Limits, Work, total
from benchmarks.cases.common.model_cost import Part
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import to_path
from benchmarks.command.table import FittedTable
from benchmarks.machines import calibrate, gpus
from equiseg_fast.models.config import check_variant

if TYPE_CHECKING:
    from rich.console import Console

LABEL = "prediction, not measured"
MODES = {"fwd": "inference", "step": "training step"}


@dataclass(frozen=True)
class Floor:
    """What some calls need, in seconds at least, and what most of that is spent on."""

    work: Work
    seconds: float
    bound: str

    @classmethod
    def of(cls, works: Sequence[Work], limits: Limits, dtype: str) -> Floor:
        return cls(total(works), limits.floor(works, dtype), limits.bound(works, dtype))


def floor_of_parts(parts: Iterable[Part], mode: str, limits: Limits, dtype: str) -> Floor:
    return Floor.of(model_cost.combined(parts).of(mode), limits, dtype)


def groups_of(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """By group and stage, in the order of the model, e.g. "encoder, stage 1"."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        in_stage = part.stage and part.group != "head"
        name = f"{part.group}, stage {part.stage}" if in_stage else part.group
        groups.setdefault(name, []).append(part)
    order = list(dict.fromkeys(part.group for part in parts))
    return dict(sorted(groups.items(), key=lambda item: order.index(item[1][0].group)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks roofline`."""
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(gpus.GPUS)}")
    parser.add_argument("--variant", default="b0", help="of the encoder, b0 to b5")
    parser.add_argument("--size", type=_size, default=(1024, 1024), metavar="HxW")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--modalities", type=int, default=4)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--mode", choices=tuple(MODES), default="fwd", help="forward or training")
    parser.add_argument(
        "--calibration",
        type=to_path,
        metavar="FILE",
        help="of `calibrate`, instead of the datasheet",
    )
    parser.add_argument("--parts", action="store_true", help="every part of every stage, too")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be predicted")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be like 1024x1024; got {text!r}")
    height, width = map(int, parts)
    if min(height, width) < 32 or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(f"must be multiples of 32; got {text!r}")
    return height, width


def main(args: argparse.Namespace, console: Console) -> int:
    """Print peaks and floors. Raises ValueError for names and numbers that cannot be."""
    gpu = gpus.by_name(args.gpu)
    for name, least, most in (("batch", 1, 4096), ("modalities", 1, 8)):
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name} must be {least} to {most}; got {getattr(args, name)}")
    shape = Shape(check_variant(args.variant), 0, *args.size, args.batch, args.modalities)
    limits = calibrate.read(args.calibration) if args.calibration else gpu.limits
    what = f"{shape.label} {args.dtype}, {MODES[args.mode]}"
    if args.dry_run:
        console.print(f"floors of {what} on {gpu.title}: operations, stages and the whole model")
        console.print("nothing was computed")
        return 0
    parts = model_cost.model_parts(shape, DTYPES[args.dtype].itemsize, training=args.mode == "step")
    limits.floor([Work()], args.dtype)  # refuses a dtype without a peak before anything is printed
    console.print(_peaks(gpu, limits, args.dtype, bool(args.calibration)))
    console.print(_operations(shape, args.mode, limits, args.dtype, f"{what}, one call each"))
    console.print(_model(parts, args.mode, limits, args.dtype, what, args.parts))
    whole = floor_of_parts(parts, args.mode, limits, args.dtype)
    console.print(
        f"{what} on {gpu.title}: at least {milliseconds(whole.seconds)} ms, "
        f"{whole.work.flops / 1e12:.3g} TFLOP, {whole.work.bytes / 1e9:.3g} GB, "
        f"{whole.work.exps / 1e9:.3g} G exponentials ({LABEL})"
    )
    return 0


def _peaks(gpu: gpus.Gpu, limits: Limits, dtype: str, calibrated: bool) -> FittedTable:
    doubts = f"; unconfirmed: {gpu.unconfirmed}" if gpu.unconfirmed else ""
    measured = "; used here: calibration file" if calibrated else ""
    table = FittedTable(
        ("limit", "published", "used here") if calibrated else ("limit", "published, used here"),
        words=("limit",),
        title=f"peaks of {gpu.title}",
        caption=f"published: {gpu.source}{doubts}{measured}",
    )
    rows = [
        ("memory, TB/s", gpu.bandwidth, limits.bandwidth),
        (f"matrix products {dtype}, TFLOP/s", gpu.peak[dtype], limits.peak[dtype]),
        ("other arithmetic (fp32), TFLOP/s", gpu.peak["fp32"], limits.peak["fp32"]),
        ("exponentials, T/s", gpu.exps, limits.exps),
    ]
    for name, published, used in rows:
        cells = [published, used] if calibrated else [used]
        shown = ["not known" if x is None else f"{x / 1e12:.4g}" for x in cells]
        table.add_row(name, *shown)
    l2 = "not confirmed" if gpu.l2 is None else f"{gpu.l2 / 1e6:.0f}"
    for name, value in (
        ("multiprocessors", str(gpu.multiprocessors)),
        ("clock, GHz", f"{gpu.clock / 1e9:.2f}"),
        ("L2, MB", l2),
    ):
        table.add_row(name, value)
    return table


NUMBERS = ("calls", "MB", "GFLOP", "G exps", "floor ms", "share")


def _table(title: str, names: Sequence[str], left_out: Sequence[str]) -> FittedTable:
    return FittedTable(
        (*names, *(name for name in NUMBERS if name not in left_out), "bound by"),
        words=(*names, "bound by"),
        spare=("G exps", "calls", "GFLOP"),
        title=f"{title} ({LABEL})",
    )


def _cells(floor: Floor, left_out: Sequence[str], whole: float = 0.0, calls: int = 0) -> list[str]:
    """One row of `_table` behind the names; whole: seconds of the model, for the share."""
    work = floor.work
    cells = {
        "calls": str(calls or ""),
        "MB": f"{work.bytes / 1e6:.4g}",
        "GFLOP": f"{work.flops / 1e9:.4g}",
        "G exps": f"{work.exps / 1e9:.3g}" if work.exps else "",
        "floor ms": milliseconds(floor.seconds),
        "share": f"{100 * floor.seconds / whole:.1f} %" if whole else "",
    }
    shown = [text for name, text in cells.items() if name not in left_out]
    return [*shown, floor.bound if floor.seconds else ""]


def _operations(shape: Shape, mode: str, limits: Limits, dtype: str, title: str) -> FittedTable:
    """The operations that `run` measures, at every stage."""
    left_out = ("calls", "share")
    table = _table(title, ("operation", "stage"), left_out)
    for op in operations().values():
        if not op.function or op.cost is None:
            continue
        for i, stage in enumerate(op.stages):
            works = op.cost(replace(shape, stage=stage), DTYPES[dtype].itemsize).of(mode)
            cells = _cells(Floor.of(works, limits, dtype), left_out)
            table.add_row("" if i else op.name, str(stage), *cells)
        table.end_section()
    return table


def _model(
    parts: Sequence[Part], mode: str, limits: Limits, dtype: str, title: str, every: bool
) -> FittedTable:
    """The sum of every stage, and of all; every part, too, if asked for."""
    names, blank, left_out = ("stage",), [], ("calls",)
    if every:
        names, blank, left_out = ("stage", "part"), [""], ()
    table = _table(f"whole model, {title}", names, left_out)
    whole = floor_of_parts(parts, mode, limits, dtype)
    for name, members in groups_of(parts).items():
        subtotal = floor_of_parts(members, mode, limits, dtype)
        cells = _cells(subtotal, left_out, whole.seconds)
        table.add_row(name, *blank, *cells, style="bold" if every else "")
        for part in members if every else ():
            floor = floor_of_parts([part], mode, limits, dtype)
            table.add_row("", part.name, *_cells(floor, left_out, whole.seconds, part.count))
    table.end_section()
    cells = _cells(whole, left_out, whole.seconds)
    table.add_row("whole model", *blank, *cells, style="bold")
    return table


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"

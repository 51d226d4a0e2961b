"""How fast EQUISeg could run at best on a GPU that nobody here may have.

    python -m benchmarks roofline --gpu h200 --variant b2 --size 1024x1024 --batch 2 --mode step

The floor of a call is the longest of four times: its bytes at the memory's bandwidth, its matrix
products at the tensor cores' peak, its other FLOPs at the FP32 peak, its exponentials at the rate
of the special function units. Floors of calls add up; those of the model are counted
(`launches.cost_of`). Bytes are taken to come from memory: of small tensors that stay in the L2
cache it is no floor. All of it is a prediction from published or calibrated peaks; nothing here was
measured.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Limits, Work, total
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import to_path
from benchmarks.command.table import FittedTable
from benchmarks.machines import calibrate, gpus
from benchmarks.measure.launches import cost_of
from equiseg_fast.models.config import check_variant

if TYPE_CHECKING:
    from rich.console import Console

LABEL = "prediction, not measured"
MODES = {"fwd": "inference", "step": "training step"}
GROUPS = {"encoder": "encoder", "fusion": "fusion", "gates": "gate", "head": "head", "": "the rest"}
"""Parts of the model, by the name that their modules begin with."""


def model_works(shape: Shape, dtype: str, mode: str) -> tuple[Work, ...]:
    """The calls of the whole model, in inference ("fwd") or a training step ("step")."""
    op = operations()["training" if mode == "step" else "model"]
    return cost_of(op, shape, DTYPES[dtype].itemsize).of(mode)


def groups_of(works: Sequence[Work]) -> dict[str, list[Work]]:
    """By part and stage, in the order of the model, e.g. "encoder, stage 1"."""
    groups: dict[tuple[int, str], list[Work]] = {}
    order = list(GROUPS)
    for work in works:
        known = re.match(r"(encoder)\.\D+(\d)|(fusion|gates)\.(\d)|(head)", work.part)
        start, stage = ([x for x in known.groups() if x] + [""])[:2] if known else ("", "")
        name = GROUPS[start]
        if stage:
            name += f", stage {int(stage) + (start != 'encoder')}"
        groups.setdefault((order.index(start), name), []).append(work)
    return {name: groups[place, name] for place, name in sorted(groups)}


def _kinds_of(works: Sequence[Work]) -> dict[str, list[Work]]:
    """By module, those of all blocks together, and call; e.g. "attn.q addmm"."""
    kinds: dict[str, list[Work]] = {}
    for work in works:
        name = re.sub(r"^(encoder\.)?(block)?\w+(\.\d+)*\.?(?=.* )", "", work.part).strip()
        kinds.setdefault(name, []).append(work)
    return kinds


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
        "--calibration", type=to_path, metavar="FILE",
        help="of `calibrate`, instead of the datasheet",
    )  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="every call of every stage, too")
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
    limits.floor([Work()], args.dtype)  # refuses a dtype without a peak before anything is printed
    console.print(_peaks(gpu, limits, args.dtype, bool(args.calibration)))

    operation = _table(f"{what}, one call each", "operation", "stage")
    for op in operations().values():
        if op.function:
            for i, stage in enumerate(op.stages):
                cost = cost_of(op, replace(shape, stage=stage), DTYPES[args.dtype].itemsize)
                names = ("" if i else op.name, str(stage))
                operation.add_row(*names, *_cells(cost.of(args.mode), limits, args.dtype))
            operation.add_section()
    console.print(operation)

    works = model_works(shape, args.dtype, args.mode)
    whole = limits.floor(works, args.dtype)
    model = _table(f"whole model, {what}", "stage", *["part"] * args.parts)
    blank = [""] * args.parts
    for name, members in groups_of(works).items():
        model.add_row(
            name, *blank, *_cells(members, limits, args.dtype, whole), style="bold" * args.parts
        )
        for kind, calls in _kinds_of(members).items() if args.parts else ():
            model.add_row("", kind, *_cells(calls, limits, args.dtype, whole))
    model.add_section()
    model.add_row("whole model", *blank, *_cells(works, limits, args.dtype, whole), style="bold")
    console.print(model)
    work = total(works)
    console.print(
        f"{what} on {gpu.title}: at least {milliseconds(whole)} ms, "
        f"{work.flops / 1e12:.3g} TFLOP, {work.bytes / 1e9:.3g} GB, "
        f"{work.exps / 1e9:.3g} G exponentials ({LABEL})"
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
    for name, published, used in (
        ("memory, TB/s", gpu.bandwidth, limits.bandwidth),
        (f"matrix products {dtype}, TFLOP/s", gpu.peak[dtype], limits.peak[dtype]),
        ("other arithmetic (fp32), TFLOP/s", gpu.peak["fp32"], limits.peak["fp32"]),
        ("exponentials, T/s", gpu.exps, limits.exps),
    ):
        cells = [published, used] if calibrated else [used]
        table.add_row(name, *("not known" if x is None else f"{x / 1e12:.4g}" for x in cells))
    table.add_row("SMs", str(gpu.num_sms))
    table.add_row("clock, GHz", f"{gpu.clock / 1e9:.2f}")
    table.add_row("L2, MB", "not confirmed" if gpu.l2 is None else f"{gpu.l2 / 1e6:.0f}")
    return table


def _table(title: str, *names: str) -> FittedTable:
    return FittedTable(
        (*names, "calls", "MB", "GFLOP", "G exps", "floor ms", "share", "bound by"),
        words=(*names, "bound by"), spare=("G exps", "calls", "GFLOP"), title=f"{title} ({LABEL})",
    )  # fmt: skip


def _cells(works: Sequence[Work], limits: Limits, dtype: str, whole: float = 0.0) -> list[str]:
    """One row of `_table` behind the names; whole: seconds of the model, for the share."""
    work, seconds = total(works), limits.floor(works, dtype)
    return [
        str(len(works)),
        f"{work.bytes / 1e6:.4g}",
        f"{work.flops / 1e9:.4g}",
        f"{work.exps / 1e9:.3g}" if work.exps else "",
        milliseconds(seconds),
        f"{100 * seconds / whole:.1f} %" if whole else "",
        limits.bound(works, dtype) if seconds else "",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"

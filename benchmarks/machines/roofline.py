"""How fast EQUISeg could run at best on a GPU that nobody here may have.

    python -m benchmarks roofline --gpu h200 --variant b2 --batch 2 --mode step

The floor of a call is the longest of four times, of its bytes, matrix products, other FLOPs and
exponentials, each at the published peak; floors of calls add up. Bytes are taken to come from
memory: of small tensors that stay in the L2 cache it is no floor. All of it is a prediction.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Work, total
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command.table import FittedTable, milliseconds, significant
from benchmarks.machines import gpus
from benchmarks.measure.launches import cost_of
from equiseg_fast.models.config import VARIANTS

MODES = {"fwd": "inference", "step": "training step"}


def model_works(shape: Shape, dtype: str, mode: str) -> tuple[Work, ...]:
    """The calls of the whole model, in inference ("fwd") or a training step ("step")."""
    op = operations()["training" if mode == "step" else "model"]
    return cost_of(op, shape, DTYPES[dtype].itemsize).of(mode)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks roofline`."""
    parser.add_argument("--gpu", type=str.lower, choices=tuple(gpus.GPUS), required=True)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="b0", help="of the encoder")
    for name, default in (("height", 1024), ("width", 1024), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--modalities", type=int, choices=range(1, 9), default=4)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--mode", choices=tuple(MODES), default="fwd", help="forward or training")


def main(args: argparse.Namespace, console: Console) -> int:
    """Print floors of one call of every operation, and of the whole model."""
    if min(args.height, args.width, args.batch) < 1:
        raise ValueError("--height, --width and --batch must be positive")
    gpu, dtype = gpus.GPUS[args.gpu], args.dtype
    shape = Shape(args.variant, 0, args.height, args.width, args.batch, args.modalities)
    works = {
        (op.name, str(stage)): cost_of(
            op, replace(shape, stage=stage), DTYPES[dtype].itemsize
        ).of(args.mode)
        for op in operations().values()
        if op.function
        for stage in op.stages
    }  # fmt: skip
    works["whole model", ""] = model_works(shape, dtype, args.mode)
    table = FittedTable(
        ("operation", "stage", "calls", "MB", "GFLOP", "G exps", "floor ms", "bound by"),
        words=("operation", "bound by"), spare=("G exps", "calls", "GFLOP"),
        title=f"{gpu.title}, {shape.label} {dtype}, {MODES[args.mode]} (prediction, not measured)",
        caption=f"peaks as published: {gpu.source}",
    )  # fmt: skip
    for names, calls in works.items():
        work, us = total(calls), 1e6 * gpu.limits.floor(calls, dtype)
        amounts = (work.bytes / 1e6, work.flops / 1e9, work.exps / 1e9)
        table.add_row(
            *names, str(len(calls)), *map(significant, amounts), milliseconds(us),
            gpu.limits.bound(calls, dtype) if us else "",
        )  # fmt: skip
    console.print(table)
    return 0

"""Every kernel of every operation once, forward and backward, on small and odd shapes.

Made to be run under a checker of memory accesses and races (compute-sanitizer), which slows
everything down by orders of magnitude: nothing is timed, and results are only held to be finite.
"""

from __future__ import annotations

import argparse
import traceback

import torch
from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, Op
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import choose_device, names
from benchmarks.measure.resume import said
from benchmarks.measure.timing import call_in_mode
from equiseg_fast.ops import _backend

# Stage 1 has many tokens and few channels, stage 4 the opposite; maps of 24 x 17 and 3 x 3 tokens.
SHAPES = (
    Shape("b0", 1, 96, 68, batch=1, modalities=3),
    Shape("b0", 4, 96, 96, batch=2, modalities=2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks exercise`."""
    parser.add_argument("--op", type=names, default=(), metavar="A,B", help="only these")
    parser.add_argument(
        "--dtype", type=names, default=("fp32", "bf16"), metavar="A,B", help="default: fp32,bf16"
    )
    parser.add_argument("--device", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be called")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 if a call fails or a result is not finite."""
    device = choose_device(args.device, needed=not args.dry_run)
    if device.type != "cuda" and not _backend.INTERPRET and not args.dry_run:
        raise ValueError("kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1")
    kernels = {name: op for name, op in operations().items() if op.function}
    for what, wanted, known in (("op", args.op, kernels), ("dtype", args.dtype, DTYPES)):
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"--{what} must be among {', '.join(known)}; got {unknown[0]!r}")
    wrong = []
    for name in args.op or kernels:
        for dtype in args.dtype:
            for shape in SHAPES:
                label = f"{name} {shape.label} {dtype}"
                # Printed before it runs: the last line names what the checker stopped.
                console.print(label, markup=False)
                reason = "" if args.dry_run else _wrong(kernels[name], shape, dtype, device)
                if reason:
                    wrong.append(f"{label}: {reason}")
    if args.dry_run:
        console.print("nothing was run")
        return 0
    for line in wrong:
        console.print(f"wrong: {line}", markup=False)
    exercised = ", ".join(args.op or kernels)
    console.print(f"exercised {exercised}: {len(wrong)} wrong")
    return 1 if wrong else 0


def _wrong(op: Op, shape: Shape, dtype: str, device: torch.device) -> str:
    """What is wrong with an operation; empty if nothing is."""
    try:
        problem = op.build(shape, DTYPES[dtype], device, 0)
        leaves = list(problem.leaves.values())
        results = [*call_in_mode(problem.calls["triton"], leaves, "fwd")()]
        if leaves:
            results += call_in_mode(problem.calls["triton"], leaves, "step")()
        return "" if all(bool(x.isfinite().all()) for x in results) else "not finite"
    except Exception as error:  # the others are still worth their call
        traceback.print_exc()
        return said(error)

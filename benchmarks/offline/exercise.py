"""Every kernel of every operation once, forward and backward, on small and odd shapes.

Made to be run under a checker of memory accesses and races (compute-sanitizer), which slows
everything down by orders of magnitude: nothing is timed, and results are only held to be finite.
"""

from __future__ import annotations

import argparse
import traceback
from itertools import product

from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import choose_device, names
from benchmarks.measure.resume import said
from benchmarks.measure.timing import call_in_mode
from equiseg_fast.ops import _backend

# Stage 1 has many tokens and few channels, stage 4 the opposite; maps of 24 x 17 and 3 x 3 tokens.
SHAPES = (Shape("b0", 1, 96, 68, 1, 3), Shape("b0", 4, 96, 96, 2, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", type=names, default=(), metavar="A,B", help="only these")
    parser.add_argument("--dtype", type=names, default=("fp32", "bf16"), metavar="A,B")
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
    chosen = args.op or tuple(kernels)
    wrong = 0
    for name, dtype, shape in product(chosen, args.dtype, SHAPES):
        label = f"{name} {shape.label} {dtype}"
        # Printed before it runs: the last line names what the checker stopped.
        console.print(label, markup=False)
        if args.dry_run:
            continue
        try:
            problem = kernels[name].build(shape, DTYPES[dtype], device, 0)
            call, leaves = problem.calls["triton"], list(problem.leaves.values())
            results = (*call_in_mode(call, leaves, "fwd")(), *call_in_mode(call, leaves, "step")())
            reason = "" if all(x.isfinite().all() for x in results) else "not finite"
        except Exception as error:  # the others are still worth their call
            traceback.print_exc()
            reason = said(error)
        if reason:
            wrong += 1
            console.print(f"wrong: {label}: {reason}", markup=False)
    done = "nothing was run" if args.dry_run else f"exercised {', '.join(chosen)}: {wrong} wrong"
    console.print(done)
    return 1 if wrong else 0

"""How long the host works for a call of an operation, beside `torch.add` and beside a floor.

On a GPU calls are enqueued and not waited for. Without one our launchers see an H100 and launch
nothing: neither Triton's launcher nor the driver is in the time, but stock operators are, which
really run, in one thread. The floor is what PyTorch asks for any operation called from Python: the
same through an operation of that schema that only allocates its results, under an
`autograd.Function` that only saves its inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import operations
from benchmarks.cases.common.problem import Outputs, Shape
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, names, to_path
from benchmarks.command.table import FittedTable
from benchmarks.measure.launches import H100, launching
from benchmarks.measure.record import environment
from benchmarks.measure.timing import Call, call_in_mode, measure_cpu
from equiseg_fast import use_backend
from equiseg_fast.ops import _backend

SHAPE = Shape("b0", 1, 32, 32, modalities=4)
DTYPE = torch.bfloat16
MODES = ("fwd", "fwd_train", "bwd")
"""Without a graph, recording one, and the gradients of all inputs with the start of the engine."""
CALLS = 10
"""In a row. Inputs are so small that a GPU keeps up, and its queue is never full."""
OPS = tuple(name for name, op in operations().items() if op.scope == "operation")


def measure(
    device: torch.device, ops: Sequence[str] = OPS, repeats: int = 30
) -> list[dict[str, Any]]:
    """One row per operation and mode. repeats: rounds.

    Microseconds of one call: us and min_us, median and least over the rounds; min_add_us and
    floor_us, the least of `torch.add` in these rounds and of the floor, None where the call is more
    than one operation.
    """
    if not _backend.TRITON_INSTALLED:
        raise ValueError("host times are those of launching kernels; triton is not installed")
    with _ready(device):
        return [row for name in ops for row in _measure_one(name, device, repeats)]


@contextmanager
def _ready(device: torch.device) -> Iterator[None]:
    """Our backend; without a GPU one thread, and launches of nothing."""
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        if device.type != "cuda":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            # so that tensors on the CPU are taken for ours
            stack.enter_context(patch.object(_backend, "INTERPRET", True))
            stack.enter_context(launching(lambda *_, **__: None, H100))
        yield


def _measure_one(name: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    problem = operations()[name].build(SHAPE, DTYPE, device, 0)
    forward, leaves = problem.calls["triton"], list(problem.leaves.values())
    calls = {mode: call_in_mode(forward, leaves, mode) for mode in MODES} | {"fwd": forward}
    with _Idle() as idle:
        call_in_mode(forward, leaves, "step")()
    if list(idle.calls) == [f"{name}_fwd", f"{name}_bwd"]:
        floors = _floors(*idle.calls.values(), leaves)
        calls |= {f"floor {mode}": call for mode, call in floors.items()}
    small = torch.ones(8, device=device)
    calls["add"] = partial(torch.add, small, small)
    in_a_row = {c: _in_a_row(calls[c], c.endswith(("fwd_train", "bwd"))) for c in calls}
    for warm_up in in_a_row.values():
        warm_up()
    times = measure_cpu(in_a_row, seconds=0, rounds=(repeats, repeats))
    least = {call: time.min_us / CALLS for call, time in times.items()}
    return [
        {
            "op": name,
            "mode": mode,
            "us": times[mode].p50_us / CALLS,
            "min_us": least[mode],
            "min_add_us": least["add"],
            "floor_us": least.get(f"floor {mode}"),
        }
        for mode in MODES
    ]


def _in_a_row(call: Call, grad: bool) -> Call:
    def calls() -> None:
        # Once for all calls, because it costs as much as torch.add.
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                call()

    return calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", type=names, default=OPS, metavar="A,B", help=f"only: {', '.join(OPS)}"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--repeats", type=int, default=30, help="rounds; default: 30")
    parser.add_argument(
        "--out", type=to_path, metavar="FILE", help="the times as JSON, over what is there"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be called")


def main(args: argparse.Namespace, console: Console) -> int:
    if unknown := [name for name in args.op if name not in OPS]:
        raise ValueError(f"--op must be among {', '.join(OPS)}; got {unknown[0]!r}")
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1; got {args.repeats}")
    device = choose_device(args.device, needed=not args.dry_run)
    if args.dry_run:
        console.print(f"{', '.join(args.op)}: {', '.join(MODES)}; nothing was run")
        return 0
    if args.out:
        outputs.writable_file(args.out)
    rows = measure(device, args.op, args.repeats)
    columns = ("operation", "mode", "median us", "least us", "x torch.add", "floor us")
    kind = "with" if device.type == "cuda" else "without"
    title = f"Host time of a call, {kind} Triton's launcher"
    table = FittedTable(columns, words=columns[:2], title=title)
    for row in rows:
        # Least times lack what other processes take away.
        times = row["us"], row["min_us"], row["min_us"] / row["min_add_us"], row["floor_us"]
        shown = ("" if time is None else f"{time:.0f}" for time in times)
        table.add_row(row["op"], row["mode"], *shown)
    console.print(table)
    if args.out:
        content = {"env": environment(device), "times": rows}
        outputs.write(args.out, json.dumps(content, indent=1) + "\n")
    return 0


class _Idle(TorchDispatchMode):
    """For every call of our registered operations one of an operation of the same schema that
    allocates such results and does nothing else, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "equiseg_fast":
            name = func.overloadpacket.__name__
            self.calls[name] = partial(_allocating(name, func._schema, results), *args)
        return results


_NUMBER = itertools.count()
_FLOOR = torch.library.Library("equiseg_fast_floor", "FRAGMENT")


def _allocating(known: str, schema: Any, results: Any) -> Any:
    several = (results,) if isinstance(results, Tensor) else results
    like = [(x.shape, x.dtype, x.device) for x in several]

    def allocate(*_: Any) -> Any:
        made = tuple(torch.empty(s, dtype=t, device=d) for s, t, d in like)
        return made if len(made) > 1 else made[0]

    name = f"{known}_{next(_NUMBER)}"  # what is registered stays registered
    _FLOOR.define(name + str(schema).partition(known)[2])
    for key in ("CPU", "CUDA"):
        _FLOOR.impl(name, allocate, key)
    return getattr(torch.ops.equiseg_fast_floor, name).default


def _floors(one: Call, other: Call, leaves: Sequence[Tensor]) -> dict[str, Call]:
    """The modes through two operations that do nothing, forward and backward."""
    gradients = tuple(torch.empty_like(x) for x in leaves)

    class Floor(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> Any:
            ctx.save_for_backward(*leaves)
            return one()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            ctx.saved_tensors  # noqa: B018 (unpacking them has a cost)
            other()
            return gradients

    def call() -> Outputs:
        outputs = Floor.apply(*leaves)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return {mode: call_in_mode(call, leaves, mode) for mode in MODES} | {"fwd": one}

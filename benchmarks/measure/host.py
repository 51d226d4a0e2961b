"""How long the host works for a call of an operation, beside `torch.add` and beside a floor.

Three modes: `fwd`, without gradients; `fwd_train`, recording a graph; `bwd`, the gradients of all
inputs, with the start of PyTorch's engine. On a GPU calls are enqueued and not waited for. Without
one our launchers see a device with the figures of an H100 and launch nothing, so the time has
neither Triton's launcher nor the driver in it, but stock operators, which really run, in one thread
of the CPU. The floor is what PyTorch asks for any operation called from Python: the same through an
operation of the same schema that only allocates its results, under an `autograd.Function` that only
saves its inputs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
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
from benchmarks.measure.timing import call_in_mode
from equiseg_fast import use_backend
from equiseg_fast.ops import _backend

FILE = "host.json"
"""Beside the records of a run, for its report."""
SHAPE = Shape("b0", 1, 32, 32, modalities=4)
DTYPE = torch.bfloat16
MODES = ("fwd", "fwd_train", "bwd")
CALLS = 10
"""In a row; few enough that no queue of a GPU is ever full."""
OPS = tuple(name for name, op in operations().items() if op.scope == "operation")
COLUMNS = ("operation", "mode", "median us", "least us", "x torch.add", "floor us")


@dataclass
class HostTime:
    """Microseconds of the host for one call in a mode: median and least over the rounds.

    min_add_us: least of `torch.add` in these rounds. floor_us: least of the floor, None where the
    call is more than one operation. launched: whether Triton's launcher is included.
    """

    op: str
    mode: str
    us: float
    min_us: float
    min_add_us: float
    floor_us: float | None
    launched: bool


def measure(device: torch.device, ops: Sequence[str] = OPS, repeats: int = 30) -> list[HostTime]:
    """Host times of operations by name; repeats: rounds."""
    if not _backend.TRITON_INSTALLED:
        raise ValueError("host times are those of launching kernels; triton is not installed")
    with _ready(device):
        return [time for name in ops for time in _measure_one(name, device, repeats)]


@contextmanager
def _ready(device: torch.device) -> Iterator[None]:
    """Our backend, no garbage collection; without a GPU one thread, and launches of nothing."""
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        if device.type != "cuda":
            torch.set_num_threads(1)
            # so that tensors on the CPU are taken for ours
            stack.enter_context(patch.object(_backend, "INTERPRET", True))
            stack.enter_context(launching(lambda _: _nothing, H100))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Instead of a launch."""


def _measure_one(name: str, device: torch.device, repeats: int) -> list[HostTime]:
    problem = operations()[name].build(SHAPE, DTYPE, device, 0)
    forward, leaves = problem.calls["triton"], list(problem.leaves.values())
    calls: dict[str, Callable[[], Any]] = {m: call_in_mode(forward, leaves, m) for m in MODES}
    calls["fwd"] = forward  # under one no_grad for all calls, which costs as much as torch.add
    with _Captured() as captured:
        call_in_mode(forward, leaves, "step")()
    called = [operation.overloadpacket.__name__ for operation, _, _ in captured.calls]
    if called == [f"{name}_fwd", f"{name}_bwd"]:
        calls |= {f"floor {mode}": call for mode, call in _floors(captured, leaves).items()}
    small = torch.ones(8, device=device)
    calls["add"] = partial(torch.add, small, small)
    times = _timed(calls, device, repeats)
    least = {call: min(found) for call, found in times.items()}
    return [
        HostTime(
            name, mode, statistics.median(times[mode]), least[mode], least["add"],
            least.get(f"floor {mode}"), device.type == "cuda",
        )
        for mode in MODES
    ]  # fmt: skip


def _timed(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Microseconds per call in every round; one round makes each call CALLS times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-2, repeats):  # two rounds to warm up
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            with torch.set_grad_enabled(name.removeprefix("floor ") in ("fwd_train", "bwd")):
                begin = perf_counter()
                for _ in range(CALLS):
                    call()
                seconds = perf_counter() - begin
            if i >= 0:
                times[name].append(1e6 * seconds / CALLS)
    return times


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
    times = measure(device, args.op, args.repeats)
    table = FittedTable(COLUMNS, words=COLUMNS[:2], title=title(times))
    for time in times:
        table.add_row(*cells(time))
    console.print(table)
    if args.out:
        content = {"env": environment(device), "times": [asdict(time) for time in times]}
        outputs.write(args.out, json.dumps(content, indent=1) + "\n")
    return 0


def read(path: Path) -> list[HostTime]:
    """The times of a file that `--out` has written."""
    return [HostTime(**row) for row in outputs.read_json(path)["times"]]


def title(times: Sequence[HostTime]) -> str:
    kind = "with" if times and times[0].launched else "without"
    return f"Host time of a call, {kind} Triton's launcher"


def cells(time: HostTime) -> tuple[str, ...]:
    """What `COLUMNS` say of it. Ratios are those of the least times, which lack what other
    processes take away."""
    floor = "" if time.floor_us is None else f"{time.floor_us:.0f}"
    numbers = (time.us, time.min_us, time.min_us / time.min_add_us)
    return (time.op, time.mode, *(f"{x:.0f}" for x in numbers), floor)


# ---- the floor ----------------------------------------------------------------------------------


class _Captured(TorchDispatchMode):
    """Calls of our registered operations, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], Sequence[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "equiseg_fast":
            several = (results,) if isinstance(results, Tensor) else results
            self.calls.append((func, args, several))
        return results


_NUMBER = itertools.count()
_FLOOR = torch.library.Library("equiseg_fast_floor", "FRAGMENT")


def _floor_operation(operation: Any, results: Sequence[Tensor]) -> Any:
    """An operation of the same schema that allocates such results and does nothing else."""
    like = [(x.shape, x.dtype, x.device) for x in results]

    def allocate(*_: Any) -> Any:
        made = tuple(torch.empty(s, dtype=t, device=d) for s, t, d in like)
        return made if len(made) > 1 else made[0]

    known = operation.overloadpacket.__name__
    name = f"{known}_{next(_NUMBER)}"  # what is registered stays registered
    _FLOOR.define(name + str(operation._schema).partition(known)[2])
    for key in ("CPU", "CUDA"):
        _FLOOR.impl(name, allocate, key)
    return getattr(torch.ops.equiseg_fast_floor, name).default


def _floors(captured: _Captured, leaves: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """The modes through operations that do nothing, for a captured forward and backward."""
    one, other = (
        partial(_floor_operation(operation, results), *args)
        for operation, args, results in captured.calls
    )
    gradients = [torch.empty_like(x) for x in leaves]

    class Floor(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> Any:
            ctx.save_for_backward(*leaves)
            return one()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            ctx.saved_tensors  # noqa: B018 (unpacking them has a cost)
            other()
            return tuple(gradients)

    def call() -> Outputs:
        outputs = Floor.apply(*leaves)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return {mode: call_in_mode(call, leaves, mode) for mode in MODES} | {"fwd": one}

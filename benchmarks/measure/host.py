"""How long the host works for a call, on small inputs, beside `torch.add` in the same rounds.

A GPU waits wherever its kernels take less time than the host needs for the next call. Timed are, in
microseconds per call: `fwd`, without gradients; `fwd_train`, recording a graph, which is then
dropped; `bwd`, `torch.autograd.grad` through that graph to all inputs, with the start of PyTorch's
engine, which a whole network pays once. Ratios to `torch.add` say more than microseconds, which a
busy machine makes longer.

On a GPU everything is real: calls are enqueued and not waited for, and the time includes Triton's
launcher. Without one our launchers see a device with the figures of an H100 and do all they do, but
launch nothing: neither Triton's launcher nor the driver nor our `launch` is in the time. Stock
operators really run, in one thread of the CPU: most of the time of `mix_ffn` and of the blocks at
the end of the table is theirs, and a third of that of `query_hub` without gradients.

The floor is the same through an operation with the same schema that does nothing but allocate its
results, under an `autograd.Function` that does nothing but save its inputs: what PyTorch asks for
any operation called from Python. The parts of a time are differences: `checks` of the arguments
and all else that the function does but for the `choice` of the backend, recording the `graph`, the
`engine and node` of a backward, the `dispatcher`, the `arguments` of launches with the memory of
the results, and on a GPU the `launches` themselves.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
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
from benchmarks.measure.launches import launching
from benchmarks.measure.record import environment
from benchmarks.measure.timing import call_in_mode
from equiseg_fast import EQUISeg, use_backend
from equiseg_fast.ops import _backend
from equiseg_fast.ops._registry import LAUNCHERS

SCHEMA = 1
FILE = "host.json"
"""Beside the records of a run, for its report."""
SHAPE = Shape("b0", 1, 32, 32, modalities=4)
DTYPE = torch.bfloat16
MODES = ("fwd", "fwd_train", "bwd")
CALLS = 10
"""In a row; few enough that no queue of a GPU is ever full."""
H100 = (90, 132)
"""Architecture and SMs."""
BLOCKS = ("cross-modal block", "encoder block")
OPS = tuple(name for name, op in operations().items() if op.scope == "operation")


@dataclass
class HostTime:
    """Microseconds of the host for one call in a mode: median and least over the rounds.

    add_us, min_add_us: the same of `torch.add` in these rounds. floor_us: least of an operation of
    that schema that does nothing, None where the call is more than one operation. launched: whether
    Triton's launcher is included. parts: what min_us is made of, by name; empty without a floor.
    """

    op: str
    mode: str
    us: float
    min_us: float
    add_us: float
    min_add_us: float
    floor_us: float | None
    launched: bool
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """To `torch.add`, by the least times: what other processes take away is in neither."""
        return self.min_us / self.min_add_us


def measure(device: torch.device, ops: Sequence[str] = (), repeats: int = 30) -> list[HostTime]:
    """Host times of operations and blocks by name, all without names; repeats: rounds.

    Raises ValueError for an unknown name.
    """
    names = chosen(ops)
    if not _backend.TRITON_INSTALLED:
        raise ValueError("host times are those of launching kernels; triton is not installed")
    with _ready(device):
        return [time for name in names for time in _measure_one(name, device, repeats)]


def chosen(ops: Sequence[str]) -> Sequence[str]:
    """These operations and blocks, all without names. Raises ValueError for an unknown one."""
    known = (*OPS, *BLOCKS)
    if unknown := [name for name in ops if name not in known]:
        raise ValueError(f"--op must be among {', '.join(known)}; got {unknown[0]!r}")
    return ops or known


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
    forward, leaves, inputs = _problem(name, device)
    calls = {mode: call_in_mode(forward, leaves, mode) for mode in MODES}
    calls["fwd"] = forward  # under one no_grad for all calls, which costs as much as torch.add
    step = call_in_mode(forward, leaves, "step")
    with _Captured() as captured:
        step()
    launchers: dict[str, Callable[[], Any]] = {}
    function = operations()[name].function if name in OPS else ""
    names = [operation.overloadpacket.__name__ for operation, _, _ in captured.calls]
    single = names == [f"{function}_fwd", f"{function}_bwd"]
    if single:
        calls["choice"] = partial(_backend.resolve, function, None, device, **inputs)
        calls |= {f"floor {mode}": call for mode, call in _floors(captured, leaves).items()}
        for way, called, (operation, args, _) in zip(
            ("fwd", "bwd"), names, captured.calls, strict=True
        ):
            calls[f"operation {way}"] = partial(operation, *args)
            launchers[f"launcher {way}"] = partial(LAUNCHERS[called], *args)
    small = torch.ones(8, device=device)
    calls["add"] = partial(torch.add, small, small)
    times = _timed(calls | launchers, device, repeats)
    least = {call: min(t) for call, t in times.items()}
    if device.type == "cuda":
        with launching(lambda _: _nothing):
            arguments = _timed(launchers, device, repeats)
        least |= {f"{call} alone": min(t) for call, t in arguments.items()}
    middle = {call: statistics.median(times[call]) for call in (*MODES, "add")}
    return [
        HostTime(
            name, mode, middle[mode], least[mode], middle["add"], least["add"],
            least.get(f"floor {mode}"), device.type == "cuda",
            _parts(least, mode) if single else {},
        )
        for mode in MODES
    ]  # fmt: skip


def _parts(us: Mapping[str, float], mode: str) -> dict[str, float]:
    way = "bwd" if mode == "bwd" else "fwd"
    operation, launcher = us[f"operation {way}"], us[f"launcher {way}"]
    if mode == "bwd":
        parts = {"engine and node": us["bwd"] - operation}
    else:
        parts = {"checks": us["fwd"] - us["choice"] - operation, "choice": us["choice"]}
        parts["graph"] = us[mode] - us["fwd"]
    alone = us.get(f"launcher {way} alone", launcher)
    parts |= {"dispatcher": operation - launcher, "arguments": alone, "launches": launcher - alone}
    return {name: us for name, us in parts.items() if us}


def _timed(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Microseconds per call in every round; one round makes each call CALLS times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-2, repeats):  # two rounds to warm up
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # A backward calls its operation without gradients, as PyTorch does.
            with torch.set_grad_enabled(name.removeprefix("floor ") in ("fwd_train", "bwd")):
                begin = perf_counter()
                for _ in range(CALLS):
                    call()
                seconds = perf_counter() - begin
            if i >= 0:
                times[name].append(1e6 * seconds / CALLS)
    return times


def _problem(
    name: str, device: torch.device
) -> tuple[Callable[[], Outputs], list[Tensor], Mapping[str, Any]]:
    """A forward computation, the leaves of its graph, and the arguments of an operation."""
    if name not in BLOCKS:
        problem = operations()[name].build(SHAPE, DTYPE, device, 0)
        return problem.calls["triton"], list(problem.leaves.values()), problem.inputs
    model = EQUISeg.from_name("b0", num_classes=25, drop_path=0.0).to(device, DTYPE).train()
    size = (SHAPE.modalities, SHAPE.batch, SHAPE.tokens, SHAPE.channels)
    if name == BLOCKS[0]:
        block, shapes = model.fusion[0], (size, size)
    else:
        block, shapes = model.encoder.block1[0], ((SHAPE.rows, *size[2:]),)
    inputs = [torch.randn(s).to(device, DTYPE).requires_grad_() for s in shapes]
    leaves = [*inputs, *block.parameters()]
    return lambda: (block(*inputs, SHAPE.h, SHAPE.w),), leaves, {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = ", ".join((*OPS, *BLOCKS))
    parser.add_argument("--op", type=names, default=(), metavar="A,B", help=f"only: {choices}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--repeats", type=int, default=30, help="rounds; default: 30")
    parser.add_argument(
        "--out", type=to_path, metavar="FILE", help="the times as JSON, over what is there"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be called")


def main(args: argparse.Namespace, console: Console) -> int:
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1; got {args.repeats}")
    device = choose_device(args.device, needed=not args.dry_run)
    if args.dry_run:
        for name in chosen(args.op):
            console.print(f"{name}: {', '.join(MODES)}")
        console.print("nothing was run")
        return 0
    if args.out:
        outputs.writable_file(args.out)
    times = measure(device, args.op, args.repeats)
    table = FittedTable(COLUMNS, words=COLUMNS[:2], title=title(times))
    for time in times:
        table.add_row(*cells(time))
    console.print(table)
    for mode in MODES:
        ratios = [time.ratio for time in times if time.mode == mode and time.op in OPS]
        if ratios:
            middle = statistics.median(ratios)
            shown = f"{min(ratios):.0f} to {max(ratios):.0f}, median {middle:.0f}"
            console.print(f"{mode}: {shown} times torch.add")
    if args.out:
        rows = [{**asdict(time), "ratio": time.ratio} for time in times]
        content = {"schema": SCHEMA, "env": environment(device), "times": rows}
        outputs.write(args.out, json.dumps(content, indent=1) + "\n")
    return 0


def read(path: Path) -> list[HostTime]:
    """The times of a file that `--out` has written."""
    known = {field.name for field in fields(HostTime)}
    rows = outputs.read_json(path)["times"]
    return [HostTime(**{k: v for k, v in row.items() if k in known}) for row in rows]


COLUMNS = ("call", "made of, us", "median us", "least us", "x torch.add", "floor us")


def title(times: Sequence[HostTime]) -> str:
    kind = "with" if times and times[0].launched else "without"
    return f"Host time of a call, {kind} Triton's launcher"


def cells(time: HostTime) -> tuple[str, ...]:
    """What `COLUMNS` say of it; all but the median are or come from the least times."""
    floor = "" if time.floor_us is None else f"{time.floor_us:.0f}"
    parts = ", ".join(f"{name} {us:.0f}" for name, us in time.parts.items())
    numbers = (f"{x:.0f}" for x in (time.us, time.min_us, time.ratio))
    return (f"{time.op} {time.mode}", parts, *numbers, floor)


# ---- what is called, and what the calls would cost at least --------------------------------------


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


def floor_operation(operation: Any, results: Sequence[Tensor]) -> Any:
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
        partial(floor_operation(operation, results), *args)
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

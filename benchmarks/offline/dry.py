"""Drive everything on a GPU that is not there: what it compiles, what that costs, what would fail.

    python -m benchmarks dry --what visit --cache build/triton-cache --processes 16

The programs run on meta tensors, with the real launchers and Triton's own binder; then every
binary that they asked for is compiled once, down to machine code. The exit status is 1 if something
does not compile, spills, does not fit, has a grid over the limits, or takes a tensor of the CPU.

`--cache` keeps what is compiled, to be found under TRITON_CACHE_DIR by the same Triton of the same
Python, on this machine or on one with a GPU, in any folder.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product, repeat
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.command import outputs
from benchmarks.command.options import names, to_path
from benchmarks.measure import launches
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.measure.resume import said
from benchmarks.offline import exercise, resources
from benchmarks.offline.resources import Resources
from equiseg_fast import ops
from equiseg_fast.ops._registry import LAUNCHERS

GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


@dataclass
class Binary:
    """One specialisation of a kernel: what Triton compiles, as plain data. unaligned: pointers and
    integers that are no multiples of 16, where Triton asks."""

    module: str
    function: str
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    unaligned: tuple[str, ...]

    @property
    def kernel(self) -> str:
        return self.function.strip("_").removesuffix("_kernel")

    @property
    def label(self) -> str:
        kinds = dict(self.signature)
        parameters = list(kinds)
        kinds |= {parameters[path[0]]: str(value) for path, value in self.constexprs.items()}
        words = [self.kernel, *(f"{name}={kind}" for name, kind in kinds.items())]
        words += [f"{name} unaligned" for name in self.unaligned]
        return " ".join([*words, f"w{self.options['num_warps']}"])


@dataclass
class Bound:
    """What one program asks for: binaries by their `repr`, and in words what would not work."""

    launches: int = 0
    binaries: dict[str, Binary] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def _pointer(x: torch.Tensor) -> SimpleNamespace:
    """A tensor as Triton sees it: a type and an address, which those on "meta" do not have."""
    address = 2**40 + x.storage_offset() * x.element_size()
    return SimpleNamespace(dtype=x.dtype, data_ptr=lambda: address)


@contextmanager
def dry_device(arch: int = 90, num_sms: int = 132) -> Iterator[Bound]:
    """Inside, kernels are bound and specialised for a GPU that is not there, and neither compiled
    nor launched. Only in a process that does not interpret."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from equiseg_fast.kernels import _common

    bound = Bound()

    def run(self: Any, *args: Any, grid: Any, **options: Any) -> None:
        name = self.fn.__name__
        bound.launches += 1
        if not all(0 < n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=False)):
            bound.errors.append(f"{name}: the grid {grid} is outside 1 to {GRID_LIMITS}")
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args):
            bound.errors.append(f"{name}: an argument is a tensor on the CPU")
        pointers = (_pointer(x) if isinstance(x, torch.Tensor) else x for x in args)
        try:
            run_(self, *pointers, grid=grid, **options | {"warmup": True})
        except Exception as error:
            bound.errors.append(f"{name}: {said(error)}")

    def do_compile(self: Any, key: str, signature: Any, *given: Any) -> None:
        _, constexprs, options, attrs, _ = given
        aligned = {self.params[path[0]].name for path, facts in attrs.items() if facts}
        aligned |= {p.name for p in self.params if p.do_not_specialize}
        binary = Binary(
            self.fn.__module__, self.fn.__name__, dict(signature), constexprs, attrs,
            dict(options.__dict__),
            tuple(n for n, kind in signature.items() if kind[0] in "*iu" and n not in aligned),
        )  # fmt: skip
        bound.binaries[repr(binary)] = binary

    run_ = JITFunction.run
    active = SimpleNamespace(
        # An index of its own: nobody finds these kernels in the caches of another device.
        get_current_device=lambda: -arch,
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    with (
        patch.object(driver, "_active", active),
        patch.object(JITFunction, "run", run),
        patch.object(JITFunction, "_do_compile", do_compile),
        launches.launching(_common.launch, (arch, num_sms)),
    ):
        yield bound


class LookInside(TorchDispatchMode):
    """Our registered operations run their launchers, whatever the device of the tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "equiseg_fast":
            func = LAUNCHERS[func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


def bind(what: str, label: str, arch: int = 90, num_sms: int = 132) -> Bound:
    """What a case launches. In a child of `resources.children`."""
    case = cases(what)[label]
    dtype = DTYPES[case.dtype]
    autocast = None if case.op.scope == "operation" else dtype
    with dry_device(arch, num_sms) as bound:
        try:
            with launches.on_meta(autocast), launches.as_on_gpu("auto"), LookInside():
                for mode in case.modes:
                    graph = mode in ("bwd", "step")
                    with torch.set_grad_enabled(mode != "fwd"):
                        launches.run_case(case.op, case.shape, dtype, "triton", graph)
        except Exception as error:
            bound.errors.append(said(error))
    return bound


def _model() -> Iterator[Case]:
    training, usual = operations()["training"], Shape("b0", 0, 512, 512, 1, 4)
    yield Case(training, usual, "bf16", ("step",), ())
    yield Case(operations()["model"], usual, "bf16", ("fwd",), ())
    for height, width, batch, modalities in (
        (512, 512, 2, 4), (512, 512, 8, 4), (1024, 1024, 1, 4), (480, 640, 3, 4),
        (1080, 1920, 1, 4), (65, 33, 1, 4), (512, 512, 1, 3), (512, 512, 1, 2), (512, 512, 1, 1),
    ):  # fmt: skip
        other = Shape("b0", 0, height, width, batch, modalities)
        yield Case(training, other, "bf16", ("step",), ())
    for dtype in ("fp16", "fp32"):
        yield Case(training, usual, dtype, ("step",), ())


def _visit() -> Iterator[Case]:
    yield from cases("core").values()
    for name, modes in (("training", ("step",)), ("model", ("fwd",))):
        yield Case(operations()[name], Shape("b2", 0, 1024, 1024, 1, 4), "bf16", modes, ())
    for op in (op for op in operations().values() if op.function):
        for dtype, shape in product(("fp32", "bf16"), exercise.SHAPES):
            yield Case(op, shape, dtype, ("fwd", "step"), ())


MAPS = (Shape("b0", 4, 32, 32, 1, 8), Shape("b0", 4, 544, 288, 2, 3), Shape("b0", 4, 96, 96, 2, 2))
"""Of 1 x 1, 17 x 9 and 3 x 3 tokens."""
WIDTHS = (
    (1, 1, torch.int64), (33, 150, torch.int32), (48, 256, torch.uint8), (64, 25, torch.int64),
    (127, 19, torch.int32), (128, 150, torch.uint8),
)  # fmt: skip
"""Channels or head dimensions, classes, and what labels are stored as."""


def _awkward() -> Iterator[Case]:
    for op in (op for op in operations().values() if op.function):
        for shape, widths, how in product(MAPS, WIDTHS, ("", " x[1:]", " far apart")):
            if not op.refuses(shape):
                name = f"{op.name} C{widths[0]}{how}"
                awkward = replace(op, name=name, build=partial(_awkward_problem, op, widths, how))
                yield from (Case(awkward, shape, dtype, ("step",), ()) for dtype in DTYPES)


def _awkward_problem(
    op: Op, widths: tuple[int, int, torch.dtype], how: str, shape: Shape, *like: Any
) -> Problem:
    """That of an operation, but for so many channels and classes; "x[1:]": no address is a multiple
    of 16; "far apart": the first dimension of the first input has a stride over 2^31."""
    width, classes, labels = widths
    # Channels, hidden channels, head dimension and classes of the cases at stage 4 of B0.
    sizes = {shape.channels: width, 4 * shape.channels: width, 32: width, 25: classes}
    inputs = dict(op.build(shape, *like).inputs)
    first = next(iter(inputs))
    for name, x in inputs.items():
        if isinstance(x, int):
            inputs[name] = sizes.get(x, x)
            continue
        size = torch.Size(sizes.get(n, n) for n in x.shape)
        dtype = x.dtype if x.is_floating_point() else labels
        offset = 1 if how == " x[1:]" and x.is_floating_point() else 0
        inputs[name] = x = torch.empty(offset + size.numel(), dtype=dtype)[offset:].view(size)
        if how == " far apart" and name == first:
            inputs[name] = torch.empty_strided(size, (2**31 + 16, *x.stride()[1:]), dtype=dtype)
    function = getattr(ops, op.name)
    if shape.modalities == 3 and "present" in inspect.signature(function).parameters:
        inputs["present"] = torch.ones(3, shape.batch, dtype=torch.bool)
    return op_problem(inputs, {"triton": partial(function, backend="triton")}, function)


WHAT = {
    "model": (_model, "a training step of EQUISeg-B0, and what differs in one respect"),
    "core": (lambda: plan(Options(suite="core", device="cuda")), "the suite core"),
    "awkward": (_awkward, "odd, unaligned and far apart inputs of every operation"),
    "visit": (_visit, "what `visit` runs"),
}


@cache
def cases(what: str) -> dict[str, Case]:
    """The cases of a key of `WHAT`, by label, whose first word is the operation."""
    return {case.label: case for case in WHAT[what][0]()}


def compile_binary(binary: Binary, arch: int = 90) -> Resources:
    """In a child of `resources.children`: as a first launch would, but for the launch."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(binary.module), binary.function)
    source = ASTSource(kernel, binary.signature, binary.constexprs, binary.attrs)
    return resources.compile_source(source, binary.options, Resources(arch, binary.label))[0]


@contextmanager
def compilers(processes: int, cache: Path) -> Iterator[Executor]:
    """Processes that compile into a cache, which may have lain somewhere else: Triton lists the
    files of a binary by absolute paths, and compiles again what it does not find there."""
    cache = cache.absolute()
    for path in cache.glob("*/__grp__*.json"):
        listed = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in listed}
        path.write_text(json.dumps({"child_paths": here}))
    with resources.children(processes, cache, TRITON_STORE_BINARY_ONLY="1") as pool:
        yield pool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "; ".join(f"{name}: {text}" for name, (_, text) in WHAT.items())
    parser.add_argument("--what", type=names, default=("model", "core"), metavar="A,B", help=known)
    archs = resources.known_archs()
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=[90])
    parser.add_argument("--num-sms", type=int, default=132, help="of the GPU; default: 132")
    parser.add_argument("--op", type=names, default=(), metavar="A,B", help="only these")
    parser.add_argument("--count", action="store_true", help="do not compile")
    parser.add_argument("--cache", type=to_path, help="a folder that keeps what is compiled")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dry-run", action="store_true", help="only list what would be driven")


def main(args: argparse.Namespace, console: Console) -> int:
    """1 if anything would fail or spills."""
    if unknown := [w for w in args.what if w not in WHAT]:
        raise ValueError(f"--what must be among {', '.join(WHAT)}; got {unknown[0]!r}")
    known = [(what, label) for what in args.what for label in cases(what)]
    wanted = [key for key in known if not args.op or key[1].split()[0] in args.op]
    if not wanted:
        raise ValueError(f"--op must be of {', '.join(args.what)}; got {', '.join(args.op)}")
    if args.dry_run:
        for what, name in wanted:
            console.print(f"{what}: {name}", markup=False)
        console.print("nothing was driven")
        return 0
    if args.cache:
        outputs.writable(args.cache, option="--cache")
        args.kept = f"what was compiled is in {args.cache}; the same command goes on"
    problems = 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        compilers(args.processes, args.cache or Path(temporary)) as pool,
    ):
        for arch in args.arch:
            start, errors = perf_counter(), []
            binaries: dict[str, Binary] = {}
            found = pool.map(bind, *zip(*wanted, strict=True), repeat(arch), repeat(args.num_sms))
            for (what, label), bound in zip(wanted, found, strict=True):
                new = bound.binaries.keys() - binaries.keys()
                binaries |= bound.binaries
                errors += [f"{label}: {error}" for error in dict.fromkeys(bound.errors)]
                counts = f"{bound.launches} launches, {len(bound.binaries)} binaries"
                kernels = ", ".join(sorted({binaries[key].kernel for key in new}))
                text = f"{what}: {label}: {counts}, {len(new)} of them new: {kernels}"
                console.print(text.removesuffix(": "), markup=False, soft_wrap=True)
            if not args.count:
                costs = pool.map(compile_binary, binaries.values(), repeat(arch))
                for r in track(costs, f"sm_{arch}: compiling", len(binaries), console=console):
                    errors += [f"{r.label}: {problem}" for problem in r.problems()]
            for error in errors:
                console.print(f"sm_{arch}: {error}", markup=False, soft_wrap=True)
            console.print(
                f"sm_{arch}: {len(wanted)} cases, {len(binaries)} binaries, "
                f"{len(errors)} problems; {perf_counter() - start:.1f} s"
            )
            problems += len(errors)
    return 1 if problems else 0

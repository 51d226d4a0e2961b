"""Drive everything on a GPU that is not there: what it compiles, what that costs, what would fail.

    python -m benchmarks dry --what model --arch 90
    python -m benchmarks dry --what visit --cache build/triton-cache --processes 16

The programs run on meta tensors, with the real launchers and Triton's own binder; then every
binary that they asked for is compiled once, down to machine code, in as many processes as wanted.
`--count` leaves that out and takes seconds. The exit status is 1 if something does not compile,
spills, has a grid over the limits, or would be refused by Triton's launcher.

`--cache` keeps what is compiled, to be found under TRITON_CACHE_DIR by the same Triton of the same
Python, on this machine or on one with a GPU: the key of a binary is made of Triton's own files
(libtriton.so is built per Python), the version of ptxas, the source of the kernel and of what it
calls with its line numbers, types, constants and alignment of the arguments, options and target;
not of the machine or the folder. Only what is launched is kept: the cubin and its metadata.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.command import outputs
from benchmarks.command.options import names, to_path
from benchmarks.command.table import FittedTable
from benchmarks.measure.resume import said
from benchmarks.offline import resources
from benchmarks.offline.dry_device import Binary, DryDevice, active_driver, dry_device, finish
from benchmarks.offline.dry_programs import WHAT, Model, programs
from equiseg_fast.models.config import VARIANTS


@dataclass(frozen=True)
class Order:
    """What to drive on which device; picklable.

    what: keys of `WHAT`. base: what its "model" starts from. only: names of operations, and names:
    of programs; empty for all.
    """

    what: tuple[str, ...]
    arch: int = 90
    num_sms: int = 132
    base: Model = field(default_factory=Model)
    only: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def programs(self) -> dict[tuple[str, str], Callable[[], None]]:
        """By part and name."""
        return {
            (what, name): program
            for what in self.what
            for name, program in programs(what, self.base, self.only).items()
            if not self.names or name in self.names
        }


@dataclass
class Traced:
    """What one program asks for."""

    what: str
    name: str
    binaries: list[Binary]
    launches: int
    errors: list[str]


@dataclass
class Survey:
    """What an order came to on one architecture. binaries: each once, by key; `errors` in words."""

    order: Order
    programs: list[Traced] = field(default_factory=list)
    binaries: dict[str, Binary] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def hits(self) -> int:
        return sum(b.hit for b in self.binaries.values())


def survey(
    order: Order, cache: Path | None = None, processes: int = 1, *, compiling: bool = True,
    console: Console | None = None,
) -> Survey:  # fmt: skip
    """Drive the programs of `order` in `processes` children, then compile each binary once.
    console: shows how far it is."""
    found = Survey(order)

    def results(jobs: Sequence[Any], doing: str) -> Iterator[Any]:
        ended = concurrent.futures.as_completed(jobs)
        how = {"console": console, "disable": console is None, "transient": True}
        for job in track(ended, f"sm_{order.arch}: {doing}", len(jobs), **how):
            yield job.result()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cache or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        adopt(folder)
        with resources.children(processes, str(folder)) as pool:
            wanted = list(order.programs())
            # Networks come last and take longest, so they start first.
            jobs = [pool.submit(trace, order, key) for key in reversed(wanted)]
            traced = {(one.what, one.name): one for one in results(jobs, "binding")}
            found.programs = [traced[key] for key in wanted]
            for program in found.programs:
                found.binaries |= {b.key: b for b in program.binaries}
                found.errors += [f"{program.name}: {error}" for error in program.errors]
            if compiling:
                # Those with the largest tiles take longest, so they start first.
                todo = sorted(found.binaries.values(), key=_tile, reverse=True)
                jobs = [pool.submit(compile_binary, b, order, str(folder)) for b in todo]
                for binary, error in results(jobs, "compiling"):
                    found.binaries[binary.key] = binary
                    found.errors += [f"{binary.kernel} {binary.case}: {error}"] if error else []
        adopt(folder)
    return found


def _tile(binary: Binary) -> int:
    return prod(value for name, value in binary.constants.items() if name.startswith("BLOCK"))


@functools.cache
def _programs(order: Order) -> dict[tuple[str, str], Callable[[], None]]:
    return order.programs()


def trace(order: Order, key: tuple[str, str]) -> Traced:
    """Bind and specialise what one program launches. In a child of `resources.children`."""
    with dry_device(order.arch, order.num_sms, compiling=False) as device:
        try:
            _programs(order)[key]()
        except Exception as error:
            device.error(said(error))
    return Traced(*key, device.binaries, device.launches.total(), device.errors)


def compile_binary(binary: Binary, order: Order, cache: str) -> tuple[Binary, str]:
    """The binary with its costs, and why it does not compile or fit, empty if it does.

    In a child of `resources.children`: as a first launch would, but for the launch.
    """
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(binary.module), binary.function)
    source = ASTSource(kernel, binary.signature, binary.constexprs, binary.attrs)
    with active_driver(DryDevice(order.arch, order.num_sms), cache) as active:
        target = active.get_current_target()
        try:
            finish(
                binary, active,
                lambda: triton.compile(source, target=target, options=binary.options),
            )  # fmt: skip
            _build_launcher(source)
        except Exception as error:
            return binary, said(error)
    return binary, f"spills {binary.spills} bytes" if binary.spills else ""


def adopt(cache: Path) -> None:
    """Make a cache that lay somewhere else usable: Triton lists the files of a binary by absolute
    paths, and compiles again what it does not find there. Drops the source, which nobody reads."""
    for path in cache.glob("*/__grp__*.json"):
        listed = json.loads(path.read_text())["child_paths"]
        here = {n: str(path.parent / n) for n in listed if not n.endswith(".source")}
        if here != listed:
            path.write_text(json.dumps({"child_paths": here}))
            for name in listed.keys() - here.keys():
                (path.parent / name).unlink(missing_ok=True)


def _build_launcher(source: Any) -> None:
    """The C launcher of a signature into Triton's cache.

    Triton 3.6 compiles one for every signature, on the first launch, which takes a third of a
    second; later ones have one for all.
    """
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        launcher = driver.make_launcher(source.constants, source.signature, None)
        _build_module("__triton_launcher", launcher)
        _build_module("cuda_utils", (Path(driver.dirname) / "driver.c").read_text())


def _build_module(name: str, text: str) -> None:
    """As Triton's `compile_module_from_src`, but not loaded: there may be no libcuda."""
    from triton.backends.nvidia import driver
    from triton.runtime import build
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256((text + build.platform_key()).encode()).hexdigest())
    file = name + sysconfig.get_config_var("EXT_SUFFIX")
    if cache.get_file(file):
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{name}.c"
        source.write_text(text)
        # A stand-in of the same name to link with; on a GPU machine the loader finds the real one.
        stub = ["gcc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*stub, "-o", f"{folder}/libcuda.so.1"], check=True)
        flags = ["-Wl,--no-as-needed", "-l:libcuda.so.1"]
        built = build._build(name, str(source), folder, [folder], driver.include_dirs, [], flags)
        cache.put(Path(built).read_bytes(), file, binary=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks dry`."""
    parser.add_argument(
        "--what", type=names, default=("model", "core"), metavar="A,B",
        help="; ".join(f"{name}: {text}" for name, text in WHAT.items()) + "; default: model,core",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=resources.architectures, default=(90,), metavar="A,B",
        help=f"of {', '.join(map(str, resources.known_archs()))}; default: 90",
    )  # fmt: skip
    parser.add_argument("--num-sms", type=int, default=132, help="of the GPU; default: 132")
    parser.add_argument("--op", type=names, default=(), metavar="A,B", help="not for model: only")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="b0", help="of the model")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[512], help="height and width of its images"
    )
    parser.add_argument("--modalities", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--count", action="store_true", help="do not compile")
    parser.add_argument(
        "--cache", type=to_path, metavar="FOLDER", help="keep what is compiled here"
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be driven")


def main(args: argparse.Namespace, console: Console) -> int:
    """1 if anything would fail or spills."""
    if unknown := [w for w in args.what if w not in WHAT]:
        raise ValueError(f"--what must be among {', '.join(WHAT)}; got {unknown[0]!r}")
    base = Model(args.variant, args.size[0], args.size[-1], args.modalities, args.batch)
    orders = [Order(args.what, arch, args.num_sms, base, args.op) for arch in args.arch]
    if args.dry_run:
        for what, name in orders[0].programs():
            console.print(f"{what}: {name}", markup=False)
        console.print("nothing was driven")
        return 0
    if args.cache:
        outputs.writable(args.cache, option="--cache")
        args.kept = f"what was compiled is in {args.cache}; the same command goes on"
    wrong = 0
    for order in orders:
        start = perf_counter()
        compiling = not args.count
        found = survey(order, args.cache, args.processes, compiling=compiling, console=console)
        _show(found, console, compiled=compiling, seconds=perf_counter() - start)
        wrong += len(found.errors)
    return 1 if wrong else 0


def _show(found: Survey, console: Console, *, compiled: bool, seconds: float) -> None:
    arch, binaries = found.order.arch, found.binaries.values()
    console.print(_programs_table(found))
    kernels = {b.kernel: [x for x in binaries if x.kernel == b.kernel] for b in binaries}
    if compiled:
        columns = ("binaries", "most registers", "most spilled", "most shared KiB", "seconds")
        table = FittedTable(("kernel", *columns), words=("kernel",), spare=("seconds",))
        for name, own in sorted(kernels.items()):
            numbers = (
                len(own), max(b.registers for b in own), max(b.spills for b in own),
                f"{max(b.shared for b in own) / resources.KIB:.1f}",
                f"{sum(b.seconds for b in own):.1f}",
            )  # fmt: skip
            table.add_row(name, *map(str, numbers))
        console.print(table)
    for error in found.errors:
        console.print(f"sm_{arch}: {error}", markup=False, soft_wrap=True)
    text = (
        f"sm_{arch}: {len(found.programs)} programs, {len(binaries)} binaries of "
        f"{len(kernels)} kernels, {len(found.errors)} problems"
    )
    if compiled:
        spent = sum(b.seconds for b in binaries if not b.hit)
        text += f"; {found.hits} in the cache, {len(binaries) - found.hits} compiled"
        text += f" in {spent:.1f} s of CPU time"
    console.print(f"{text}; {seconds:.1f} s in all")


def _programs_table(found: Survey) -> FittedTable:
    columns = ("part", "program", "launches", "binaries", "new", "of kernels")
    table = FittedTable(columns, words=("part", "program", "of kernels"), spare=("launches",))
    seen: dict[str, set[str]] = {}
    for program in found.programs:
        # A model is compared with the first of its part, the others with all before them.
        known = seen.setdefault(program.what, set())
        new = [b for b in program.binaries if b.key not in known]
        if program.what != "model" or not known:
            known |= {b.key for b in new}
        if program.what != "awkward" or program.errors:
            numbers = map(str, (program.launches, len(program.binaries), len(new)))
            kernels = ", ".join(sorted({b.kernel for b in new}))
            table.add_row(program.what, program.name, *numbers, kernels)
    return table

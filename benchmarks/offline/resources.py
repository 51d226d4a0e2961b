"""Compile every kernel specialisation for several architectures, without a GPU, and read what it
costs.

    python -m benchmarks resources --arch 80,89,90,100,120 --kernel attention --out build/resources

Registers, stack (spilled bytes), shared memory, the tensor-core instruction and, on sm_80 and
sm_90, the machine instructions per score in the hot loop, for everything that a launcher can choose
(`offline_entries` of each kernel file). Writes `resources.json`; what a table of the same Triton in
that folder has of today's code is kept, not compiled again. The exit status is 1 if an entry does
not compile, spills, needs more shared memory than the architecture has, or misses the tensor-core
instruction of the architecture.

Triton either interprets or compiles for the life of a process, so compiling happens in child
processes that never inherit `TRITON_INTERPRET`, with a cache of their own that is deleted at the
end.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FunctionType
from typing import Any

from benchmarks.command import outputs
from benchmarks.command.options import kernel_stems

KIB = 1024
_PTX_NAMES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
_ISSUE_ARCHS = (80, 90)


def known_archs() -> tuple[int, ...]:
    """Of the table in `kernels/_arch.py`."""
    # Not imported at the top: a child imports this module before `_start_child` has cleared its
    # environment, which equiseg_fast reads when it is imported.
    from equiseg_fast.kernels._arch import ARCHITECTURES

    return tuple(row.number for row in ARCHITECTURES)


@dataclass(frozen=True)
class Resources:
    """What one entry costs on one architecture; `error` is empty unless it did not compile.

    `path` is the instruction family of the matrix products and `products` how many of them there
    are in the program text; `slots` the machine instructions per thread and score in the hot loop,
    None where it was not found. `fingerprint` stands for the code and the options: with the same
    Triton the same fingerprint compiles to the same code.
    """

    arch: int
    label: str
    dots: str = "none"
    registers: int = 0
    stack: int = 0
    shared: int = 0
    path: str = "none"
    products: int = 0
    slots: float | None = None
    error: str = ""
    fingerprint: str = ""

    @property
    def kernel(self) -> str:
        return self.label.split()[0]

    def problems(self) -> list[str]:
        """Why this entry must not be shipped; empty if it may."""
        from equiseg_fast.kernels._arch import architecture

        if self.error:
            return [self.error]
        gpu = architecture(self.arch)
        found = []
        if self.stack > 0:
            found.append(f"spills {self.stack} bytes")
        if self.shared > gpu.shared_limit:
            found.append(
                f"needs {self.shared / KIB:.1f} KiB of shared memory, "
                f"sm_{self.arch} has {gpu.shared_limit // KIB}"
            )
        own = {"ieee": "fma", "none": "none", "mma.sync": "mma.sync"}
        expected = own.get(self.dots, gpu.tensor_core)
        if self.path != expected:
            found.append(f"multiplies with {self.path}, expected {expected}")
        return found


def _tool_output(cubin: bytes, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [tool, *options, path], capture_output=True, text=True, check=True
        ).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack) of a kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool_output(cubin, "--dump-resource-usage"))
    if not found:
        raise RuntimeError("cuobjdump says nothing about registers")
    return int(found[1]), int(found[2])


def _tensor_core_path(ptx: str, dots: str) -> tuple[str, int]:
    """The instruction family and its count; mixed families are named together: both would show."""
    counts = {family: len(re.findall(re.escape(name), ptx)) for family, name in _PTX_NAMES.items()}
    used = [family for family, count in counts.items() if count]
    if not used:
        return ("none", 0) if dots == "none" else ("fma", len(re.findall(r"\bfma\.rn\.f32", ptx)))
    return "+".join(used), sum(counts.values())


def slots_per_score(sass: str, scores_per_thread: float) -> float | None:
    """Instructions per score of the shortest loop with at least half an exponential per score (the
    hot loop).

    `sass` is the output of `cuobjdump -sass`. An exponential outside means the loop was split: then
    there is no answer.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\*", sass)
    place = {int(address, 16): i for i, (address, _) in enumerate(code)}
    lengths = []
    for i, (address, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        target = int(branch.group(1), 16) if branch else int(address, 16) + 1
        if target > int(address, 16) or target not in place:
            continue
        body = [text for _, text in code[place[target] : i + 1]]
        if sum("MUFU.EX2" in text for text in body) >= 0.5 * scores_per_thread:
            lengths.append(len(body))
    return min(lengths) / scores_per_thread if lengths else None


def cpu_seconds() -> float:
    """Time of this process and the tools it has called; unlike the clock, fair on a busy host."""
    return sum(os.times()[:4])


_CONSTANTS = (bool, int, float, str, tuple, list)


@functools.cache
def code(kernel: Any) -> tuple[str, ...]:
    """What a JIT function is compiled from: its code, then that of the functions it calls and the
    constants it uses, in the order of their use.

    Not its text: comments, docstrings and line breaks compile to nothing. Nor what comes with
    Triton: a table is of one version.
    """
    found: list[str] = []
    functions = set()

    def look(name: str, value: Any) -> None:
        function = getattr(value, "fn", None)
        if isinstance(function, FunctionType):
            if function in functions or function.__module__.startswith("triton."):
                return
            functions.add(function)
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            if ast.get_docstring(tree.body[0]) is not None:
                del tree.body[0].body[0]
            found.append(ast.unparse(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.Name):
                    look(node.id, function.__globals__.get(node.id))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner = function.__globals__.get(node.value.id)
                    look(ast.unparse(node), getattr(owner, node.attr, None))
        elif isinstance(value, _CONSTANTS) or type(value).__name__ == "constexpr":
            found.append(f"{name} = {value!r}")

    look("", kernel)
    return tuple(found)


def fingerprint(entry: Any) -> str:
    """A hash of all that the machine code of an `OfflineEntry` depends on, but for the version of
    Triton."""
    parts = (
        code(entry.kernel),
        sorted(entry.types.items()),
        sorted(entry.aligned),
        sorted(entry.constexprs.items()),
        entry.num_warps,
        entry.num_stages,
        entry.max_registers,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_entry(entry: Any, arch: int) -> Resources:
    """Compile one `OfflineEntry` for `sm_<arch>` and read its resources.

    Only in a process that does not interpret.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {"arch": arch, "label": entry.label, "dots": entry.dots}
    known["fingerprint"] = fingerprint(entry)
    position = {name: i for i, name in enumerate(entry.types)}
    source = ASTSource(
        entry.kernel,
        entry.types,
        constexprs={(position[name],): value for name, value in entry.constexprs.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in entry.aligned},
    )
    options = {
        "num_warps": entry.num_warps,
        "num_stages": entry.num_stages,
        "enable_fp_fusion": True,
    }
    if entry.max_registers is not None:
        options["maxnreg"] = entry.max_registers
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, stack = usage(compiled.asm["cubin"])
    except Exception as error:
        # The message may quote files of this machine; its type and first line without paths say
        # enough.
        first = re.sub(r"\S*[/\\]\S*", "...", (str(error).strip().splitlines() or [""])[0])
        return Resources(**known, error=f"{type(error).__name__}: {first}"[:300])
    path, products = _tensor_core_path(compiled.asm["ptx"], entry.dots)
    slots = None
    if entry.scores and arch in _ISSUE_ARCHS:
        slots = slots_per_score(
            _tool_output(compiled.asm["cubin"], "-sass"), entry.scores / (32 * entry.num_warps)
        )
    return Resources(
        **known,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        path=path,
        products=products,
        slots=None if slots is None else round(slots, 2),
    )


def _start_child(cache: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who has started this process
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def _entries(stem: str, arch: int) -> dict[str, Any]:
    module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
    return {entry.label: entry for entry in module.offline_entries(arch)}


def _fingerprints(stem: str, arch: int) -> dict[str, str]:
    return {label: fingerprint(entry) for label, entry in _entries(stem, arch).items()}


def _compile_by_label(stem: str, label: str, arch: int) -> Resources:
    return compile_entry(_entries(stem, arch)[label], arch)


@contextmanager
def children(workers: int, cache: str) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that compile, into the folder `cache`, whatever this one does. What waits for one
    when the block is left, interrupted perhaps, is not begun."""
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_child, (cache,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def read(table: str | Path) -> list[Resources]:
    """The entries of a `resources.json`."""
    return [Resources(**entry) for entry in json.loads(Path(table).read_text())["entries"]]


def not_in_table(table: Path) -> list[str]:
    """Entries of today's sources that `table` (a resources.json) does not have as they are, and
    those of the table that no longer exist."""
    known = {(r.arch, r.label, r.fingerprint) for r in read(table)}
    with children(1, "") as pool:
        today = {
            (arch, label, now)
            for stem in kernel_stems()
            for arch in known_archs()
            for label, now in pool.submit(_fingerprints, stem, arch).result().items()
        }
    return [f"sm_{arch} {label}" for arch, label, _ in sorted(known ^ today)]


def entries(archs: Iterable[int], kernel: str) -> list[tuple[int, str]]:
    """(architecture, label) of every entry whose label matches the regular expression."""
    with tempfile.TemporaryDirectory() as cache, children(1, cache) as pool:
        return [
            (arch, label)
            for arch in archs
            for stem in kernel_stems()
            for label in pool.submit(_fingerprints, stem, arch).result()
            if re.search(kernel, label)
        ]


def run(
    archs: Iterable[int] | None = None,
    kernel: str = "",
    out: str | Path | None = None,
    stems: Sequence[str] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> list[Resources]:
    """Compile every entry whose label matches the regular expression `kernel`.

    `archs` are all that are known by default, `stems` (the kernel files) too. Writes tables to the
    folder `out` if there is one, without compiling what they have already.
    """
    known = {} if out is None else _known(Path(out))
    results = []
    with tempfile.TemporaryDirectory() as cache, children(workers, cache) as pool:
        jobs = []
        for arch in archs or known_archs():
            for stem in stems or kernel_stems():
                for label, now in pool.submit(_fingerprints, stem, arch).result().items():
                    if (arch, label, now) in known:
                        results.append(known[arch, label, now])
                    elif re.search(kernel, label):
                        jobs.append(pool.submit(_compile_by_label, stem, label, arch))
        try:
            for job in _with_progress(concurrent.futures.as_completed(jobs), len(jobs), progress):
                results.append(job.result())
        finally:  # an interrupted run has compiled something, too
            results.sort(key=lambda r: (r.arch, r.label))
            if out is not None:
                write(results, Path(out))
    return results


def _known(folder: Path) -> dict[tuple[int, str, str], Resources]:
    """What the tables in `folder` hold, if the installed Triton has written them."""
    table = folder / "resources.json"
    if not table.exists() or json.loads(table.read_text())["triton"] != _triton_version():
        return {}
    return {(r.arch, r.label, r.fingerprint): r for r in read(table) if not r.error}


def _triton_version() -> str:
    return importlib.metadata.version("triton")


def _with_progress(jobs: Iterable[Any], total: int, show: bool) -> Iterable[Any]:
    if not show:
        return jobs
    from rich.progress import track

    return track(jobs, description="compiling", total=total)


def write(results: Sequence[Resources], folder: Path) -> None:
    """`resources.json` in `folder`, which is created if missing: one entry a line, without what has
    its default."""
    lines = ",\n".join(json.dumps(_unusual(r)) for r in results)
    text = f'{{"triton": "{_triton_version()}", "entries": [\n{lines}\n]}}\n'
    outputs.write(folder / "resources.json", text)


def _unusual(r: Resources) -> dict[str, Any]:
    return {f.name: v for f in fields(r) if (v := getattr(r, f.name)) != f.default}


def architectures(text: str) -> tuple[int, ...]:
    """`80,90` as numbers of `known_archs`."""
    wanted = text.split(",")
    if unknown := [a for a in wanted if a not in map(str, known_archs())]:
        raise argparse.ArgumentTypeError(
            f"must be among {', '.join(map(str, known_archs()))}; got {unknown[0]}"
        )
    return tuple(map(int, wanted))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks resources`."""
    parser.add_argument(
        "--arch",
        type=architectures,
        default=known_archs(),
        help=f"architectures, comma separated, of {', '.join(map(str, known_archs()))} (default: "
        "all)",
    )
    parser.add_argument(
        "--kernel", default="", help="only entries whose label matches this regular expression"
    )
    parser.add_argument("--out", default="build/resources", help="folder for resources.json")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be compiled")
    parser.set_defaults(kept="the same command goes on with what is not compiled yet")


def main(args: argparse.Namespace, console: object = None) -> int:
    """Compile, write the tables, print what is wrong; 1 if anything is."""
    if args.dry_run:
        labels = entries(args.arch, args.kernel)
        for arch, label in labels:
            print(f"sm_{arch} {label}")
        print(f"{len(labels)} entries; nothing was compiled")
        return 0
    outputs.writable(Path(args.out))
    results = run(args.arch, args.kernel, args.out)
    if not results:
        raise ValueError(f"--kernel must match an entry, see --dry-run; got {args.kernel!r}")
    bad = [r for r in results if r.problems()]
    for r in bad:
        print(f"sm_{r.arch} {r.label}: {'; '.join(r.problems())}")
    print(f"{len(results)} entries compiled, {len(bad)} with problems")
    return 1 if bad else 0

"""Compile what every launcher can choose (`offline_entries` of each kernel file) without a GPU, and
read what it costs.

    python -m benchmarks resources --arch 80 90 --kernel attention --out build/resources

Writes `resources.json`; what a table of the same Triton in that folder has of today's code is kept,
not compiled again. The exit status is 1 if an entry does not compile, spills, does not fit, or
misses the tensor-core instruction of the architecture.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import hashlib
import importlib
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

from rich.progress import track

from benchmarks.command import outputs
from benchmarks.command.options import kernel_stems
from benchmarks.measure.resume import said

KIB = 1024
TENSOR_MEMORY = 512
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

    `path` is the instruction family of the matrix products; `slots` see `slots_per_score`. With the
    same Triton the same `fingerprint` compiles to the same machine code.
    """

    arch: int
    label: str
    dots: str = "none"
    registers: int = 0
    stack: int = 0
    shared: int = 0
    path: str = "none"
    slots: float | None = None
    error: str = ""
    fingerprint: str = ""

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
            needed, there = self.shared / KIB, gpu.shared_limit // KIB
            found.append(f"needs {needed:.1f} KiB of shared memory, sm_{self.arch} has {there}")
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
        command = [tool, *options, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def slots_per_score(sass: str, scores_per_thread: float) -> float | None:
    """Instructions per score of the hot loop, the shortest with at least half an exponential per
    score, in the output of `cuobjdump -sass`; None if the loop was split."""
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
    return round(min(lengths) / scores_per_thread, 2) if lengths else None


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
    """A hash of all that an `OfflineEntry` compiles to, but for the version of Triton."""
    parts = (
        code(entry.kernel), sorted(entry.types.items()), sorted(entry.aligned),
        sorted(entry.constexprs.items()), entry.num_warps, entry.num_stages, entry.max_registers,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_source(source: Any, options: dict[str, Any], what: Resources) -> tuple[Resources, Any]:
    """`what` with the costs of a Triton source or the reason why it does not compile, and the code
    by its kinds. Only in a process that does not interpret."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        compiled = triton.compile(source, GPUTarget("cuda", what.arch, 32), options)
        said_of_it = _tool_output(compiled.asm["cubin"], "--dump-resource-usage")
        registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", said_of_it)[0])
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        if columns > TENSOR_MEMORY:
            raise RuntimeError(f"needs {columns} columns of tensor memory")
    except Exception as error:
        # The message may quote files of this machine.
        first = re.sub(r"\S*[/\\]\S*", "...", said(error))
        return replace(what, error=first[:300]), {}
    shared = compiled.metadata.shared
    return replace(what, registers=registers, stack=stack, shared=shared), compiled.asm


def compile_entry(stem: str, label: str, arch: int) -> Resources:
    """Compile an entry of a kernel file and read what it costs."""
    from triton.compiler import ASTSource

    entry = _entries(stem, arch)[label]
    position = {name: i for i, name in enumerate(entry.types)}
    source = ASTSource(
        entry.kernel, entry.types,
        constexprs={(position[name],): value for name, value in entry.constexprs.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in entry.aligned},
    )  # fmt: skip
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    options |= {"enable_fp_fusion": True, "maxnreg": entry.max_registers}
    what = Resources(arch, label, entry.dots, fingerprint=fingerprint(entry))
    found, asm = compile_source(source, options, what)
    if found.error:
        return found
    # Mixed families are named together: both would show.
    used = [family for family, name in _PTX_NAMES.items() if name in asm["ptx"]]
    path = "+".join(used) or ("none" if entry.dots == "none" else "fma")
    slots = None
    if entry.scores and arch in _ISSUE_ARCHS:
        sass = _tool_output(asm["cubin"], "-sass")
        slots = slots_per_score(sass, entry.scores / (32 * entry.num_warps))
    return replace(found, path=path, slots=slots)


def _start_child(variables: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who has started this process
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= variables


@contextmanager
def children(
    workers: int, cache: str | Path, **variables: str
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that compile, into the folder `cache`, whatever this one does. What waits for one
    when the block is left, interrupted perhaps, is not begun."""
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_child,
        ({"TRITON_CACHE_DIR": str(cache), **variables},),
    )  # fmt: skip
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _entries(stem: str, arch: int) -> dict[str, Any]:
    module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
    return {entry.label: entry for entry in module.offline_entries(arch)}


def _fingerprints(archs: Iterable[int]) -> list[tuple[str, str, int, str]]:
    return [
        (stem, label, arch, fingerprint(entry))
        for arch in archs
        for stem in kernel_stems()
        for label, entry in _entries(stem, arch).items()
    ]


def read(table: Path) -> dict[tuple[int, str, str], Resources]:
    """The entries of a `resources.json`, by architecture, label and fingerprint."""
    entries = (Resources(**entry) for entry in json.loads(table.read_text())["entries"])
    return {(r.arch, r.label, r.fingerprint): r for r in entries}


def not_in_table(table: Path) -> list[str]:
    """Entries of today's sources that `table` (a resources.json) does not have as they are, and
    those of the table that no longer exist."""
    with children(1, "") as pool:
        today = pool.submit(_fingerprints, known_archs()).result()
    differing = read(table).keys() ^ {(arch, label, now) for _, label, arch, now in today}
    return [f"sm_{arch} {label}" for arch, label, _ in sorted(differing)]


def run(archs: Iterable[int], kernel: str, out: Path | None = None) -> list[Resources]:
    """Compile every entry whose label matches the regular expression `kernel`.

    Writes a table to the folder `out` if there is one, without compiling what that has already.
    """
    known, table = {}, None if out is None else out / "resources.json"
    if table and table.exists() and json.loads(table.read_text())["triton"] == version("triton"):
        known = {key: r for key, r in read(table).items() if not r.error}
    results = []
    with tempfile.TemporaryDirectory() as cache, children(2, cache) as pool:
        jobs = []
        for stem, label, arch, now in pool.submit(_fingerprints, archs).result():
            if (arch, label, now) in known:
                results.append(known[arch, label, now])
            elif re.search(kernel, label):
                jobs.append(pool.submit(compile_entry, stem, label, arch))
        try:
            ended = concurrent.futures.as_completed(jobs)
            for job in track(ended, "compiling", len(jobs)):
                results.append(job.result())
        finally:  # an interrupted run has compiled something, too
            results.sort(key=lambda r: (r.arch, r.label))
            if table:
                write(results, table)
    return results


def write(results: Sequence[Resources], table: Path) -> None:
    """A `resources.json`: one entry a line, without what has its default."""
    default = asdict(Resources(0, ""))
    unusual = ({k: v for k, v in asdict(r).items() if v != default[k]} for r in results)
    lines = ",\n".join(map(json.dumps, unusual))
    outputs.write(table, f'{{"triton": "{version("triton")}", "entries": [\n{lines}\n]}}\n')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    archs = known_archs()
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs)
    parser.add_argument("--kernel", default="", help="only labels with this regular expression")
    parser.add_argument("--out", type=Path, default=Path("build/resources"), help="a folder")
    parser.set_defaults(kept="the same command goes on with what is not compiled yet")


def main(args: argparse.Namespace, console: object = None) -> int:
    """Compile, write the table, print what is wrong; 1 if anything is."""
    results = run(args.arch, args.kernel, outputs.writable(args.out))
    if not results:
        raise ValueError(f"--kernel must match an entry; got {args.kernel!r}")
    bad = [r for r in results if r.problems()]
    for r in bad:
        print(f"sm_{r.arch} {r.label}: {'; '.join(r.problems())}")
    print(f"{len(results)} entries compiled, {len(bad)} with problems")
    return 1 if bad else 0

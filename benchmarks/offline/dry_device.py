"""A GPU that is not there: kernels are bound, specialised and compiled as on a real one, and never
launched.

    with dry_device(arch=90) as device, on_meta():
        attention(q, k, v)  # tensors on "meta"
    device.binaries, device.launches, device.errors

Real: the launchers, Triton's argument binder, its specialisation (1, multiples of 16, 32 or 64
bits), the compiler down to the cubin, the limits of shared memory, tensor memory and threads.
Recorded instead: loading the cubin (its registers and stack are read from the file) and launching.
Only in a process that does not interpret.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command.options import kernel_stems
from benchmarks.measure import launches
from benchmarks.measure.resume import said
from benchmarks.offline import resources
from equiseg_fast.ops import _backend
from equiseg_fast.ops._registry import LAUNCHERS

GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
REGISTER_FILE = 65536
_INDICES = itertools.count(-1000, -1)


@dataclass
class Binary:
    """One specialisation: what Triton compiles, as plain data, and what came of it.

    Once it is compiled: `registers` per thread, `spills` and `shared` in bytes, `seconds` of CPU
    time that compiling took, and `hit`, whether it was in the cache.
    """

    module: str
    function: str
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    frozen: frozenset[str]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    seconds: float = 0.0
    hit: bool = False

    @property
    def key(self) -> str:
        """Equal for equal binaries of one architecture."""
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return " ".join([self.module, self.function, *map(repr, parts)])

    @property
    def kernel(self) -> str:
        return self.function.strip("_").removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        """By the names of the parameters."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items()}

    @property
    def unaligned(self) -> list[str]:
        """Pointers and integers that are no multiples of 16, where Triton asks."""
        names = list(self.signature)
        known = {names[path[0]] for path, facts in self.attrs.items() if facts} | self.frozen
        return [n for n, kind in self.signature.items() if kind[0] in "*iu" and n not in known]

    @property
    def case(self) -> str:
        """What tells it from the other binaries of its kernel, for people."""
        pointers = Counter(kind for kind in self.signature.values() if kind.startswith("*"))
        words = [f"{kind}x{n}" for kind, n in sorted(pointers.items())]
        words += [f"{name}={value}" for name, value in self.constants.items() if name.isupper()]
        for label, found in (
            ("constant", [n for n in self.constants if not n.isupper()]),
            ("i64", [n for n, kind in self.signature.items() if kind == "i64"]),
            ("unaligned", self.unaligned),
        ):
            words += [f"{label}:{','.join(found)}"] if found else []
        return " ".join([*words, f"w{self.options['num_warps']}"])


@dataclass
class DryDevice:
    """What a device was given: binaries in the order of their first launch, launches by their keys,
    and in words what would not have worked."""

    arch: int
    num_sms: int
    binaries: list[Binary] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def error(self, text: str) -> None:
        if text not in self.errors:
            self.errors.append(text)


class Pointer:
    """A tensor as Triton sees it: a type and an address, which a meta tensor does not have."""

    BASE = 1 << 40

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype, self.device = x.dtype, x.device
        self.address = self.BASE + x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self.address


def refusal(kind: str, value: Any) -> str:
    """Why Triton's C launcher would refuse a value for a parameter of this type; empty if not."""
    if kind == "constexpr":
        return ""
    if kind.startswith("*"):
        if not hasattr(value, "data_ptr"):
            return f"{value!r} is no tensor"
        return "the tensor is on the CPU" if value.device.type == "cpu" else ""
    if kind.lstrip("b").startswith("f"):
        return "" if isinstance(value, int | float) else f"{value!r} is no number"
    if not isinstance(value, int):
        return f"{value!r} is no integer"
    bits = int(kind[1:])
    signed = kind[0] == "i" and bits > 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return "" if low <= value < high else f"{value} has more than {bits} bits"


class _Kernel:
    """What `JITFunction.run` launches."""

    function = packed_metadata = None

    def __init__(self, device: DryDevice, binary: Binary) -> None:
        self.device, self.binary, self.key = device, binary, binary.key

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        """rest: stream, function, two kinds of metadata, two hooks, the arguments of the kernel."""
        device, name = self.device, self.binary.kernel
        device.launches[self.key] += 1
        if not all(0 < n <= limit for n, limit in zip((x, y, z), GRID_LIMITS, strict=True)):
            device.error(f"{name}: the grid {(x, y, z)} is outside 1 to {GRID_LIMITS}")
        for (parameter, kind), value in zip(self.binary.signature.items(), rest[6:], strict=True):
            if why := refusal(kind, value):
                device.error(f"{name}: {parameter} is {kind}, but {why}")


class _Driver:
    """What `triton.runtime.driver.active` has to be."""

    def __init__(self, device: DryDevice) -> None:
        self.device = device
        # An index of its own: nobody finds these kernels in the caches of another device.
        self.index = next(_INDICES)
        self.utils = self
        self.usage = (0, 0)
        self.launcher_cls: Callable[..., object] = lambda src, metadata: object()

    def get_device_properties(self, index: int) -> dict[str, int]:
        shared = resources.SHARED_LIMIT[self.device.arch]
        return {"max_shared_mem": shared, "multiprocessor_count": self.device.num_sms}

    def load_binary(self, name: str, cubin: bytes, shared: int, index: int) -> tuple[int, ...]:
        """(module, function, registers, spills, most threads), as the driver would say."""
        self.usage = registers, stack = resources.usage(cubin)
        threads = REGISTER_FILE // (-(-registers // 8) * 8) // 32 * 32
        return 1, 1, registers, stack // 4, min(1024, threads)

    def unload_module(self, module: int) -> None:
        pass

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.device.arch, 32)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, index: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def active_driver(device: DryDevice, cache: str | Path | None) -> Iterator[_Driver]:
    """Triton compiles for `device`, into the folder `cache` (None: one that is deleted at the end),
    and keeps of a binary what is needed to launch it."""
    from triton.runtime import driver

    active, before = _Driver(device), driver._active
    with contextlib.ExitStack() as stack:
        folder = cache or stack.enter_context(tempfile.TemporaryDirectory())
        kept = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
        stack.enter_context(patch.dict(os.environ, kept))
        driver.set_active(active)
        try:
            yield active
        finally:
            driver._active = before


def finish(binary: Binary, active: _Driver, compile_: Callable[[], Any]) -> None:
    """Compile, note what it costs, and check it against the limits of the device."""
    import triton

    hits = []
    listener = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
    start = resources.cpu_seconds()
    try:
        compiled = compile_()
        binary.seconds, binary.hit = resources.cpu_seconds() - start, all(hits)
        binary.shared = compiled.metadata.shared
        compiled._init_handles()
        binary.registers, binary.spills = active.usage
    finally:
        triton.knobs.compilation.listener = listener


@contextlib.contextmanager
def dry_device(
    arch: int = 90, num_sms: int = 132, cache: str | Path | None = None, compiling: bool = True
) -> Iterator[DryDevice]:
    """Inside, kernels are compiled for a device that is not there and their launches recorded.

    arch: one of `resources.ARCHS`. cache: a folder for Triton's cache, to be kept; None for a new
    one. compiling: False only finds the binaries, which takes microseconds each. What would fail on
    a GPU is an entry of `errors`. Raises RuntimeError where Triton interprets.
    """
    if _backend.INTERPRET:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET")
    if arch not in resources.SHARED_LIMIT:
        raise ValueError(f"arch must be among {resources.ARCHS}; got {arch}")
    from triton.runtime.jit import JITFunction

    device = DryDevice(arch, num_sms)
    seen: set[Any] = set()

    def do_compile(
        self: Any, key: str, signature: Any, index: int, constexprs: Any, options: Any, attrs: Any,
        warmup: bool,
    ) -> _Kernel:  # fmt: skip
        seen.add(self)
        binary = Binary(
            self.fn.__module__, self.fn.__name__, dict(signature), constexprs, attrs,
            dict(options.__dict__), frozenset(p.name for p in self.params if p.do_not_specialize),
        )  # fmt: skip
        kernel = _Kernel(device, binary)
        device.binaries.append(binary)
        if compiling:
            finish(binary, active, lambda: compile_(
                self, key, signature, index, constexprs, options, attrs, warmup
            ))  # fmt: skip
        self.device_caches[index][0][key] = kernel
        return kernel

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        pointers = (Pointer(a) if isinstance(a, torch.Tensor) else a for a in args)
        try:
            return run_(self, *pointers, grid=grid, warmup=warmup, **kwargs)
        except Exception as error:
            device.error(f"{self.fn.__name__}: {said(error)}")
            return None

    run_, compile_ = JITFunction.run, JITFunction._do_compile
    with contextlib.ExitStack() as stack:
        active = stack.enter_context(active_driver(device, cache))
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(JITFunction, "_do_compile", do_compile))
        for stem in ("_common", *kernel_stems()):
            module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
            if hasattr(module, "device_facts"):
                facts = patch.object(module, "device_facts", lambda _: (arch, num_sms))
                stack.enter_context(facts)
        try:
            yield device
        finally:
            for function in seen:
                function.device_caches.pop(active.index, None)


class _LookInside(TorchDispatchMode):
    """Our registered operations run their launchers, whatever the device of the tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "equiseg_fast":
            func = LAUNCHERS[func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta(autocast: torch.dtype | None = None, backend: str = "triton") -> Iterator[None]:
    """`launches.on_meta`, where operations of equiseg_fast take tensors for those of a GPU.

    autocast: as `torch.autocast("cuda", dtype)` would. backend: as in `use_backend`.
    """
    with launches.on_meta(autocast), launches.as_on_gpu(backend), _LookInside():
        yield

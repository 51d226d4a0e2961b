"""Tensors of more than 2^31 elements, without their memory: where the kernels read and write.

Operations get tensors on the meta device. What they would launch is recorded, and the programs at
the corners of the grid run in Triton's interpreter on addresses alone: loads give zeros, or true,
stores go nowhere, and every address that is not masked must lie within its tensor. Offsets that do
not fit into 32 bits wrap there as they do on a GPU, and land outside.
"""

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton not installed")

from benchmarks.measure.launches import on_meta
from benchmarks.offline.dry import LookInside
from equiseg_fast.ops import _backend, _registry
from equiseg_fast.ops._registry import LAUNCHERS
from tests.every_operation import OPERATIONS
from tests.operations import Sizes, needs_interpreter

STEMS = sorted(p.stem for p in Path(_backend.__file__).parents[1].glob("kernels/[!_]*.py"))
LIMIT = 2**31
GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # of CUDA
MAX_LOADS = 60
"""A program that loops over many tiles is left after so many loads."""

pytestmark = needs_interpreter


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Launch:
    """One recorded launch: kernel, grid, arguments and constexprs."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.kernel, self.grid, self.args = kernel, grid, args
        for name in ("num_warps", "num_stages", "max_registers"):
            options.pop(name, None)
        self.constexprs = options

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, num_sms: int) -> Iterator[list[Launch]]:
    """Launches are recorded, for an H200 with so many SMs."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        for stem in STEMS:
            module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
            patch.setattr(module, "launch", lambda *a, **k: launches.append(Launch(*a, **k)))
            patch.setattr(module, "device_facts", lambda device: (90, num_sms))
        yield launches


class Pointer:
    """Stands for a tensor argument: an address range of its own, far from all others."""

    def __init__(self, x: Tensor, index: int) -> None:
        self.dtype = x.dtype
        self.start = (index + 1) << 44
        extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        self.stop = self.start + (extent if x.numel() else 0) * x.element_size()

    def data_ptr(self) -> int:
        return self.start


class Enough(Exception):
    """A program has shown enough of its loop."""


class Accesses:
    """Takes the place of memory: checks addresses, and remembers the furthest of each tensor."""

    def __init__(self, pointers: dict[str, Pointer]) -> None:
        self.pointers, self.loads = pointers, 0
        self.furthest: dict[str, int] = {}

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        active = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape))
        ]
        if not active.size:
            return
        low, high = int(active.min()), int(active.max())
        for name, p in self.pointers.items():
            if p.start <= low < p.stop:
                end = high + size - p.start
                assert end <= p.stop - p.start, f"{name} ends at {p.stop - p.start}; got {end}"
                self.furthest[name] = max(self.furthest.get(name, 0), end)
                return
        near = {name: hex((low - p.start) % 2**64) for name, p in self.pointers.items()}
        raise AssertionError(f"an address before or behind every tensor: offsets {near}")


def run_program(launch: Launch, index: tuple[int, ...], patch: pytest.MonkeyPatch) -> Accesses:
    """The kernel at one point of its grid, on addresses alone."""
    from triton.runtime import interpreter

    names = launch.kernel.arg_names
    pairs = dict(zip(names, launch.args, strict=False)) | launch.constexprs
    pointers = {n: Pointer(x, i) for i, (n, x) in enumerate(pairs.items()) if isinstance(x, Tensor)}
    accesses = Accesses(pointers)
    arguments = {
        n: x if n in launch.constexprs else interpreter._implicit_cvt(pointers.get(n, x))
        for n, x in pairs.items()
    }

    def load(ptrs: Any, mask: Any, other: Any, *_: Any) -> Any:
        accesses.loads += 1
        kind = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        accesses.check(ptrs.data, mask.data, dtype.itemsize)
        if accesses.loads >= MAX_LOADS:
            raise Enough
        shape = np.broadcast_shapes(ptrs.data.shape, mask.data.shape)
        # Booleans, which are loaded as int8, are true: a modality that is absent is never read.
        return interpreter.TensorHandle(np.full(shape, dtype == np.int8, dtype), kind)

    def store(ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        accesses.check(ptrs.data, mask.data, dtype.itemsize)

    builder = interpreter.interpreter_builder
    patch.setattr(type(builder), "create_masked_load", lambda self, *a: load(*a))
    patch.setattr(type(builder), "create_masked_store", lambda self, *a: store(*a))
    function = launch.kernel.rewrite()
    scope = interpreter._patch_lang(function)
    try:
        builder.set_grid_dim(*launch.grid, *(1,) * (3 - len(launch.grid)))
        builder.set_grid_idx(*index, *(0,) * (3 - len(index)))
        function(**arguments)
    except Exception as error:
        causes = iter(lambda e=[error]: e.append(e[-1].__cause__) or e[-1], None)
        if not any(isinstance(e, Enough) for e in (error, *causes)):
            raise
    finally:
        scope.restore()
    return accesses


def check_launch(launch: Launch, patch: pytest.MonkeyPatch) -> set[str]:
    """Corners of the grid stay inside their tensors, and reach the end of those that are huge.

    Half of all wrong offsets land inside; none of those lands near the end. Returns the huge ones.
    """
    for size, limit in zip(launch.grid, GRID_LIMITS, strict=False):
        assert 1 <= size <= limit, f"{launch.name} has a grid of {launch.grid}"
    furthest: dict[str, int] = {}
    for index in itertools.product(*({0, n - 1} for n in launch.grid)):
        for name, end in run_program(launch, index, patch).furthest.items():
            furthest[name] = max(furthest.get(name, 0), end)
    arguments = zip(launch.kernel.arg_names, launch.args, strict=False)
    huge = {name: x for name, x in arguments if isinstance(x, Tensor) and x.numel() > LIMIT}
    for name in huge.keys() & furthest.keys():
        part = furthest[name] / (huge[name].numel() * huge[name].element_size())
        assert part > 0.75, f"{launch.name} reaches {part:.0%} of {name}"
    return huge.keys() & furthest.keys()


# Scores and statistics, one per token, are large in "many tokens"; the query hub has another kernel
# for "wide" features.
SHAPES = {
    "many images": Sizes(batch=35, height=1000, width=1001, channels=64, classes=64),
    "large images": Sizes(batch=1, height=6001, width=6000, channels=64, classes=64),
    "many tokens": Sizes(batch=2200, height=1000, width=1001, channels=16, classes=16),
    "wide": Sizes(batch=7, height=1000, width=1001, channels=320, classes=320),
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", sorted({name.rpartition("_")[0] for name in LAUNCHERS}))
def test_addresses(name: str, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kernels of the operation, forward and backward to all inputs."""
    operation = OPERATIONS[name]
    leaves = {
        name: meta(*shape, dtype=torch.float32 if name in operation.fp32 else torch.bfloat16)
        for name, shape in operation.shapes(sizes).items()
    }
    with on_meta():
        others = operation.others(sizes, 0)
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "resolve", lambda *_, **__: "triton")
        patch.setattr(_registry, "has_values", lambda x: True)
        with LookInside(), recording(monkeypatch, num_sms=132) as launches:
            out = operation.function(**{n: x.requires_grad_() for n, x in leaves.items()}, **others)
            outputs = [x for x in ((out,) if isinstance(out, Tensor) else out) if x.requires_grad]
            cotangents = [torch.empty_like(x) for x in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    assert launches
    assert any([check_launch(launch, monkeypatch) for launch in launches])


@pytest.mark.parametrize(
    ("op", "arguments", "words"),
    [
        (
            "upsample_cross_entropy",
            (meta(1, 2, 2**16, 2**15), meta(1, 2**16, 2**15, dtype=torch.uint8)),
            "65536 x 32768 positions exceed 32 bits",
        ),
        (
            "upsample_cross_entropy",
            (meta(1, 2, 2**15, 4), meta(1, 2**16, 4, dtype=torch.uint8)),
            "positions of 65536 pixels over 32768 samples exceed 32 bits",
        ),
        (
            "query_hub",
            (meta(2, 1, 2**31, 2), meta(2, 2, 3, 3), meta(2, 2), meta(2, 2), meta(2), 2**16, 2**15),
            "2147483648 tokens exceed 32 bits",
        ),
    ],
)
def test_what_is_beyond_is_refused(op: str, arguments: tuple[Any, ...], words: str) -> None:
    """Where programs or positions within an image are counted in 32 bits."""
    assert words in _backend.explain(op, *arguments)

"""What every kernel file shares: launching, the facts about a device, and small jit helpers.

Nothing here knows an operation. Kernel files import this module, `_arch` and `_tuned`, and nothing
else of the package.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import INTERPRETER

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
"""True when kernels run in Triton's interpreter. Read once: `triton.jit` decides at decoration."""

LOG2E: float = math.log2(math.e)

# The interpreter swaps functions of `triton.language` for the time of a launch, for the whole
# process.
_INTERPRETER_LOCK = threading.RLock()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel[grid](*args, **constexprs)` on the device of the first argument, a tensor.

    max_registers per thread; None leaves the choice to the compiler. fp-fusion is
    asked for explicitly: the default of Triton 3.10 is off, which costs one more issue slot per
    score.
    """
    options = constexprs  # a dictionary of this call alone
    options |= {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    if INTERPRET:
        with _INTERPRETER_LOCK:
            kernel[grid](*args, **options)
        return
    index = args[0].get_device()
    # Asking is cheaper than switching. What is on no GPU has -1.
    if index < 0 or index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(index):
        kernel[grid](*args, **options)


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """(architecture, number of SMs) of the device of a tensor, for example (90, 132); (0, 8) when
    interpreting."""
    if INTERPRET or device.type != "cuda":
        return INTERPRETER, 8
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own also takes values inside kernels and is ten times slower."""
    return -(-a // b)


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Contiguous memory for a tensor in the shape of x, and in its dtype if no other is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_gradient(x: torch.Tensor, needed: bool) -> torch.Tensor:
    """Contiguous memory for the gradient of x, `[0]` if it is not needed."""
    return empty_like(x) if needed else x.new_empty(0)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy if its last stride is not 1, which all kernels assume, or if only
    its alignment keeps rows of whole vectors from being loaded as vectors.

    Another kernel would be compiled for that, which takes more registers than there are and is
    slower than copying.
    """
    if x.stride(-1) != 1 and x.size(-1) != 1:
        return x.contiguous()
    if x.size(-1) % 16:
        return x
    # The strides of what is contiguous are multiples of its width.
    whole = x.is_contiguous() or not any(stride % 16 for stride in strides(x))
    if whole and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last, 0 for dimensions of size 1.

    The stride of such a dimension is arbitrary, and Triton would compile another kernel for every
    value it treats specially (1, or not a multiple of 16).
    """
    found = x.stride()
    if 1 in x.shape:
        return tuple([0 if n == 1 else s for s, n in zip(found, x.shape, strict=True)][:-1])
    return found[:-1]


@dataclass(frozen=True)
class OfflineEntry:
    """One specialisation that a launcher can ask for: all that compiling it without a GPU takes.

    `types` maps every argument to Triton's name of its type ("*bf16", "i32", "fp32", "constexpr");
    `aligned` names the arguments that are multiples of 16 (addresses in bytes). `dots` is the
    precision class of the matrix products or "none"; `scores` is the number of scores in one trip
    through the hot loop (0: there is no such loop).
    """

    kernel: Any
    case: str
    types: dict[str, str]
    aligned: frozenset[str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dots: str
    scores: int
    max_registers: int | None

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def label(self) -> str:
        """Unique among the entries of one architecture."""
        sizes = (v for n, v in self.constexprs.items() if n.startswith("BLOCK") and n != "BLOCK_D")
        tile = "x".join(map(str, sizes))
        return f"{self.name} {self.case} {tile} w{self.num_warps} s{self.num_stages}"


def offline_entry(
    kernel: Any,
    case: str,
    pointers: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    dots: str = "none",
    scores: int = 0,
    max_registers: int | None = None,
    floats: Collection[str] = (),
    aligned: Collection[str] | None = None,
) -> OfflineEntry:
    """The entry of a kernel that takes pointers, floats (fp32), integers and constexprs.

    `pointers` maps arguments to dtypes; it and `floats` may name more than the kernel has. What
    neither names is an integer. `aligned` names the pointers and integers that are multiples of 16:
    all that the kernel specialises by default, none (or few) with odd widths.
    """
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = "*" + pointers[name]
        else:
            types[name] = "fp32" if name in floats else "i32"
    wanted = {name for name, kind in types.items() if kind == "constexpr"}
    if wanted != set(constexprs):
        # On a GPU the launch would fail in the same way; the interpreter does not look.
        raise TypeError(f"{kernel.__name__} takes {sorted(wanted)}, got {sorted(constexprs)}")
    multiples = frozenset(
        p.name
        for p in kernel.params
        if types[p.name][0] in "*i" and not p.do_not_specialize
        and (aligned is None or p.name in aligned)
    )  # fmt: skip
    case += "" if aligned is None else " unaligned"
    return OfflineEntry(
        kernel, case, types, multiples, dict(constexprs), num_warps, num_stages, dots, scores,
        max_registers,
    )  # fmt: skip


@triton.jit
def tile_of_program(n_tiles, BLOCK: tl.constexpr, H):
    """(first row of the tile, batch-head, batch, head) for a grid (tiles * batch * H, ...), int64.

    Tiles run fastest, so that programs that share keys run together and find them in the cache.
    Divisions are done in 32 bits: in 64 they are calls of a hundred instructions.
    """
    i_bh = tl.program_id(0) // n_tiles
    i_row = (tl.program_id(0) % n_tiles).to(tl.int64) * BLOCK
    return i_row, i_bh.to(tl.int64), (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)


@triton.jit
def load_tile(
    p, o_row, o_col, stride, m_row, m_col, MASK_ROW: tl.constexpr, MASK_COL: tl.constexpr
):
    """The tile `p[o_row, o_col]` with unit column stride, zero where a wanted mask is false.

    An unwanted mask is not applied at all: one that is true everywhere still costs predicates in a
    hot loop.
    """
    p_tile = p + o_row[:, None] * stride + o_col[None, :]
    if MASK_ROW and MASK_COL:
        b = tl.load(p_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)
    elif MASK_ROW:
        b = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif MASK_COL:
        b = tl.load(p_tile, mask=m_col[None, :], other=0.0)
    else:
        b = tl.load(p_tile)
    return b


SUMS_TILE = {"BLOCK_N": 128, "BLOCK_C": 32}
"""Partial sums and channels that a program of `sum_partials_kernel` adds at a time."""


@triton.jit(do_not_specialize=["n"])
def sum_partials_kernel(
    p_sums, p_dw, p_db, n, C, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Partial sums [n, TAPS + 1, C] over n, in a fixed order: into p_dw [C, TAPS], then p_db [C].

    Grid (channel blocks, TAPS + 1).
    """
    i_k = tl.program_id(1)
    o_n, o_c = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_tile = p_sums + i_k * C + o_n[:, None] * ((TAPS + 1) * C) + o_c[None, :]
    b_sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_n in tl.range(0, n, BLOCK_N):
        b_sums += tl.load(p_tile, mask=(o_n < n - i_n)[:, None] & m_c[None, :], other=0.0)
        p_tile += BLOCK_N * (TAPS + 1) * C
    b_sum = tl.sum(b_sums, 0)
    if i_k < TAPS:
        tl.store(p_dw + o_c * TAPS + i_k, b_sum.to(p_dw.dtype.element_ty), mask=m_c)
    else:
        tl.store(p_db + o_c, b_sum.to(p_db.dtype.element_ty), mask=m_c)

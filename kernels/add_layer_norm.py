"""Residual addition and LayerNorm over channels, forward and backward, in one pass over rows.

    total = x + update,   xhat = (total - mean) rstd,   normed = xhat weight + bias
    rstd = (var + eps)^(-1/2); mean and (biased) variance of total over the channels of a row

Layout. x, update, total, normed [R, C] rows of channels, weight and bias [C], mean and rstd [R] in
fp32. Strides of the rows of inputs and gradients are free, their last stride is 1.

Saved for the backward: total, weight, mean, rstd. With the gradients dt of total and dn of normed
    g = dn weight
    dx = dupdate = dt + rstd (g - avg(g) - xhat avg(g xhat)), averages over the channels of a row
    dweight = sum over rows of dn xhat,   dbias = sum over rows of dn

Work. Forward 4 R C elements moved (x, update; total, normed) and 8 R C FLOP. Backward 4 R C (total,
dt, dn; dx) and 14 R C FLOP. The addition and the LayerNorm one after the other move 5 and 8: the
backward reads dn and total once for dx and once for the sums, and adds dt in a kernel of its own.

Rows. A program holds whole rows, all channels of them, so the mean and then the sum of squared
differences from it are taken in registers: nothing cancels, as it does in E[x^2] - E[x]^2. Rows of
an odd number of channels are padded to a power of two.

Sums over rows. The backward has as many programs as the device holds at once; each walks over its
share of the rows with both sums in registers and stores them in fp32, and a second kernel adds
them in a fixed order: no atomics, bit-identical repeats.

Numerics. fp32 inside, one rounding at each store. LayerNorm sees the total that is stored, rounded,
so that its result is the one of an addition followed by a LayerNorm.

Limits. C <= 4096, the channels of a row that the registers of a program hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import Tile, is_odd, power_of_two, token_chunks
from equiseg_fast.kernels._common import (
    SUMS_TILE,
    OfflineEntry,
    cdiv,
    device_facts,
    empty_gradient,
    empty_like,
    last_dim_contiguous,
    launch,
    offline_entry,
    strides,
    sum_partials_kernel,
)
from equiseg_fast.kernels._tuned import at_least, remembered, tunable


def _row_tile(channels: int, elements: int, num_warps: int) -> Tile:
    """Whole rows; a row of more than `elements` gets more warps instead of more per thread."""
    block_c = max(16, power_of_two(channels))
    wide = max(1, block_c // elements)
    return Tile(block_l=max(1, elements // block_c), block_c=block_c, num_warps=num_warps * wide)


@tunable
@at_least(lambda arch, channels: {"block_c": channels})
def norm_fwd_config(arch: int, channels: int) -> Tile:
    """Rows that a program adds and normalises: 16 elements of either input per thread, on any
    architecture."""
    return _row_tile(channels, 4096, 8)


BWD_REGISTERS = 128
"""Per thread of the backward. With four warps the SMs hold all programs that `token_chunks` makes
at once; left alone the compiler takes more, or, for sm_100, spills rather than take more than
96."""


@tunable
@at_least(lambda arch, itemsize, channels: {"block_c": channels})
def norm_bwd_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Rows of one step of its backward; two sums per element stay in registers, on any
    architecture."""
    if is_odd(channels):
        return _row_tile(channels, 512 if channels <= 512 else 1024, 4)
    return _row_tile(channels, 2048 if itemsize == 2 else 1024, 4)


@triton.jit
def _tile_mask(o_l, L, o_c, C, PAD_C: tl.constexpr):
    """Where a tile has rows and channels, [BLOCK_L, BLOCK_C] or [BLOCK_L, 1]."""
    if PAD_C:
        return (o_l < L)[:, None] & (o_c < C)[None, :]
    else:
        return (o_l < L)[:, None]


@triton.jit
def _load_channels(p, o_c, C, PAD_C: tl.constexpr):
    """A vector of parameters in fp32, [1, BLOCK_C]."""
    if PAD_C:
        b = tl.load(p + o_c, mask=o_c < C, other=0.0)
    else:
        b = tl.load(p + o_c)
    return b.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["L"])
def _add_layer_norm_fwd_kernel(
    p_x, p_update, p_w, p_b, p_total, p_normed, p_mean, p_rstd,
    stride_x, stride_u, L, C, inverse_c, eps,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,); inverse_c is 1 / C."""
    i_l = tl.program_id(0).to(tl.int64) * BLOCK_L
    o_l, o_c = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    m_l = o_l < L - i_l
    m = _tile_mask(o_l, L - i_l, o_c, C, PAD_C)
    p_x += i_l * stride_x
    p_update += i_l * stride_u
    b_x = tl.load(p_x + (o_l[:, None] * stride_x + o_c[None, :]), mask=m, other=0.0)
    b_u = tl.load(p_update + (o_l[:, None] * stride_u + o_c[None, :]), mask=m, other=0.0)
    b_sum = (b_x.to(tl.float32) + b_u.to(tl.float32)).to(p_total.dtype.element_ty)
    o_out = o_l[:, None] * C + o_c[None, :]
    tl.store(p_total + i_l * C + o_out, b_sum, mask=m)

    b_t = b_sum.to(tl.float32)
    # Rounded correctly, so that in constant rows nothing is left for rstd to magnify.
    b_mean = tl.math.div_rn(tl.sum(b_t, 1), tl.zeros([BLOCK_L], tl.float32) + C)
    b_d = b_t - b_mean[:, None]
    if PAD_C:
        b_d = tl.where((o_c < C)[None, :], b_d, 0.0)
    b_rstd = tl.math.rsqrt(tl.sum(b_d * b_d, 1) * inverse_c + eps)
    tl.store(p_mean + i_l + o_l, b_mean, mask=m_l)
    tl.store(p_rstd + i_l + o_l, b_rstd, mask=m_l)
    b_y = b_d * b_rstd[:, None] * _load_channels(p_w, o_c, C, PAD_C)
    b_y += _load_channels(p_b, o_c, C, PAD_C)
    tl.store(p_normed + i_l * C + o_out, b_y.to(p_normed.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["L", "chunk"])
def _add_layer_norm_bwd_kernel(
    p_dtotal, p_dnormed, p_total, p_w, p_mean, p_rstd, p_dx, p_sums,
    stride_dt, stride_dn, L, C, chunk, inverse_c,
    HAS_DTOTAL: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of rows,), sums [chunks, 2, C] (weight, bias); inverse_c is 1 / C."""
    i_s = tl.program_id(0).to(tl.int64)
    i_start = i_s * chunk
    rows = tl.minimum(L - i_start, chunk).to(tl.int32)
    o_l, o_c = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    o_dt = o_l[:, None] * stride_dt + o_c[None, :]
    o_dn = o_l[:, None] * stride_dn + o_c[None, :]
    o_out = o_l[:, None] * C + o_c[None, :]
    p_dtotal += i_start * stride_dt
    p_dnormed += i_start * stride_dn
    p_total += i_start * C
    p_dx += i_start * C
    p_mean += i_start
    p_rstd += i_start
    b_w = _load_channels(p_w, o_c, C, PAD_C)
    b_dw = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    b_db = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for i_l in tl.range(0, rows, BLOCK_L):
        m_l = o_l < rows - i_l
        m = _tile_mask(o_l, rows - i_l, o_c, C, PAD_C)
        b_dn = tl.load(p_dnormed + o_dn, mask=m, other=0.0)
        b_t = tl.load(p_total + o_out, mask=m, other=0.0)
        b_mean = tl.load(p_mean + o_l, mask=m_l, other=0.0)
        b_rstd = tl.load(p_rstd + o_l, mask=m_l, other=0.0)
        b_dn = b_dn.to(tl.float32)
        # Beyond the last channel this is not zero, but everything it is multiplied by is.
        b_xhat = (b_t.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
        if NEEDS_SUMS:
            b_dw += b_dn * b_xhat
            b_db += b_dn
        if NEEDS_DX:
            b_g = b_dn * b_w
            if HAS_DTOTAL:
                # In flight while the sums over channels are taken.
                b_dt = tl.load(p_dtotal + o_dt, mask=m, other=0.0)
            b_first = tl.sum(b_g, 1) * inverse_c
            b_second = tl.sum(b_g * b_xhat, 1) * inverse_c
            b_dx = (b_g - b_first[:, None] - b_xhat * b_second[:, None]) * b_rstd[:, None]
            if HAS_DTOTAL:
                b_dx += b_dt.to(tl.float32)
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m)
        p_dtotal += BLOCK_L * stride_dt
        p_dnormed += BLOCK_L * stride_dn
        p_total += BLOCK_L * C
        p_dx += BLOCK_L * C
        p_mean += BLOCK_L
        p_rstd += BLOCK_L
    if NEEDS_SUMS:
        p_sums += i_s * 2 * C
        tl.store(p_sums + o_c, tl.sum(b_dw, 0), mask=o_c < C)
        tl.store(p_sums + C + o_c, tl.sum(b_db, 0), mask=o_c < C)


@remembered
def _constexprs(tile: Tile, channels: int) -> dict:
    return {**tile.blocks, "PAD_C": channels != tile.block_c}


# Offsets within a tile, of at most 256 rows, are 32 bits wide.
_FAR_APART = 2**31 // 256


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [..., C], taken as rows [R, C] with a last stride of 1, and their stride (0 for a single
    row, see `strides`); copied where it is no such thing."""
    channels = x.shape[-1]
    if not x.is_contiguous():
        rows = last_dim_contiguous(x.reshape(-1, channels))
        if rows.stride(0) < _FAR_APART:
            return rows, *strides(rows)
        x = rows.contiguous()
    return last_dim_contiguous(x), channels if x.numel() > channels else 0


def add_layer_norm_fwd(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, update [..., C], weight, bias [C], all fp32, fp16 or bf16.

    Returns total and normed [..., C] in the dtype of x, mean and rstd [...] in fp32, contiguous.
    Features whose leading dimensions cannot be viewed as one or whose last stride is not 1, and
    parameters that are not contiguous, are copied.
    """
    total, normed = empty_like(x), empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = empty_like(mean)
    if x.numel() == 0:
        return total, normed, mean, rstd
    channels = x.shape[-1]
    rows = x.numel() // channels
    x, stride_x = _rows(x)
    update, stride_update = _rows(update)
    arch, _ = device_facts(x.device)
    tile = norm_fwd_config(arch, channels)
    launch(
        _add_layer_norm_fwd_kernel, (cdiv(rows, tile.block_l),),
        x, update, weight.contiguous(), bias.contiguous(), total, normed, mean, rstd,
        stride_x, stride_update, rows, channels, 1.0 / channels, eps,
        **tile.launch, **_constexprs(tile, channels),
    )  # fmt: skip
    return total, normed, mean, rstd


def add_layer_norm_bwd(
    grad_total: torch.Tensor | None, grad_normed: torch.Tensor,
    total: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
    needs_dx: bool, needs_dweight: bool, needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `add_layer_norm_fwd` for those of its outputs, [..., C] of any strides.

    total, mean and rstd are its results; grad_total may be None. Returns dx [..., C], which is the
    gradient of x and of update, in the dtype of total, and dweight and dbias [C] in that of weight,
    contiguous; those not needed are empty, [0]. dweight and dbias come from one kernel: needing one
    of them costs as much as both.
    """
    dx, dweight = empty_gradient(total, needs_dx), empty_gradient(weight, needs_dweight)
    dbias = empty_gradient(weight, needs_dbias)
    needs_sums = needs_dweight or needs_dbias
    if total.numel() == 0 or not (needs_dx or needs_sums):
        return dx, dweight.zero_(), dbias.zero_()
    channels = total.shape[-1]
    rows = total.numel() // channels
    total = total.contiguous()
    grad_normed, stride_dnormed = _rows(grad_normed)
    has_dtotal = grad_total is not None
    grad_total, stride_dtotal = _rows(grad_total) if has_dtotal else (grad_normed, stride_dnormed)
    arch, num_sms = device_facts(total.device)
    tile = norm_bwd_config(arch, total.element_size(), channels)
    chunks, blocks = token_chunks(1, cdiv(rows, tile.block_l), num_sms)
    shape = (chunks, 2, channels) if needs_sums else (0,)
    sums = total.new_empty(shape, dtype=torch.float32)
    launch(
        _add_layer_norm_bwd_kernel, (chunks,),
        grad_total, grad_normed, total, weight.contiguous(), mean.contiguous(), rstd.contiguous(),
        dx, sums, stride_dtotal, stride_dnormed,
        rows, channels, blocks * tile.block_l, 1.0 / channels,
        **tile.launch, max_registers=BWD_REGISTERS,
        HAS_DTOTAL=has_dtotal, NEEDS_DX=needs_dx, NEEDS_SUMS=needs_sums,
        **_constexprs(tile, channels),
    )  # fmt: skip
    if needs_sums:
        launch(
            sum_partials_kernel, (cdiv(channels, SUMS_TILE["BLOCK_C"]), 2),
            sums, dweight if needs_dweight else empty_like(weight),
            dbias if needs_dbias else empty_like(weight), chunks, channels,
            num_warps=4, num_stages=1, TAPS=1, **SUMS_TILE,
        )  # fmt: skip
    return dx, dweight, dbias


# The widths of the Mix Transformer and the limit; fp16 has the instructions of bf16.
_OFFLINE = (
    ("bf16", 2, (32, 64, 160, 256, 320, 512, 4096), None),
    ("fp16", 2, (64,), None),
    ("fp32", 4, (64, 160, 4096), None),
    ("bf16", 2, (33, 4095), ()),
    ("fp32", 4, (33,), ()),
)


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples
    of unaligned ones.

    A gradient that is missing or not wanted only leaves work out: one case of each shows it.
    """
    names = ("x", "update", "w", "b", "total", "normed", "dtotal", "dnormed", "dx", "dw", "db")
    statistics = dict.fromkeys(("p_mean", "p_rstd", "p_sums"), "fp32")
    floats = ("eps", "inverse_c")
    flags = ("HAS_DTOTAL", "NEEDS_DX", "NEEDS_SUMS")
    for dtype, itemsize, widths, aligned in _OFFLINE:
        types = {f"p_{name}": dtype for name in names} | statistics
        for channels in widths:
            case = f"{dtype} C{channels}"
            tile = norm_fwd_config(arch, channels)
            yield offline_entry(
                _add_layer_norm_fwd_kernel, case, types, _constexprs(tile, channels),
                **tile.launch, floats=floats, aligned=aligned,
            )  # fmt: skip
            tile = norm_bwd_config(arch, itemsize, channels)
            for left_out in ("", *flags) if (dtype, channels) == ("bf16", 64) else ("",):
                yield offline_entry(
                    _add_layer_norm_bwd_kernel, f"{case} without {left_out}" if left_out else case,
                    types,
                    _constexprs(tile, channels) | {flag: flag != left_out for flag in flags},
                    **tile.launch, max_registers=BWD_REGISTERS, floats=floats, aligned=aligned,
                )  # fmt: skip
        blocks = {"TAPS": 1, **SUMS_TILE}
        yield offline_entry(
            sum_partials_kernel, f"{dtype} x2", types, blocks, 4, 1, aligned=aligned
        )

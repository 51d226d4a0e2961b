"""3x3 depthwise convolution, bias and GELU on tokens, forward and backward, without a transpose.

    u[h, w, c] = bias[c] + sum over i, j of weight[c, i, j] x[h + i - 1, w + j - 1, c],  y = gelu(u)

Layout. x, y [B, L, C] with L = H * W in row-major order (zeros outside the image), weight
[C, 1, 3, 3], bias [C]. Strides of x and of the gradient are free but for a last stride of 1.

Saved for the backward: x, weight, bias; u is computed again. With du = dy gelu'(u)
    dx = the same convolution of du with the weight flipped in both directions,
    dweight[c, i, j] = sum of du[h, w, c] x[h + i - 1, w + j - 1, c],   dbias = sum of du.

Work. Forward 2 B L C elements moved (x, y) and 18 B L C FLOP besides GELU. Backward 5 B L C
elements in two kernels (x, dy, du; du, dx) and 54 B L C FLOP. One kernel for both would move 3, but
would compute du at all columns of a tap: that costs more instructions than two passes take.

Rolling rows. A program walks down a strip of BLOCK_W columns and BLOCK_C channels. Every row is
loaded once (and shifted by a column to the left and right: the cache serves two of three loads) and
added to three rows of u, of which only the two unfinished ones are kept. The next row is in flight
while one is computed, since registers for nine taps leave few warps to hide its latency. The
backward keeps two rows of x instead, as the gradient of the weight needs them.

Sums over tokens. Every program stores its ten sums per channel in fp32 (nine taps and the bias), a
second kernel adds them in a fixed order: no atomics, bit-identical repeats.

GELU. fp32 uses erf. For fp16 and bf16 Phi(-t) = 2^P(t) with P of degree 5, P(0) = -1: the absolute
error of gelu is below 7.5e-6 and that of gelu' below 1.9e-5. Next to the rounding of the result
(4.9e-4 at 1 in fp16) it does not show, and small results are as good: it is exact at 0. It saves 23
of 51 instructions per element on sm_90; the other 28 take about as long as the memory traffic of an
H200. Infinities and NaN come out as they do from erf.

Numerics. fp32 inside, one rounding at the store; du is rounded to the dtype of x in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import (
    HALF,
    INTERPRETER,
    Tile,
    architecture,
    precision_class,
)
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
from equiseg_fast.kernels._tuned import remembered, tunable


def _strip_tile(channels: int, num_warps: int, ctas_per_sm: int) -> Tile:
    block_c = 64 if channels > 32 else 32
    return Tile(
        block_w=512 // block_c, block_c=block_c, num_warps=num_warps, ctas_per_sm=ctas_per_sm
    )


@tunable
def depthwise_conv_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Strips of the convolution: every thread loads 16 bytes at a time."""
    if arch == INTERPRETER:
        return Tile(block_w=64, block_c=64, num_warps=4, ctas_per_sm=1)
    return _strip_tile(channels, 2, 6) if itemsize == 2 else _strip_tile(channels, 4, 4)


@tunable
def depthwise_bwd_config(arch: int, channels: int) -> Tile:
    """Strips of its backward: ten sums leave registers for four elements per thread."""
    if arch == INTERPRETER:
        return Tile(block_w=64, block_c=64, num_warps=4, ctas_per_sm=1)
    # With four warps the compiler for sm_120 spills rather than lower occupancy.
    four = architecture(arch).number < 120
    return _strip_tile(channels, 4, 3) if four else _strip_tile(channels, 8, 2)


def depthwise_bwd_max_registers(itemsize: int) -> int | None:
    """Per thread of the backward in half precision, where sm_80 takes more without need; None
    leaves it to the compiler."""
    return 136 if _is_half(itemsize) else None


def _is_half(itemsize: int) -> bool:
    return precision_class(itemsize, allow_tf32=False) == HALF


_MIN_STRIP_ROWS = 8
_STRIP_OVERHEAD = 4


@remembered
def strip_rows(strips: int, height: int, slots: int) -> int:
    """How many of `height` rows a program walks, where the device holds `slots` programs at once.

    Long walks share the fixed cost (taps, first loads, two more rows) among more rows, short ones
    fill the device. The estimate is waves times (rows + fixed cost), in units of one row.
    """
    best = (float("inf"), 1, height)
    chunks = 1
    while chunks == 1 or height >= chunks * _MIN_STRIP_ROWS:
        rows = -(-height // chunks)
        waves = -(-strips * -(-height // rows) // slots)
        best = min(best, (waves * (rows + _STRIP_OVERHEAD), chunks, rows))
        chunks *= 2
    return best[2]


@triton.jit
def _upper_tail(u):
    """Phi(-|u|), the minimax fit: the relative error is at most 4.4e-5 up to |u| = 3.5."""
    b_t = tl.abs(u)
    b_p = b_t * -3.8314634e-4 + 6.413908e-3
    b_p = b_p * b_t - 5.0154097e-2
    b_p = b_p * b_t - 0.46155655
    b_p = b_p * b_t - 1.1504129
    return tl.math.exp2(b_p * b_t - 1.0)


@triton.jit
def _gelu(u, FITTED: tl.constexpr):
    if FITTED:
        return 0.5 * u + tl.abs(u) * (0.5 - _upper_tail(u))
    else:
        return 0.5 * u * (1.0 + tl.math.erf(u * 0.7071067811865476))


@triton.jit
def _gelu_derivative(u, FITTED: tl.constexpr):
    if FITTED:
        b_tail = _upper_tail(u)
        b_cdf = tl.where(u >= 0, 1.0 - b_tail, b_tail)
    else:
        b_cdf = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476)
    # exp(-u^2 / 2) / sqrt(2 pi) in base 2
    return b_cdf + u * tl.math.exp2(u * u * -0.7213475204444817 - 1.3257480647361593)


@triton.jit
def _locate(H, W, C, rows, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """First channel, column and row, and batch row (int64) of this program's strip.

    Channels are fastest: neighbouring programs read neighbouring memory.
    """
    i = tl.program_id(0)
    n_c, n_w, n_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W), tl.cdiv(H, rows)
    i_c = i % n_c * BLOCK_C
    i_w = i // n_c % n_w * BLOCK_W
    i_h = i // (n_c * n_w) % n_h * rows
    return i_c, i_w, i_h, (i // (n_c * n_w * n_h)).to(tl.int64)


@triton.jit
def _column_masks(o_w, m_c, W, PAD_C: tl.constexpr):
    """Where the columns left of, at and right of `o_w` are in the image."""
    m_left = ((o_w > 0) & (o_w <= W))[:, None]
    m_mid = (o_w < W)[:, None]
    m_right = (o_w < W - 1)[:, None]
    if PAD_C:
        m_c = m_c[None, :]
        return m_left & m_c, m_mid & m_c, m_right & m_c
    else:
        return m_left, m_mid, m_right


@triton.jit
def _load_row(p, i_h, stop, masks, stride_w):
    """The tile at `p`, in row `i_h`, between its neighbours; zero unless 0 <= i_h < stop."""
    # A block instead of a scalar: the interpreter makes no mask of a block and a scalar.
    b_h = tl.zeros([1, 1], tl.int32) + i_h
    m_h = (b_h >= 0) & (b_h < stop)
    b_left = tl.load(p - stride_w, mask=masks[0] & m_h, other=0.0)
    b_mid = tl.load(p, mask=masks[1] & m_h, other=0.0)
    b_right = tl.load(p + stride_w, mask=masks[2] & m_h, other=0.0)
    return b_left, b_mid, b_right


@triton.jit
def _widen(row):
    return row[0].to(tl.float32), row[1].to(tl.float32), row[2].to(tl.float32)


@triton.jit
def _load_taps(p_w, o_c, m_c, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Three taps of every channel, [1, C] each."""
    p = p_w + o_c * 9 + FIRST
    b_left = tl.load(p, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_mid = tl.load(p + STEP, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_right = tl.load(p + 2 * STEP, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_left, b_mid, b_right


@triton.jit
def _add_products(b_sum, row, taps):
    return b_sum + row[0] * taps[0] + row[1] * taps[1] + row[2] * taps[2]


@triton.jit
def _add_row_sums(sums, b_du, row):
    return sums[0] + b_du * row[0], sums[1] + b_du * row[1], sums[2] + b_du * row[2]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _depthwise_conv_kernel(
    p_x, p_w, p_b, p_y, stride_xb, stride_xh, stride_xw, H, W, C, rows,
    FORWARD: tl.constexpr, FITTED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * column blocks * row chunks * B,).

    FORWARD: bias and GELU behind the convolution; otherwise the convolution with the taps flipped
    in both directions and nothing else, which takes du to dx.
    """
    i_c, i_w, i_h, i_b = _locate(H, W, C, rows, BLOCK_W, BLOCK_C)
    o_c, o_w = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    m_c = o_c < C - i_c
    masks = _column_masks(i_w + o_w, m_c, W, PAD_C)
    FIRST: tl.constexpr = 0 if FORWARD else 8
    STEP: tl.constexpr = 1 if FORWARD else -1
    taps_0 = _load_taps(p_w, i_c + o_c, m_c, FIRST, STEP)
    taps_1 = _load_taps(p_w, i_c + o_c, m_c, FIRST + 3 * STEP, STEP)
    taps_2 = _load_taps(p_w, i_c + o_c, m_c, FIRST + 6 * STEP, STEP)
    b_bias = tl.zeros([1, BLOCK_C], tl.float32)
    if FORWARD:
        b_bias += tl.load(p_b + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_first = tl.zeros([BLOCK_W, BLOCK_C], tl.float32) + b_bias
    b_second = b_first

    # Row r completes row r - 1 of the result, hence the walk starts a row above and ends one below.
    i_stop = tl.minimum(i_h + rows, H)
    i_unread = tl.minimum(i_stop + 1, H)
    i_above = (i_h - 1).to(tl.int64)
    p_x += i_b * stride_xb + i_above * stride_xh + i_w.to(tl.int64) * stride_xw + i_c
    p_y += ((i_b * H + i_above - 1) * W + i_w) * C + i_c
    p_tile = p_x + o_w[:, None] * stride_xw + o_c[None, :]
    p_out = p_y + o_w[:, None] * C + o_c[None, :]
    following = _load_row(p_tile, i_h - 1, i_unread, masks, stride_xw)
    for r in tl.range(i_h - 1, i_stop + 1):
        row = _widen(following)
        p_tile += stride_xh
        following = _load_row(p_tile, r + 1, i_unread, masks, stride_xw)
        b_u = _add_products(b_first, row, taps_2)
        b_first = _add_products(b_second, row, taps_1)
        b_second = _add_products(b_bias, row, taps_0)
        if r > i_h:
            if FORWARD:
                b_u = _gelu(b_u, FITTED)
            tl.store(p_out, b_u.to(p_y.dtype.element_ty), mask=masks[1])
        p_out += W * C


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _depthwise_bwd_kernel(
    p_x, p_dy, p_w, p_b, p_du, p_sums,
    stride_xb, stride_xh, stride_xw, stride_gb, stride_gh, stride_gw, H, W, C, rows,
    NEEDS_DU: tl.constexpr, NEEDS_SUMS: tl.constexpr, FITTED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Grid as `_depthwise_conv_kernel`; sums [programs / channel blocks, 10, C], du like x."""
    i_c, i_w, i_h, i_b = _locate(H, W, C, rows, BLOCK_W, BLOCK_C)
    o_c, o_w = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    m_c = o_c < C - i_c
    masks = _column_masks(i_w + o_w, m_c, W, PAD_C)
    taps_0 = _load_taps(p_w, i_c + o_c, m_c, 0, 1)
    taps_1 = _load_taps(p_w, i_c + o_c, m_c, 3, 1)
    taps_2 = _load_taps(p_w, i_c + o_c, m_c, 6, 1)
    b_bias = tl.load(p_b + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]

    i_stop = tl.minimum(i_h + rows, H)
    i_above = (i_h - 1).to(tl.int64)
    p_x += i_b * stride_xb + i_above * stride_xh + i_w.to(tl.int64) * stride_xw + i_c
    p_dy += i_b * stride_gb + (i_above - 1) * stride_gh + i_w.to(tl.int64) * stride_gw + i_c
    p_du += ((i_b * H + i_above - 1) * W + i_w) * C + i_c
    p_tile = p_x + o_w[:, None] * stride_xw + o_c[None, :]
    p_grad = p_dy + o_w[:, None] * stride_gw + o_c[None, :]
    p_out = p_du + o_w[:, None] * C + o_c[None, :]
    b_dbias = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    zeros = b_dbias, b_dbias, b_dbias
    row_0, row_1 = zeros, zeros
    sums_0, sums_1, sums_2 = zeros, zeros, zeros
    for r in tl.range(i_h - 1, i_stop + 1):
        m_grad = masks[1] & (tl.zeros([1, 1], tl.int32) + r > i_h)
        b_dy = tl.load(p_grad, mask=m_grad, other=0.0)
        row_2 = _widen(_load_row(p_tile, r, H, masks, stride_xw))
        if r > i_h:
            b_u = _add_products(b_bias, row_0, taps_0)
            b_u = _add_products(b_u, row_1, taps_1)
            b_u = _add_products(b_u, row_2, taps_2)
            b_du = b_dy.to(tl.float32) * _gelu_derivative(b_u, FITTED)
            if NEEDS_DU:
                tl.store(p_out, b_du.to(p_du.dtype.element_ty), mask=masks[1])
            if NEEDS_SUMS:
                sums_0 = _add_row_sums(sums_0, b_du, row_0)
                sums_1 = _add_row_sums(sums_1, b_du, row_1)
                sums_2 = _add_row_sums(sums_2, b_du, row_2)
                b_dbias += b_du
        row_0, row_1 = row_1, row_2
        p_tile += stride_xh
        p_grad += stride_gh
        p_out += W * C

    if NEEDS_SUMS:
        p_sums += (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64) * 10 * C + i_c
        for j in tl.static_range(3):
            tl.store(p_sums + j * C + o_c, tl.sum(sums_0[j], 0), mask=m_c)
            tl.store(p_sums + (3 + j) * C + o_c, tl.sum(sums_1[j], 0), mask=m_c)
            tl.store(p_sums + (6 + j) * C + o_c, tl.sum(sums_2[j], 0), mask=m_c)
        tl.store(p_sums + 9 * C + o_c, tl.sum(b_dbias, 0), mask=m_c)


@remembered
def _block_constexprs(tile: Tile, channels: int) -> dict:
    return {**tile.blocks, "PAD_C": channels % tile.block_c != 0}


def _map_strides(x: torch.Tensor, width: int) -> tuple[int, int, int]:
    """Strides of batch rows, image rows and image columns of tokens [B, L, C]."""
    stride_b, stride_w = strides(x)
    return stride_b, width * stride_w, stride_w


def _programs(x: torch.Tensor, height: int, width: int, tile: Tile) -> tuple[int, int]:
    """How many programs a kernel has, and how many rows each of them walks."""
    batch, _, channels = x.shape
    _, num_sms = device_facts(x.device)
    strips = cdiv(channels, tile.block_c) * cdiv(width, tile.block_w) * batch
    rows = strip_rows(strips, height, tile.ctas_per_sm * num_sms)
    return strips * cdiv(height, rows), rows


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    height: int, width: int, forward: bool,
) -> torch.Tensor:  # fmt: skip
    out = empty_like(x)
    channels = x.shape[-1]
    arch, _ = device_facts(x.device)
    tile = depthwise_conv_config(arch, x.element_size(), channels)
    programs, rows = _programs(x, height, width, tile)
    launch(
        _depthwise_conv_kernel, (programs,),
        x, weight, bias, out, *_map_strides(x, width), height, width, channels, rows,
        **tile.launch, FORWARD=forward, FITTED=_is_half(x.element_size()),
        **_block_constexprs(tile, channels),
    )  # fmt: skip
    return out


def depthwise_conv_gelu_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """gelu(conv(x)) of x [B, L, C], weight [C, 1, 3, 3], bias [C], all fp32, fp16 or bf16.

    Returns [B, L, C], contiguous, in the dtype of x. An x whose last stride is not 1 and parameters
    that are not contiguous are copied.
    """
    if x.numel() == 0:
        return empty_like(x)
    x, weight, bias = last_dim_contiguous(x), weight.contiguous(), bias.contiguous()
    return _convolve(x, weight, bias, height, width, forward=True)


def depthwise_conv_gelu_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    height: int, width: int, needs_dx: bool, needs_dweight: bool, needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `depthwise_conv_gelu_fwd` for grad_out [B, L, C] (any strides).

    Returns dx, dweight, dbias, contiguous, in the dtype of their input; those not needed are empty,
    [0]. dweight and dbias come from one kernel: needing one of them costs as much as both.
    """
    du, dweight = empty_gradient(x, needs_dx), empty_gradient(weight, needs_dweight)
    dbias = empty_gradient(bias, needs_dbias)
    needs_sums = needs_dweight or needs_dbias
    if x.numel() == 0 or not (needs_dx or needs_sums):
        return du, dweight.zero_(), dbias.zero_()
    x, grad_out = last_dim_contiguous(x), last_dim_contiguous(grad_out)
    weight, bias = weight.contiguous(), bias.contiguous()
    channels = x.shape[-1]
    arch, _ = device_facts(x.device)
    tile = depthwise_bwd_config(arch, channels)
    programs, rows = _programs(x, height, width, tile)
    n_sums = programs // cdiv(channels, tile.block_c) if needs_sums else 0
    sums = x.new_empty((n_sums, 10, channels), dtype=torch.float32)
    launch(
        _depthwise_bwd_kernel, (programs,),
        x, grad_out, weight, bias, du, sums,
        *_map_strides(x, width), *_map_strides(grad_out, width), height, width, channels, rows,
        **tile.launch, max_registers=depthwise_bwd_max_registers(x.element_size()),
        NEEDS_DU=needs_dx, NEEDS_SUMS=needs_sums, FITTED=_is_half(x.element_size()),
        **_block_constexprs(tile, channels),
    )  # fmt: skip
    if needs_sums:
        whole_dweight = dweight if needs_dweight else empty_like(weight)
        whole_dbias = dbias if needs_dbias else empty_like(bias)
        launch(
            sum_partials_kernel, (cdiv(channels, SUMS_TILE["BLOCK_C"]), 10),
            sums, whole_dweight, whole_dbias, n_sums, channels,
            num_warps=4, num_stages=1, TAPS=9, **SUMS_TILE,
        )  # fmt: skip
    dx = _convolve(du, weight, bias, height, width, forward=False) if needs_dx else du
    return dx, dweight, dbias


# Whole and padded blocks, wide and narrow; fp16 has the instructions of bf16.
_OFFLINE = (
    ("bf16", 2, (64, 96, 32, 16), None),
    ("fp16", 2, (64,), None),
    ("fp32", 4, (64, 96, 32), None),
    ("bf16", 2, (33,), ()),
    ("fp32", 4, (33,), ()),
)


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples of
    unaligned ones."""
    for dtype, itemsize, widths, aligned in _OFFLINE:
        names = ("p_x", "p_w", "p_b", "p_y", "p_dy", "p_du", "p_dw", "p_db")
        types = dict.fromkeys(names, dtype) | {"p_sums": "fp32"}
        for channels in widths:
            case = f"{dtype} C{channels}"
            tile = depthwise_conv_config(arch, itemsize, channels)
            scores = tile.block_w * tile.block_c
            blocks = _block_constexprs(tile, channels) | {"FITTED": _is_half(itemsize)}
            for forward in (True, False):
                yield offline_entry(
                    _depthwise_conv_kernel, case + (" gelu" if forward else " dx"), types,
                    blocks | {"FORWARD": forward}, **tile.launch,
                    scores=scores if forward else 0, aligned=aligned,
                )  # fmt: skip
            tile = depthwise_bwd_config(arch, channels)
            for needs_du, needs_sums in ((True, True), (True, False), (False, True)):
                needs = {"NEEDS_DU": needs_du, "NEEDS_SUMS": needs_sums}
                yield offline_entry(
                    _depthwise_bwd_kernel, case + " du" * needs_du + " sums" * needs_sums, types,
                    blocks | needs, **tile.launch, scores=scores,
                    max_registers=depthwise_bwd_max_registers(itemsize), aligned=aligned,
                )  # fmt: skip
        blocks = {"TAPS": 9, **SUMS_TILE}
        yield offline_entry(
            sum_partials_kernel, f"{dtype} x10", types, blocks, 4, 1, aligned=aligned
        )

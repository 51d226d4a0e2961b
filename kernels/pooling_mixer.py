"""Depthwise 7x7 plus its 3x3, 7x7 and 11x11 average pools, summed, forward and backward.

    y = convolution of x (zero padding) + bias         out = y + sum over k in 3, 7, 11 of P_k y
    (P_k y)[q] = (sum of y over the k x k window of q, inside the image) / (pixels of it inside)

Layout. x, out [B, L, C], L = H W: tokens, any strides with a last stride of 1. The 7x7 weights come
as [49, C], taps first, so that neighbouring channels are neighbours in memory.

Two kernels, with y between them in fp32 (one rounding, at the store of out). One kernel for both
would compute y again on a border of 5 pixels around every tile, 49 multiplications each: more time
than two passes over memory. Outside the image y does not exist, it is not the convolution of the
padding, so the two operators cannot be merged into one filter either.

Both walk down a strip of rows with partial sums in registers: a new row adds its share to
every output row it reaches, the oldest of them is complete and stored. A pool sums a row over
nested windows of 3, 7, 11 columns, then rows: 10 + 21 additions where windows have 9 + 49 + 121
pixels. No running sum ever subtracts, hence no cancellation, and a NaN stays in its windows.

Counts are products, pixels in the rows times pixels in the columns. A window reaches q from p
exactly if that of p reaches q: the transposed pool is the same box sum of grad / count. The
backward is
    dy = g + sum of the transposed pools of g   (the kernel of the pools, divided before the sum)
    dx = the convolution of dy with the weights flipped                          (the same kernel)
    dweight[tap] = sum over tokens of dy and the shifted x,   dbias = sum of dy
where the last two are partial sums per program, added in a fixed order. No atomics: repeats are
bit-identical. Saved: x and the weights.

Work. Forward moves x, out and twice y (fp32), about 150 FLOP per element; backward moves g, x, dx
and three times dy (fp32), about 260 FLOP per element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import INTERPRETER, Tile, architecture, channel_block, is_odd
from equiseg_fast.kernels._common import (
    OfflineEntry,
    cdiv,
    device_facts,
    empty_gradient,
    empty_like,
    last_dim_contiguous,
    launch,
    load_tile,
    offline_entry,
    strides,
)
from equiseg_fast.kernels._tuned import remembered, tunable

_TAPS = 49


# The tiles hold `block_w` tokens of one row; the loop runs down the rows of a strip.


def _mixer_tile(arch: int, channels: int, elements: int) -> Tile:
    if arch == INTERPRETER:
        return Tile(block_w=32, block_c=64, num_warps=4)
    block_c = channel_block(channels)
    # Odd widths: half as many, so that the addresses of all fit into registers.
    block_w = elements // (2 if is_odd(channels) else 1) // block_c
    return Tile(block_w=block_w, block_c=block_c, num_warps=4)


@tunable
def pooling_mixer_conv_config(arch: int, channels: int) -> Tile:
    """Tiles of the 7x7 convolution: beside 49 weights a thread has room for two elements."""
    return _mixer_tile(arch, channels, 256)


@tunable
def pooling_mixer_pool_config(arch: int, channels: int) -> Tile:
    """Tiles of the pools: 24 partial sums; four elements a thread make loads of 16 bytes."""
    return _mixer_tile(arch, channels, 512)


@tunable
def pooling_mixer_dweight_config(arch: int, channels: int) -> Tile:
    """Tiles of the gradients of the weights: 50 sums, 7 rows and 7 shifts."""
    # For sm_90 the compiler spills with one element per thread, not with two.
    two = is_odd(channels) and architecture(arch).number == 90
    return _mixer_tile(arch, channels, 512 if two else 256)


def pooling_mixer_reduce_tile(arch: int) -> dict[str, int]:
    """Partial sums and numbers of one step of the kernel that adds the gradients of the weights."""
    return {"BLOCK_P": 8, "BLOCK": 1024} if arch == INTERPRETER else {"BLOCK_P": 32, "BLOCK": 32}


_INTERPRETER_ROWS = 16
_CTAS_PER_SM = 3
_STRIP_OVERHEAD = 8


@remembered
def pooling_mixer_rows(arch: int, columns: int, height: int, half: int, num_sms: int) -> int:
    """The rows of a strip of an image of `height` rows, where `columns` programs run side by side.

    A strip also walks through the `half` rows before and after it: long strips waste less, short
    ones fill the device. The estimate is waves times (rows walked + fixed cost of a program).
    """
    if arch == INTERPRETER:
        return min(height, _INTERPRETER_ROWS)
    best = (float("inf"), height)
    for wanted in range(1, -(-height // 8) + 1):
        rows = -(-height // wanted)
        strips = columns * -(-height // rows)
        waves = -(-strips // (num_sms * _CTAS_PER_SM))
        best = min(best, (waves * (rows + 2 * half + _STRIP_OVERHEAD), rows))
    return best[1]


def pooling_mixer_chunks(strips: int, blocks: int, num_sms: int) -> tuple[int, int]:
    """How to share out a sum over strips for `blocks` channel blocks: (programs, strips each)."""
    wanted = max(1, -(-2 * _CTAS_PER_SM * num_sms // blocks))
    chunk = -(-strips // min(wanted, strips))
    return -(-strips // chunk), chunk


@triton.jit
def _strip(i_strip, rows, H, W, BLOCK_W: tl.constexpr):
    """Image, first row, end of the rows and first column of a strip (columns count fastest)."""
    n_w = tl.cdiv(W, BLOCK_W)
    n_h = tl.cdiv(H, rows)
    i_h = (i_strip // n_w % n_h) * rows
    return (
        (i_strip // (n_w * n_h)).to(tl.int64),
        i_h,
        tl.minimum(i_h + rows, H),
        (i_strip % n_w) * BLOCK_W,
    )


@triton.jit
def _masks(o_w, o_c, W, C, HALF: tl.constexpr, MASK_C: tl.constexpr):
    """Which columns o_w - HALF, ..., o_w + HALF are inside the image: a tuple of masks."""
    m_tiles = ()
    for d in tl.static_range(-HALF, HALF + 1):
        m = ((o_w >= -d) & (o_w < W - d))[:, None]
        if MASK_C:
            m = m & (o_c < C)[None, :]
        m_tiles += (m,)
    return m_tiles


@triton.jit
def _load_row(p_row, o_tile, m_tiles, m_row, stride, HALF: tl.constexpr):
    """The tiles of a row at the shifts -HALF to HALF in fp32, zero outside the image."""
    b_row = ()
    p_row -= HALF * stride
    for d in tl.static_range(2 * HALF + 1):
        b = tl.load(p_row + o_tile, mask=m_tiles[d] & m_row, other=0.0)
        b_row += (b.to(tl.float32),)
        p_row += stride
    return b_row


@triton.jit(do_not_specialize=["H", "W", "C", "rows"])
def _pooling_mixer_conv_kernel(
    p_x, p_weight, p_bias, p_y, stride_xb, stride_xl, stride_y, H, W, C, rows,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, MASK_C: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Grid (strips, channel blocks): the 7x7 convolution, or (no bias) its transpose.

    b_sum[j] is the output row i_row - 3 + j as far as the rows above i_row go.
    """
    i_b, i_h, i_stop, i_w = _strip(tl.program_id(0), rows, H, W, BLOCK_W)
    o_w = i_w + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_zero = tl.zeros([BLOCK_W, 1], tl.int32)
    m_c = o_c < C
    m_x = _masks(o_w, o_c, W, C, 3, MASK_C)
    # Rows above the image would leave the sums as they are.
    i_start = tl.maximum(i_h - 3, 0)
    p_x += i_b * stride_xb + i_start.to(tl.int64) * W * stride_xl
    stride_x_row, stride_y_row = W * stride_xl, W * stride_y
    p_y += (i_b * H + i_start - 3) * stride_y_row
    o_x = o_w[:, None] * stride_xl + o_c[None, :]
    o_y = o_w[:, None] * stride_y + o_c[None, :]

    b_weight = ()
    for t in tl.static_range(49):
        p_tap = p_weight + (48 - t if TRANSPOSED else t) * stride_y + o_c
        b_tap = tl.load(p_tap, mask=m_c, other=0.0) if MASK_C else tl.load(p_tap)
        b_weight += (b_tap.to(tl.float32)[None, :],)
    b_first = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if not TRANSPOSED:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0) if MASK_C else tl.load(p_bias + o_c)
        b_first += b_bias.to(tl.float32)[None, :]

    b_sum = (b_first,) * 6
    for i_row in tl.range(i_start, i_stop + 3):
        b_x = _load_row(p_x, o_x, m_x, i_row + o_zero < H, stride_xl, 3)
        b_old = b_sum
        b_old += (b_first,)
        b_sum = ()
        for j in tl.static_range(7):
            b = b_old[j]
            for d in tl.static_range(7):
                b = tl.fma(b_x[d], b_weight[(6 - j) * 7 + d], b)
            b_sum += (b,)
        if i_row >= i_h + 3:
            tl.store(p_y + o_y, b_sum[0].to(p_y.dtype.element_ty), mask=m_x[3])
        b_sum = b_sum[1:]
        p_x += stride_x_row
        p_y += stride_y_row


@triton.jit
def _inverse_counts(i, n, HALF: tl.constexpr, REACH: tl.constexpr):
    """1 / (how many of j - HALF, ..., j + HALF are in [0, n)) for j = i - REACH, ..., i + REACH.

    A tuple; finite for a j outside too.
    """
    counts = ()
    for d in tl.static_range(-REACH, REACH + 1):
        count = tl.minimum(i + (d + HALF), n - 1) - tl.maximum(i + (d - HALF), 0) + 1
        counts += (1.0 / tl.maximum(count, 1).to(tl.float32),)
    return counts


@triton.jit
def _weighted_sum(b_tiles, b_weights):
    b_sum = b_tiles[0] * b_weights[0]
    for j in tl.static_range(1, len(b_tiles)):
        b_sum = tl.fma(b_tiles[j], b_weights[j], b_sum)
    return b_sum


@triton.jit
def _add_row(b_sums, b_row, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The partial sums after a row that reaches those from FIRST to LAST, which is new."""
    b_result = b_sums[:FIRST]
    for j in tl.static_range(FIRST, LAST):
        b_result += (b_sums[j] + b_row,)
    b_result += (b_row,)
    return b_result


@triton.jit(do_not_specialize=["H", "W", "C", "rows"])
def _pooling_mixer_pool_kernel(
    p_y, p_out, stride_yb, stride_yl, stride_o, H, W, C, rows,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, MASK_C: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Grid (strips, channel blocks): a tile plus its three pools, or plus its transposed pools.

    b_sum_k[j] is the output row i_row - 5 + j as far as the rows above i_row go.
    """
    i_b, i_h, i_stop, i_w = _strip(tl.program_id(0), rows, H, W, BLOCK_W)
    o_w = i_w + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_zero = tl.zeros([BLOCK_W, 1], tl.int32)
    m_y = _masks(o_w, o_c, W, C, 5, MASK_C)
    i_start = tl.maximum(i_h - 5, 0)
    p_y += i_b * stride_yb + i_start.to(tl.int64) * W * stride_yl
    stride_y_row, stride_o_row = W * stride_yl, W * stride_o
    p_out += (i_b * H + i_start - 5) * stride_o_row
    p_centre = p_y - 5 * stride_y_row.to(tl.int64)
    o_y = o_w[:, None] * stride_yl + o_c[None, :]
    o_out = o_w[:, None] * stride_o + o_c[None, :]

    b_zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    # Transposed, counts belong to the pixels that come in, and one tuple of sums serves all pools.
    SHIFTS: tl.constexpr = 1 if TRANSPOSED else 0
    b_count_3 = _inverse_counts(o_w[:, None], W, 1, SHIFTS)
    b_count_7 = _inverse_counts(o_w[:, None], W, 3, 3 * SHIFTS)
    b_count_11 = _inverse_counts(o_w[:, None], W, 5, 5 * SHIFTS)
    b_sum_3, b_sum_7, b_sum_11 = (b_zero,) * 6, (b_zero,) * 8, (b_zero,) * 10
    for i_row in tl.range(i_start, i_stop + 5):
        b_y = _load_row(p_y, o_y, m_y, i_row + o_zero < H, stride_yl, 5)
        if TRANSPOSED:
            b_far = _weighted_sum(b_y, b_count_11) * _inverse_counts(i_row, H, 5, 0)[0]
            b_mid = b_far + _weighted_sum(b_y[2:9], b_count_7) * _inverse_counts(i_row, H, 3, 0)[0]
            b_near = b_mid + _weighted_sum(b_y[4:7], b_count_3) * _inverse_counts(i_row, H, 1, 0)[0]
            b_row = (b_far, b_far, b_mid, b_mid, b_near, b_near + b_y[5])
            b_row += (b_near, b_mid, b_mid, b_far, b_far)
            b_old = b_sum_11
            b_old += (b_zero,)
            b_sum_11 = ()
            for j in tl.static_range(11):
                b_sum_11 += (b_old[j] + b_row[j],)
            b_out = b_sum_11[0]
        else:
            b_3 = b_y[4] + b_y[5] + b_y[6]
            b_7 = b_3 + ((b_y[2] + b_y[3]) + (b_y[7] + b_y[8]))
            b_11 = b_7 + ((b_y[0] + b_y[1]) + (b_y[9] + b_y[10]))
            b_sum_3 = _add_row(b_sum_3, b_3, 4, 6)
            b_sum_7 = _add_row(b_sum_7, b_7, 2, 8)
            b_sum_11 = _add_row(b_sum_11, b_11, 0, 10)
            i_out = i_row - 5
            m_out = m_y[5] & (i_out + o_zero >= i_h)
            b_out = tl.load(p_centre + o_y, mask=m_out, other=0.0).to(tl.float32)
            b_out += b_sum_3[0] * (b_count_3[0] * _inverse_counts(i_out, H, 1, 0)[0])
            b_out += b_sum_7[0] * (b_count_7[0] * _inverse_counts(i_out, H, 3, 0)[0])
            b_out += b_sum_11[0] * (b_count_11[0] * _inverse_counts(i_out, H, 5, 0)[0])
            b_sum_3, b_sum_7 = b_sum_3[1:], b_sum_7[1:]
        if i_row >= i_h + 5:
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_y[5])
        b_sum_11 = b_sum_11[1:]
        p_y += stride_y_row
        p_centre += stride_y_row
        p_out += stride_o_row


@triton.jit(do_not_specialize=["H", "W", "C", "rows", "strips", "chunk"])
def _pooling_mixer_dweight_kernel(
    p_x, p_dy, p_partial, stride_xb, stride_xl, stride_y, H, W, C, rows, strips, chunk,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, MASK_C: tl.constexpr,
):  # fmt: skip
    """Grid (programs, channel blocks): dweight and, last of the 50 sums, dbias of `chunk` strips.

    b_dy holds the rows i_row - 3 to i_row + 3 of dy that belong to the strip, zero for the others.
    """
    i_p = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_zero = tl.zeros([BLOCK_W, 1], tl.int32)
    b_zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    stride_x_row, stride_y_row = W * stride_xl, W * stride_y
    b_sum = (b_zero,) * 50
    for i_strip in tl.range(i_p * chunk, tl.minimum((i_p + 1) * chunk, strips)):
        i_b, i_h, i_stop, i_w = _strip(i_strip, rows, H, W, BLOCK_W)
        o_w = i_w + tl.arange(0, BLOCK_W)
        m_x = _masks(o_w, o_c, W, C, 3, MASK_C)
        o_x = o_w[:, None] * stride_xl + o_c[None, :]
        o_dy = o_w[:, None] * stride_y + o_c[None, :]
        p_row = p_x + i_b * stride_xb + (i_h - 3).to(tl.int64) * stride_x_row
        p_dy_row = p_dy + (i_b * H + i_h) * stride_y_row
        b_dy = (b_zero,) * 6
        for i_row in tl.range(i_h - 3, i_stop + 3):
            o_row = i_row + o_zero
            m_dy = m_x[3] & (o_row < i_stop - 3)
            b_dy += (tl.load(p_dy_row + o_dy, mask=m_dy, other=0.0),)
            b_x = _load_row(p_row, o_x, m_x, (o_row >= 0) & (o_row < H), stride_xl, 3)
            b_old = b_sum
            b_sum = ()
            for t in tl.static_range(49):
                b_sum += (tl.fma(b_dy[6 - t // 7], b_x[t % 7], b_old[t]),)
            b_sum += (b_old[49] + b_dy[6],)
            b_dy = b_dy[1:]
            p_row += stride_x_row
            p_dy_row += stride_y_row
    p_partial += i_p.to(tl.int64) * 50 * C + o_c
    for t in tl.static_range(50):
        tl.store(p_partial + t * C, tl.sum(b_sum[t], axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=["C", "programs"])
def _pooling_mixer_reduce_kernel(
    p_partial, p_dweight, p_dbias, C, programs, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (blocks of 50 C,): the sum of partials [programs, 50, C], always in the same order.

    dweight is [C, 49]; the last row of the 50 is dbias.
    """
    o_p = tl.arange(0, BLOCK_P)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < 50 * C
    b_sum = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for i_p in tl.range(0, programs, BLOCK_P):
        b_sum += load_tile(p_partial, o_p, o, 50 * C, o_p < programs - i_p, m, True, True)
        p_partial += BLOCK_P * 50 * C
    b = tl.sum(b_sum, axis=0)
    o_t, o_c = o // C, o % C
    tl.store(p_dweight + o_c * 49 + o_t, b.to(p_dweight.dtype.element_ty), mask=m & (o_t < 49))
    tl.store(p_dbias + o_c, b.to(p_dbias.dtype.element_ty), mask=m & (o_t == 49))


@remembered
def _blocks(channels: int, tile: Tile) -> dict:
    return {**tile.blocks, "MASK_C": channels % tile.block_c != 0}


def _walk(x: torch.Tensor, height: int, width: int, tile: Tile, half: int):
    """(strips, channel blocks, rows of a strip) of a kernel that reaches `half` rows beyond."""
    batch, _, channels = x.shape
    arch, num_sms = device_facts(x.device)
    across = batch * cdiv(width, tile.block_w)
    blocks = cdiv(channels, tile.block_c)
    rows = pooling_mixer_rows(arch, across * blocks, height, half, num_sms)
    return across * cdiv(height, rows), blocks, rows


def _convolve(
    x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
    height: int, width: int,
) -> torch.Tensor:  # fmt: skip
    """Fill y [B, L, C], contiguous, with the convolution of x, or with no bias its transpose."""
    channels = x.shape[-1]
    tile = pooling_mixer_conv_config(device_facts(x.device)[0], channels)
    strips, blocks, rows = _walk(x, height, width, tile, 3)
    launch(
        _pooling_mixer_conv_kernel, (strips, blocks),
        x, taps, taps if bias is None else bias, y,
        *strides(x), channels, height, width, channels, rows,
        **tile.launch, **_blocks(channels, tile), TRANSPOSED=bias is None,
    )  # fmt: skip
    return y


def _pool(
    y: torch.Tensor, out: torch.Tensor, height: int, width: int, transposed: bool
) -> torch.Tensor:
    """Fill out [B, L, C], contiguous, with y plus its pools, or plus its transposed pools."""
    channels = y.shape[-1]
    tile = pooling_mixer_pool_config(device_facts(y.device)[0], channels)
    strips, blocks, rows = _walk(y, height, width, tile, 5)
    launch(
        _pooling_mixer_pool_kernel, (strips, blocks),
        y, out, *strides(y), channels, height, width, channels, rows,
        **tile.launch, **_blocks(channels, tile), TRANSPOSED=transposed,
    )  # fmt: skip
    return out


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """[C, 1, 7, 7] -> [49, C], contiguous: read in the order of the channels by every program."""
    return weight.flatten(1).t().contiguous()


def pooling_mixer_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """The pooling mixer of x [B, height * width, C] with weight [C, 1, 7, 7] and bias [C].

    One dtype, fp32, fp16 or bf16. Returns [B, L, C], contiguous. An x whose last stride is not 1 is
    copied; the weights (a few hundred kilobytes at most) always are.
    """
    out = empty_like(x)
    if out.numel() == 0:
        return out
    x = last_dim_contiguous(x)
    y = _convolve(x, _taps(weight), bias.contiguous(), empty_like(x, torch.float32), height, width)
    return _pool(y, out, height, width, transposed=False)


def pooling_mixer_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, height: int, width: int,
    needs_dx: bool, needs_dweight: bool, needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `pooling_mixer_fwd` for grad_out [B, L, C] (any strides).

    Returns dx, dweight, dbias, contiguous, in the dtypes of x and weight; those not needed are
    empty, [0]. dweight and dbias share one kernel: needing one of them costs as much as both.
    """
    channels = x.shape[-1]
    dx, dweight = empty_gradient(x, needs_dx), empty_gradient(weight, needs_dweight)
    dbias = weight.new_empty(channels if needs_dbias else 0)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    if not (needs_dx or needs_dweight or needs_dbias):
        return dx, dweight, dbias
    x, grad_out = last_dim_contiguous(x), last_dim_contiguous(grad_out)
    dy = _pool(grad_out, empty_like(x, torch.float32), height, width, transposed=True)
    if needs_dx:
        _convolve(dy, _taps(weight), None, dx, height, width)
    if needs_dweight or needs_dbias:
        arch, num_sms = device_facts(x.device)
        tile = pooling_mixer_dweight_config(arch, channels)
        strips, blocks, rows = _walk(x, height, width, tile, 3)
        programs, chunk = pooling_mixer_chunks(strips, blocks, num_sms)
        partial = x.new_empty((programs, _TAPS + 1, channels), dtype=torch.float32)
        launch(
            _pooling_mixer_dweight_kernel, (programs, blocks),
            x, dy, partial, *strides(x), channels, height, width, channels, rows, strips, chunk,
            **tile.launch, **_blocks(channels, tile),
        )  # fmt: skip
        reduce_tile = pooling_mixer_reduce_tile(arch)
        whole_dweight = dweight if needs_dweight else empty_like(weight)
        whole_dbias = dbias if needs_dbias else weight.new_empty(channels)
        launch(
            _pooling_mixer_reduce_kernel, (cdiv((_TAPS + 1) * channels, reduce_tile["BLOCK"]),),
            partial, whole_dweight, whole_dbias, channels, programs,
            num_warps=4, num_stages=1, **reduce_tile,
        )  # fmt: skip
    return dx, dweight, dbias


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples of
    unaligned ones."""
    # 256 and 160 channels fill tiles of 64 and of 32, 33 leave a ragged one. The computation does
    # not depend on the dtype, so that the others need fewer examples.
    for dtype, widths, aligned in (
        ("bf16", (256, 160), None), ("fp16", (256,), None), ("fp32", (256,), None),
        ("bf16", (33,), ()), ("fp32", (33,), ()),
    ):  # fmt: skip
        for channels in widths:
            case = f"{dtype} C{channels}"
            outer = dict.fromkeys(("p_x", "p_weight", "p_bias"), dtype) | {"p_y": "fp32"}
            inner = {"p_x": "fp32", "p_weight": dtype, "p_bias": dtype, "p_y": dtype}
            pools = {"p_y": "fp32", "p_out": dtype}, {"p_y": dtype, "p_out": "fp32"}
            sums = {"p_x": dtype, "p_dy": "fp32", "p_partial": "fp32"}
            conv = pooling_mixer_conv_config(arch, channels)
            pool = pooling_mixer_pool_config(arch, channels)
            for transposed in (False, True):
                for kernel, tile, pointers in (
                    (_pooling_mixer_conv_kernel, conv, inner if transposed else outer),
                    (_pooling_mixer_pool_kernel, pool, pools[transposed]),
                ):
                    yield offline_entry(
                        kernel, case + (" transposed" if transposed else ""), pointers,
                        _blocks(channels, tile) | {"TRANSPOSED": transposed}, **tile.launch,
                        aligned=aligned,
                    )  # fmt: skip
            tile = pooling_mixer_dweight_config(arch, channels)
            yield offline_entry(
                _pooling_mixer_dweight_kernel, case, sums, _blocks(channels, tile),
                **tile.launch, aligned=aligned,
            )  # fmt: skip
        yield offline_entry(
            _pooling_mixer_reduce_kernel, dtype,
            {"p_partial": "fp32", "p_dweight": dtype, "p_dbias": dtype},
            pooling_mixer_reduce_tile(arch), 4, 1, aligned=aligned,
        )  # fmt: skip

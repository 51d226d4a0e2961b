"""Leave-one-out maximum of self-gated modalities (query hub), for all primaries at once.

    z_m = bias_m + sum over taps and channels of weight_m x_m,   s_m = sigmoid(z_m)
    t_m = (1 + s_m) x_m,   out_i = max over present m != i of t_m  (zero where there is none)

Layout. x [M, B, L, C] with any strides but a last one of 1, L = H W. The score net, a depthwise 3x3
convolution followed by a 1x1 convolution to one channel, is linear: it comes merged, weight
[M, 9, C] and bias [M] in fp32.

One pass serves every primary: out_i is the largest t, or the second largest where i itself holds
the largest. A byte per token and channel (winner in the low half, runner-up in the high half, 15
for none) is all that is kept of the maximum. Comparisons see fp32 values before rounding, in
ascending order of the modalities and strictly: a tie belongs to the lowest one. NaN counts as the
largest, so that it propagates.

Saved for the backward: x, s [M, B, L] fp32 and the winners [B, L, C] uint8. s is one number per
token, far less than what computing it again would read. With g_m the sum of grad_out_i over the
primaries i whose value came from m, the gradients are
    dz_m = s_m (1 - s_m) sum_c g_m x_m
    dx_m = (1 + s_m) g_m + transposed convolution of dz_m   (nine scalars per token)
    dweight_m[tap] = sum over tokens of x_m times the shifted dz_m
Every source gathers, and sums over tokens are partial sums of programs, added in a fixed order: no
atomics, bit-identical repeats.

Work. Forward: about 25 FLOP per element; x is read and out written once (for C > 128 a row of
channels no longer fits the registers of a tile: scores have a kernel of their own, x is read
twice). Backward: about 50 FLOP per element; grad_out and x are read twice, dx is written once.

An absent modality (present [M, B] false) is never read and its gradients are exactly zero.
Limits. M <= 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from equiseg_fast.kernels._arch import (
    INTERPRETER,
    Tile,
    architecture,
    channel_block,
    is_odd,
    power_of_two,
    token_chunks,
)
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

QUERY_HUB_MODALITIES = 8
"""The most modalities: a byte holds two of them."""


def _map_tile(tokens: int, block_c: int, num_warps: int) -> Tile:
    """Square, or twice as wide as high: the fewest neighbours outside."""
    block_h = 1 << (tokens.bit_length() - 1) // 2
    return Tile(block_h=block_h, block_w=tokens // block_h, block_c=block_c, num_warps=num_warps)


def _warps(arch: int, itemsize: int, channels: int) -> int:
    """Warps of a tile: twice as many where loads in flight take the registers."""
    return 8 if itemsize == 4 or is_odd(channels) or architecture(arch).number >= 100 else 4


def _elements(channels: int) -> int:
    """Tokens times channels of a tile."""
    if channels < 16:  # nearly all of a tile is padding
        return 256
    return 1024 if is_odd(channels) else 2048


def query_hub_max_registers(arch: int) -> int | None:
    """Registers per thread that the kernels may take; None leaves it to the compiler."""
    return 255 if architecture(arch).spills_for_occupancy else None


@tunable
def query_hub_fwd_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Tiles of the forward kernel.

    Up to 128 channels they hold all of them and compute the scores too. Beyond, they stream blocks
    of channels, and the scores come from a kernel with the tiles of `query_hub_score_config`.
    """
    if channels > 128:
        return query_hub_score_config(arch, itemsize, channels)
    if arch == INTERPRETER:
        return Tile(block_h=8, block_w=16, block_c=power_of_two(channels), num_warps=4)
    block_c = max(16, power_of_two(channels))
    return _map_tile(_elements(channels) // block_c, block_c, _warps(arch, itemsize, channels))


@tunable
def query_hub_score_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Tiles of the kernel that computes scores alone."""
    if arch == INTERPRETER:
        return Tile(block_h=8, block_w=16, block_c=128, num_warps=4)
    block_c = channel_block(channels)
    return _map_tile(_elements(channels) // block_c, block_c, _warps(arch, itemsize, channels))


@tunable
def query_hub_bwd_score_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Tiles of the backward kernel that sums over channels; the loop runs over them."""
    if arch == INTERPRETER:
        return Tile(block_l=128, block_c=128, num_warps=4)
    block_c = channel_block(channels)
    # Before sm_90 the compiler spills even with half of the other tiles.
    halves = 2 if is_odd(channels) and architecture(arch).number < 90 else 1
    return Tile(
        block_l=_elements(channels) // halves // block_c,
        block_c=block_c,
        num_warps=_warps(arch, itemsize, channels),
    )


@tunable
def query_hub_dx_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Tiles of the kernel for dx."""
    return query_hub_bwd_score_config(arch, itemsize, channels)


@tunable
def query_hub_dweight_config(arch: int, itemsize: int, channels: int) -> Tile:
    """Tiles of the kernel for dweight; the loop runs over tokens, nine sums stay in registers."""
    if arch == INTERPRETER:
        return Tile(block_l=64, block_c=128, num_warps=4)
    block_c = channel_block(channels)
    return Tile(block_l=_elements(channels) // 2 // block_c, block_c=block_c, num_warps=4)


@triton.jit
def _load_flag(p_present, i_row, HAS_PRESENT: tl.constexpr):
    """Whether a modality is present, as an integer."""
    if HAS_PRESENT:
        flag = tl.load(p_present + i_row).to(tl.int32)
    else:
        flag = 1
    return flag


@triton.jit
def _convolve(
    p_x, p_weight, o_h, o_w, o_tile, o_c, m_c, stride_xl, H, W,
    CHANNELS: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Products with the nine taps, summed over taps but not over channels.

    p_x points at the first token of the tile, o_tile counts tokens from there; o_h and o_w are rows
    and columns.
    """
    b_sum = tl.zeros([o_tile.shape[0], o_c.shape[0]], tl.float32)
    for i_h in tl.static_range(3):
        for i_w in tl.static_range(3):
            o_row, o_col = o_h + (i_h - 1), o_w + (i_w - 1)
            m_l = (o_row >= 0) & (o_row < H) & (o_col >= 0) & (o_col < W)
            o_tap = o_tile + ((i_h - 1) * W + (i_w - 1))
            b_x = load_tile(p_x, o_tap, o_c, stride_xl, m_l, m_c, True, PAD_C).to(tl.float32)
            p_tap = p_weight + (i_h * 3 + i_w) * CHANNELS + o_c
            b_weight = tl.load(p_tap, mask=m_c, other=0.0) if PAD_C else tl.load(p_tap)
            b_sum += b_x * b_weight[None, :]
    return b_sum


@triton.jit
def _sigmoid(b_z):
    LOG2_E: tl.constexpr = 1.4426950408889634
    return 1.0 / (1.0 + tl.math.exp2(b_z * -LOG2_E))


@triton.jit
def _tile_of_tokens(i_tile, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """First row and column of a two-dimensional tile; row, column and index of all its tokens."""
    n_w = tl.cdiv(W, BLOCK_W)
    o = tl.arange(0, BLOCK_H * BLOCK_W)
    i_h, i_w = (i_tile // n_w) * BLOCK_H, (i_tile % n_w) * BLOCK_W
    return i_h, i_w, i_h + o // BLOCK_W, i_w + o % BLOCK_W, (o // BLOCK_W) * W + o % BLOCK_W


@triton.jit(do_not_specialize=["B", "H", "W"])
def _query_hub_score_kernel(
    p_x, p_weight, p_bias, p_present, p_score, stride_xm, stride_xb, stride_xl, B, H, W,
    CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * M * B,): the score of one tile, with a loop over blocks of channels."""
    PAD_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    n_tiles = tl.cdiv(H, BLOCK_H) * tl.cdiv(W, BLOCK_W)
    i_row = tl.program_id(0) // n_tiles
    i_m, i_b = i_row // B, (i_row % B).to(tl.int64)
    i_h, i_w, o_h, o_w, o_tile = _tile_of_tokens(tl.program_id(0) % n_tiles, W, BLOCK_H, BLOCK_W)
    i_first = i_h.to(tl.int64) * W + i_w
    p_x += i_m.to(tl.int64) * stride_xm + i_b * stride_xb + i_first * stride_xl
    p_weight += i_m * 9 * CHANNELS
    b_score = tl.zeros([BLOCK_H * BLOCK_W], tl.float32)
    if _load_flag(p_present, i_row, HAS_PRESENT) != 0:
        b_sum = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
        for i_c in tl.range(0, CHANNELS, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            m_c = o_c < CHANNELS
            b_sum += _convolve(
                p_x, p_weight, o_h, o_w, o_tile, o_c, m_c, stride_xl, H, W, CHANNELS, PAD_C
            )
        b_score = _sigmoid(tl.sum(b_sum, 1) + tl.load(p_bias + i_m))
    p_score += i_row.to(tl.int64) * H * W + i_first
    tl.store(p_score + o_tile, b_score, mask=(o_h < H) & (o_w < W))


@triton.jit(do_not_specialize=["M", "B", "H", "W"])
def _query_hub_fwd_kernel(
    p_x, p_weight, p_bias, p_present, p_out, p_score, p_winner,
    stride_xm, stride_xb, stride_xl, M, B, H, W,
    CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    SCORES: tl.constexpr, SAVE: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * tiles * B,): all modalities and all primaries of one tile.

    SCORES: compute the scores here, from a tile with all channels, and store them if SAVE; else
    load them.
    """
    PAD_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    n_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    n_tiles = tl.cdiv(H, BLOCK_H) * tl.cdiv(W, BLOCK_W)
    i_tile = tl.program_id(0) // n_c
    i_b = (i_tile // n_tiles).to(tl.int64)
    i_h, i_w, o_h, o_w, o_tile = _tile_of_tokens(i_tile % n_tiles, W, BLOCK_H, BLOCK_W)
    i_first = i_h.to(tl.int64) * W + i_w
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_l, m_c = (o_h < H) & (o_w < W), o_c < CHANNELS
    n_l = H.to(tl.int64) * W
    p_x += i_b * stride_xb + i_first * stride_xl
    p_score += i_b * n_l + i_first
    i_out = (i_b * n_l + i_first) * CHANNELS
    o_out = o_tile[:, None] * CHANNELS + o_c[None, :]

    b_top = tl.full([BLOCK_H * BLOCK_W, BLOCK_C], -float("inf"), tl.float32)
    b_second = b_top
    b_who = tl.full([BLOCK_H * BLOCK_W, BLOCK_C], 255, tl.int32)
    n_present = 0
    for i_m in tl.range(0, M):
        flag = _load_flag(p_present, i_m * B + i_b, HAS_PRESENT)
        n_present += flag
        if flag != 0:
            if SCORES:
                b_sum = _convolve(
                    p_x, p_weight, o_h, o_w, o_tile, o_c, m_c, stride_xl, H, W, CHANNELS, PAD_C
                )
                b_score = _sigmoid(tl.sum(b_sum, 1) + tl.load(p_bias + i_m))
                if SAVE:
                    tl.store(p_score + o_tile, b_score, mask=m_l)
            else:
                b_score = tl.load(p_score + o_tile, mask=m_l, other=0.0)
            # Loaded again after the convolution: cheaper than holding it in registers.
            b_x = load_tile(p_x, o_tile, o_c, stride_xl, m_l, m_c, True, PAD_C).to(tl.float32)
            b_t = b_x + b_x * b_score[:, None]
            m_top = (b_t > b_top) | (b_t != b_t)
            m_second = b_t > b_second
            b_who = tl.where(
                m_top,
                ((b_who & 15) << 4) | i_m,
                tl.where(m_second, (b_who & 15) | (i_m << 4), b_who),
            )
            b_second = tl.where(m_top, b_top, tl.where(m_second, b_t, b_second))
            b_top = tl.where(m_top, b_t, b_top)
        elif SCORES and SAVE:
            tl.store(p_score + o_tile, tl.zeros([BLOCK_H * BLOCK_W], tl.float32), mask=m_l)
        p_x += stride_xm
        p_weight += 9 * CHANNELS
        p_score += B * n_l

    m_out = m_l[:, None] & m_c[None, :]
    if SAVE:
        tl.store(p_winner + i_out + o_out, b_who.to(tl.uint8), mask=m_out)
    p_out += i_out
    for i_m in tl.range(0, M):
        n_others = n_present - _load_flag(p_present, i_m * B + i_b, HAS_PRESENT)
        b_out = tl.where((b_who & 15) == i_m, b_second, b_top)
        b_out = tl.where(n_others > 0, b_out, 0.0)
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
        p_out += B * n_l * CHANNELS


@triton.jit
def _collect(
    p_grad, p_winner, o_l, o_c, m_l, m_c, stride_gm, stride_gl, M,
    CHANNELS: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """Who supplied the values and what flows back: winner, its gradient, runner-up, its gradient.

    The winner serves all primaries but itself, the runner-up serves the winner.
    """
    b_who = load_tile(p_winner, o_l, o_c, CHANNELS, m_l, m_c, True, PAD_C).to(tl.int32)
    b_winner, b_runner = b_who & 15, b_who >> 4
    b_gw = tl.zeros([o_l.shape[0], o_c.shape[0]], tl.float32)
    b_gr = b_gw
    for i_m in tl.range(0, M):
        b_g = load_tile(p_grad, o_l, o_c, stride_gl, m_l, m_c, True, PAD_C).to(tl.float32)
        m_self = b_winner == i_m
        b_gw += tl.where(m_self, 0.0, b_g)
        b_gr = tl.where(m_self, b_g, b_gr)
        p_grad += stride_gm
    return b_winner, b_gw, b_runner, b_gr


@triton.jit
def _route(b_winner, b_gw, b_runner, b_gr, i_m):
    """The gradient of t of one modality, [tokens, channels]."""
    return tl.where(b_winner == i_m, b_gw, tl.where(b_runner == i_m, b_gr, 0.0))


@triton.jit(do_not_specialize=["M", "B", "L"])
def _query_hub_bwd_score_kernel(
    p_grad, p_x, p_present, p_score, p_winner, p_dz,
    stride_gm, stride_gb, stride_gl, stride_xm, stride_xb, stride_xl, M, B, L,
    CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, MAX_M: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks * B,): dz of all modalities, so that grad_out is read once for all."""
    PAD_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    n_l = tl.cdiv(L, BLOCK_L)
    i_b = (tl.program_id(0) // n_l).to(tl.int64)
    i_l = (tl.program_id(0) % n_l).to(tl.int64) * BLOCK_L
    o_l, o_m = tl.arange(0, BLOCK_L), tl.arange(0, MAX_M)
    m_l = o_l < L - i_l
    p_grad += i_b * stride_gb + i_l * stride_gl
    p_x += i_b * stride_xb + i_l * stride_xl
    p_winner += (i_b * L + i_l) * CHANNELS
    b_dot = tl.zeros([BLOCK_L, MAX_M], tl.float32)
    for i_c in tl.range(0, CHANNELS, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < CHANNELS
        b_winner, b_gw, b_runner, b_gr = _collect(
            p_grad, p_winner, o_l, o_c, m_l, m_c, stride_gm, stride_gl, M, CHANNELS, PAD_C
        )
        p_xm = p_x
        for i_m in tl.range(0, M):
            if _load_flag(p_present, i_m * B + i_b, HAS_PRESENT) != 0:
                b_x = load_tile(p_xm, o_l, o_c, stride_xl, m_l, m_c, True, PAD_C).to(tl.float32)
                b_product = tl.sum(_route(b_winner, b_gw, b_runner, b_gr, i_m) * b_x, 1)
                b_dot += tl.where(o_m[None, :] == i_m, b_product[:, None], 0.0)
            p_xm += stride_xm
    o_z = o_m[None, :].to(tl.int64) * (B * L.to(tl.int64)) + (i_b * L + i_l) + o_l[:, None]
    m_z = m_l[:, None] & (o_m < M)[None, :]
    b_score = tl.load(p_score + o_z, mask=m_z, other=0.0)
    tl.store(p_dz + o_z, b_dot * (b_score * (1.0 - b_score)), mask=m_z)


@triton.jit
def _shifted_dz(p_dz, o_l, o_row, o_col, m_l, i_h: tl.constexpr, i_w: tl.constexpr, H, W):
    """dz of the token whose score saw this one through tap (i_h, i_w); zero outside the image."""
    o_h, o_w = o_row - (i_h - 1), o_col - (i_w - 1)
    m = m_l & (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W)
    return tl.load(p_dz + (o_l - ((i_h - 1) * W + (i_w - 1))), mask=m, other=0.0)


@triton.jit(do_not_specialize=["M", "B", "H", "W"])
def _query_hub_bwd_dx_kernel(
    p_grad, p_weight, p_present, p_score, p_winner, p_dz, p_dx,
    stride_gm, stride_gb, stride_gl, M, B, H, W,
    CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * token blocks * B,): dx of all modalities."""
    PAD_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    n_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    L = H * W
    n_l = tl.cdiv(L, BLOCK_L)
    i_tile = tl.program_id(0) // n_c
    i_b = (i_tile // n_l).to(tl.int64)
    i_l = (i_tile % n_l) * BLOCK_L
    o_l, o_c = tl.arange(0, BLOCK_L), (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_l, m_c = o_l < L - i_l, o_c < CHANNELS
    o_row, o_col = (i_l + o_l) // W, (i_l + o_l) % W
    i_first = i_b * L + i_l
    p_grad += i_b * stride_gb + i_l.to(tl.int64) * stride_gl
    p_winner += i_first * CHANNELS
    p_score += i_first
    p_dz += i_first
    p_dx += i_first * CHANNELS
    b_winner, b_gw, b_runner, b_gr = _collect(
        p_grad, p_winner, o_l, o_c, m_l, m_c, stride_gm, stride_gl, M, CHANNELS, PAD_C
    )
    n_row = B * L.to(tl.int64)
    m_out = m_l[:, None] & m_c[None, :]
    for i_m in tl.range(0, M):
        b_dx = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        if _load_flag(p_present, i_m * B + i_b, HAS_PRESENT) != 0:
            b_score = tl.load(p_score + o_l, mask=m_l, other=0.0)
            b_g = _route(b_winner, b_gw, b_runner, b_gr, i_m)
            b_dx = b_g + b_g * b_score[:, None]
            for i_h in tl.static_range(3):
                for i_w in tl.static_range(3):
                    b_dz = _shifted_dz(p_dz, o_l, o_row, o_col, m_l, i_h, i_w, H, W)
                    p_tap = p_weight + (i_h * 3 + i_w) * CHANNELS + o_c
                    b_weight = tl.load(p_tap, mask=m_c, other=0.0) if PAD_C else tl.load(p_tap)
                    b_dx += b_dz[:, None] * b_weight[None, :]
        tl.store(
            p_dx + o_l[:, None] * CHANNELS + o_c[None, :],
            b_dx.to(p_dx.dtype.element_ty),
            mask=m_out,
        )
        p_weight += 9 * CHANNELS
        p_score += n_row
        p_dz += n_row
        p_dx += n_row * CHANNELS


@triton.jit
def _add_row_of_taps(b_0, b_1, b_2, b_x, p_dz, o_l, o_row, o_col, m_l, i_h: tl.constexpr, H, W):
    b_0 += b_x * _shifted_dz(p_dz, o_l, o_row, o_col, m_l, i_h, 0, H, W)[:, None]
    b_1 += b_x * _shifted_dz(p_dz, o_l, o_row, o_col, m_l, i_h, 1, H, W)[:, None]
    b_2 += b_x * _shifted_dz(p_dz, o_l, o_row, o_col, m_l, i_h, 2, H, W)[:, None]
    return b_0, b_1, b_2


@triton.jit
def _store_row_of_taps(p_tap, b_0, b_1, b_2, o_c, m_c, CHANNELS: tl.constexpr):
    tl.store(p_tap + o_c, tl.sum(b_0, 0), mask=m_c)
    tl.store(p_tap + CHANNELS + o_c, tl.sum(b_1, 0), mask=m_c)
    tl.store(p_tap + 2 * CHANNELS + o_c, tl.sum(b_2, 0), mask=m_c)


@triton.jit(do_not_specialize=["M", "B", "H", "W", "chunk"])
def _query_hub_bwd_dweight_kernel(
    p_x, p_present, p_dz, p_partial, stride_xm, stride_xb, stride_xl, M, B, H, W, chunk,
    CHANNELS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * M, chunks): partial dweight [chunks, M, 9, C] of `chunk` token blocks.

    The nine sums stay in registers, for each token of a small block apart until the very end.
    """
    PAD_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    n_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i_m = tl.program_id(0) // n_c
    o_l, o_c = tl.arange(0, BLOCK_L), (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < CHANNELS
    L = H * W
    n_l = tl.cdiv(L, BLOCK_L)
    i_start = tl.program_id(1) * chunk
    p_x += i_m.to(tl.int64) * stride_xm
    b_zero = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    b_0, b_1, b_2, b_3, b_4 = b_zero, b_zero, b_zero, b_zero, b_zero
    b_5, b_6, b_7, b_8 = b_zero, b_zero, b_zero, b_zero
    for i in tl.range(i_start, tl.minimum(i_start + chunk, n_l * B)):
        i_row = i_m * B + i // n_l
        if _load_flag(p_present, i_row, HAS_PRESENT) != 0:
            i_l = (i % n_l) * BLOCK_L
            m_l = o_l < L - i_l
            o_row, o_col = (i_l + o_l) // W, (i_l + o_l) % W
            p_tile = p_x + (i // n_l).to(tl.int64) * stride_xb + i_l.to(tl.int64) * stride_xl
            p_z = p_dz + i_row.to(tl.int64) * L + i_l
            b_x = load_tile(p_tile, o_l, o_c, stride_xl, m_l, m_c, True, PAD_C).to(tl.float32)
            b_0, b_1, b_2 = _add_row_of_taps(
                b_0, b_1, b_2, b_x, p_z, o_l, o_row, o_col, m_l, 0, H, W
            )
            b_3, b_4, b_5 = _add_row_of_taps(
                b_3, b_4, b_5, b_x, p_z, o_l, o_row, o_col, m_l, 1, H, W
            )
            b_6, b_7, b_8 = _add_row_of_taps(
                b_6, b_7, b_8, b_x, p_z, o_l, o_row, o_col, m_l, 2, H, W
            )
    p_partial += (tl.program_id(1).to(tl.int64) * M + i_m) * 9 * CHANNELS
    _store_row_of_taps(p_partial, b_0, b_1, b_2, o_c, m_c, CHANNELS)
    _store_row_of_taps(p_partial + 3 * CHANNELS, b_3, b_4, b_5, o_c, m_c, CHANNELS)
    _store_row_of_taps(p_partial + 6 * CHANNELS, b_6, b_7, b_8, o_c, m_c, CHANNELS)


def _flags(present: Tensor | None, anything: Tensor) -> Tensor:
    """present [M, B] as bytes; without it any tensor, which is not read."""
    return anything if present is None else present.contiguous().view(torch.uint8)


def _tiles(tile: Tile, height: int, width: int) -> int:
    """How many cover a map."""
    return cdiv(height, tile.block_h) * cdiv(width, tile.block_w)


def _constexprs(tile: Tile, channels: int, has_present: bool, **more: Any) -> dict[str, Any]:
    return {"CHANNELS": channels, "HAS_PRESENT": has_present, **tile.blocks, **more}


@remembered
def _options(
    arch: int, tile: Tile, channels: int, has_present: bool, **more: Any
) -> dict[str, Any]:
    constexprs = _constexprs(tile, channels, has_present, **more)
    return {**tile.launch, "max_registers": query_hub_max_registers(arch), **constexprs}


def query_hub_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, present: Tensor | None, height: int, width: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Hubs of x [M, B, L, C] (fp32, fp16 or bf16) with merged score nets, fp32.

    weight [M, 9, C], bias [M], present [M, B] bool or None. Returns out [M, B, L, C], contiguous,
    in the dtype of x, and with `save` what the backward needs: scores [M, B, L] fp32 (0 where
    absent) and winners [B, L, C] uint8; else two empty tensors [0]. x is copied if its last stride
    is not 1.
    """
    modalities, batch, tokens, channels = x.shape
    arch, _ = device_facts(x.device)
    itemsize = x.element_size()
    tile = query_hub_fwd_config(arch, itemsize, channels)
    inside = tile.block_c >= channels
    kept = (modalities, batch, tokens) if save or not inside else (0,)
    out = empty_like(x)
    score = x.new_empty(kept, dtype=torch.float32)
    winner = x.new_empty((batch, tokens, channels) if save else 0, dtype=torch.uint8)
    if out.numel() > 0:
        x, weight, bias = last_dim_contiguous(x), weight.contiguous(), bias.contiguous()
        flags, has_present = _flags(present, bias), present is not None
        if not inside:
            scores = query_hub_score_config(arch, itemsize, channels)
            launch(
                _query_hub_score_kernel, (_tiles(scores, height, width) * modalities * batch,),
                x, weight, bias, flags, score, *strides(x), batch, height, width,
                **_options(arch, scores, channels, has_present),
            )  # fmt: skip
        programs = cdiv(channels, tile.block_c) * _tiles(tile, height, width) * batch
        launch(
            _query_hub_fwd_kernel, (programs,),
            x, weight, bias, flags, out, score, winner, *strides(x),
            modalities, batch, height, width,
            **_options(arch, tile, channels, has_present, SCORES=inside, SAVE=save),
        )  # fmt: skip
    return out, score if save else score.new_empty(0), winner


def query_hub_bwd(
    grad_out: Tensor, x: Tensor, weight: Tensor, present: Tensor | None, score: Tensor,
    winner: Tensor, height: int, width: int, needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `query_hub_fwd` for grad_out [M, B, L, C] from what it saved.

    Returns dx [M, B, L, C] in the dtype of x, dweight [M, 9, C] and dbias [M] in fp32, contiguous;
    those not needed are empty, [0] (dweight and dbias come together).
    """
    modalities, batch, tokens, channels = x.shape
    dx = empty_gradient(x, needs_dx)
    if x.numel() == 0 or not (needs_dx or needs_dw):
        shapes = (weight.shape, modalities) if needs_dw else (0, 0)
        return dx, *(weight.new_zeros(shape) for shape in shapes)
    x, grad_out = last_dim_contiguous(x), last_dim_contiguous(grad_out)
    weight, score, winner = weight.contiguous(), score.contiguous(), winner.contiguous()
    flags, has_present = _flags(present, weight), present is not None
    arch, num_sms = device_facts(x.device)
    itemsize = x.element_size()

    dz = empty_like(score)
    tile = query_hub_bwd_score_config(arch, itemsize, channels)
    launch(
        _query_hub_bwd_score_kernel, (cdiv(tokens, tile.block_l) * batch,),
        grad_out, x, flags, score, winner, dz, *strides(grad_out), *strides(x),
        modalities, batch, tokens, **_options(arch, tile, channels, has_present, **_BWD_SCORE),
    )  # fmt: skip
    if needs_dx:
        tile = query_hub_dx_config(arch, itemsize, channels)
        programs = cdiv(channels, tile.block_c) * cdiv(tokens, tile.block_l) * batch
        launch(
            _query_hub_bwd_dx_kernel, (programs,),
            grad_out, weight, flags, score, winner, dz, dx, *strides(grad_out),
            modalities, batch, height, width, **_options(arch, tile, channels, has_present),
        )  # fmt: skip
    if needs_dw:
        tile = query_hub_dweight_config(arch, itemsize, channels)
        programs = cdiv(channels, tile.block_c) * modalities
        blocks = cdiv(tokens, tile.block_l) * batch
        chunks, chunk = token_chunks(programs, blocks, num_sms)
        partial = weight.new_empty((chunks, *weight.shape))
        launch(
            _query_hub_bwd_dweight_kernel, (programs, chunks),
            x, flags, dz, partial, *strides(x), modalities, batch, height, width, chunk,
            **_options(arch, tile, channels, has_present),
        )  # fmt: skip
        return dx, partial.sum(0), dz.sum((1, 2))
    return dx, weight.new_empty(0), weight.new_empty(0)


_BWD_SCORE = {"MAX_M": QUERY_HUB_MODALITIES}

# 320 stands for all multiples of 64 beyond 128, 33 and 129 are examples of padding. fp16 has the
# tiles and instructions of bf16. Without `present` a kernel is the same less a branch.
_OFFLINE = (
    ("bf16", (32, 64, 128, 160, 320), (False, True), None),
    ("fp16", (64,), (True,), None),
    ("fp32", (32, 64, 128, 160), (True,), None),
    ("bf16", (33, 129), (True,), ()),
    ("fp32", (33, 129), (True,), ()),
)


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples of
    unaligned ones."""
    backward = (
        (_query_hub_bwd_score_kernel, query_hub_bwd_score_config, _BWD_SCORE),
        (_query_hub_bwd_dx_kernel, query_hub_dx_config, {}),
        (_query_hub_bwd_dweight_kernel, query_hub_dweight_config, {}),
    )
    limit = query_hub_max_registers(arch)
    for dtype, widths, masks, aligned in _OFFLINE:
        itemsize = 4 if dtype == "fp32" else 2
        pointers = dict.fromkeys("p_x p_out p_grad p_dx".split(), dtype)
        pointers |= dict.fromkeys("p_weight p_bias p_score p_dz p_partial".split(), "fp32")
        pointers |= {"p_present": "u8", "p_winner": "u8"}
        for channels, has_present in itertools.product(widths, masks):
            case = f"{dtype} C{channels}" + " present" * has_present
            tile = query_hub_fwd_config(arch, itemsize, channels)
            inside = tile.block_c >= channels
            for save in (False, True):
                more = {"SCORES": inside, "SAVE": save}
                yield offline_entry(
                    _query_hub_fwd_kernel, case + " save" * save, pointers,
                    _constexprs(tile, channels, has_present, **more), **tile.launch,
                    max_registers=limit, aligned=aligned,
                )  # fmt: skip
            chosen = backward
            if not inside:
                chosen += ((_query_hub_score_kernel, query_hub_score_config, {}),)
            for kernel, choose, more in chosen:
                tile = choose(arch, itemsize, channels)
                constexprs = _constexprs(tile, channels, has_present, **more)
                yield offline_entry(
                    kernel, case, pointers, constexprs, **tile.launch, max_registers=limit,
                    aligned=aligned,
                )  # fmt: skip

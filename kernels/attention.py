"""Softmax attention for tall queries and short keys, forward and backward.

    s = scale * q k^T,   p = softmax(s) over keys,   out = p v,   lse = log(sum(exp(s)))

Layout. q, out [B, Lq, H, D], k, v [B, Lk, H, D]: tokens major, so the projections of a transformer
are used and produced without a transposition. Any strides with a last stride of 1. lse and delta
[B, H, Lq] fp32.

Saved for the backward: q, k, v, out, lse. With delta = rowsum(grad_out * out) - grad_lse the
gradients are

    ds = p * (grad_out v^T - delta),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T grad_out.

Work. Forward 4 B H Lq Lk D FLOP and (2 Lq + 2 Lk) B H D elements moved; backward 14 B H Lq Lk D
FLOP, because dQ and dK/dV are two kernels that both recompute the scores: no atomics and no fp32
copy of dQ, so repeats are bit-identical.

Anchored softmax. A running maximum costs a reduction, a rescaling of the accumulator and a
dependent chain in every step. Here the reference of a row is its maximum over the *last* block of
keys and stays: p = 2^(x - anchor) may exceed 1, which floating point holds as precisely as anything
below 1. As the anchor is the score of some key, the denominator is at least 1: nothing is lost
below. If it grows beyond a bound, the tile is computed again with the usual online softmax. The
bound is 2^15 for fp16, where p is rounded to fp16 for the second product (largest number 65504),
and 2^40 otherwise: then |out numerator| <= 2^40 max|v| is finite for |v| < 2^87. The ragged rest of
the keys is part of that last block too, hence the loop itself has no mask and one compiled kernel
serves every Lq and Lk.

Numerics. Scale and log2(e) are folded into one fused multiply-add per score; accumulation in fp32;
one rounding at the store. fp32 inputs are multiplied as fp32 unless TF32 is allowed. Any sign of
scale.

Limits. D <= 128, Lk >= 1. In fp16 a flat row over more than 2^15 keys takes the second path: right,
but slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from equiseg_fast.kernels._arch import (
    HALF,
    IEEE,
    INTERPRETER,
    LEAST_PRODUCT,
    TF32,
    Tile,
    architecture,
    is_odd,
    precision_class,
)
from equiseg_fast.kernels._common import (
    LOG2E,
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
    tile_of_program,
)
from equiseg_fast.kernels._tuned import ARGUMENTS, at_least, remembered, tunable

HEAD_DIMS = (16, 32, 64, 128)
"""Padded head dimensions."""


def padded_head_dim(head_dim: int) -> int:
    """The smallest supported tile width that holds `head_dim`."""
    for padded in HEAD_DIMS:
        if 1 <= head_dim <= padded:
            return padded
    raise ValueError(f"head_dim must be between 1 and {HEAD_DIMS[-1]}, got {head_dim}")


def attention_width(head_dim: int) -> int:
    """What the configurations depend on: the padded dimension, or, odd ones, each its own."""
    return head_dim if is_odd(head_dim) else padded_head_dim(head_dim)


ARGUMENTS["head_dim"] = (
    f"one of {', '.join(map(str, HEAD_DIMS))}, or less than 128 and no multiple of 16",
    lambda x: 1 <= x <= HEAD_DIMS[-1] and attention_width(x) == x,
)


# The tiles hold `block_m` queries by `block_n` keys. `lean` kernels contain their products once: no
# separate anchor or last block. Where operands pass through registers, each further copy of a
# product keeps them there for longer (spills of kilobytes were seen), and the few instructions per
# score that a lean kernel has on top vanish beside the products. The kernel for dK and dV has no
# such choice.


def _tile(
    block_m: int, block_n: int, num_warps: int, num_stages: int = 1, lean: bool | None = None
) -> Tile:
    return Tile(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, lean=lean
    )


def _ieee_tile(head_dim: int) -> Tile:
    """Forward and dQ in fp32."""
    if head_dim <= 32:
        return _tile(64, 32, 4, lean=True)
    if head_dim == 64:
        return _tile(64, 32, 8, lean=True)
    return _tile(32, 16, 8, lean=True)


def _wide_tile(precision: str) -> Tile:
    """Forward and dQ where operands of a head dimension of 128 pass through registers."""
    if precision == TF32:
        return _tile(32, 32, 4, 2, lean=True)
    return _tile(64, 64, 8, 2, lean=True)


def _odd_tile(arch: int, precision: str, head_dim: int) -> Tile:
    """Forward and dQ where rows have no vectors."""
    if precision == IEEE:
        return _ieee_tile(padded_head_dim(head_dim))
    in_registers = architecture(arch).operands_in_registers
    if head_dim > 64 and not in_registers:
        return _tile(64, 16, 8, lean=True)
    if precision == HALF:
        return _tile(64, 32, 8 if in_registers else 4, 2, lean=True)
    return _tile(32, 16, 4, 2, lean=True) if in_registers else _tile(64, 16, 4, lean=True)


@tunable
@at_least(lambda *_: {"block_n": LEAST_PRODUCT})
def attention_fwd_config(arch: int, precision: str, head_dim: int) -> Tile:
    """Tiles of the forward kernel; the loop runs over keys.

    Eight warps on 128 x 64 scores stay within 128 registers up to a head dimension of 64 on sm_90:
    two programs share an SM, and one computes exponentials while the other multiplies.
    """
    if arch == INTERPRETER:
        return _tile(128, 64, 4, lean=False)
    if is_odd(head_dim):
        return _odd_tile(arch, precision, head_dim)
    if precision == IEEE:
        return _ieee_tile(head_dim)
    if head_dim == 128 and architecture(arch).operands_in_registers:
        return _wide_tile(precision)
    if precision == TF32:
        return _tile(64, {16: 64, 32: 64, 64: 32, 128: 16}[head_dim], 4, 2, lean=False)
    return _tile(128, 64, 8, 3 if head_dim <= 32 else 2, lean=False)


@tunable
@at_least(lambda *_: {"block_n": LEAST_PRODUCT})
def attention_dq_config(arch: int, precision: str, head_dim: int) -> Tile:
    """Tiles of the kernel for dQ; the loop runs over keys."""
    if arch == INTERPRETER:
        return _tile(128, 64, 4, lean=False)
    gpu = architecture(arch)
    if is_odd(head_dim):
        if head_dim > 64 and not gpu.operands_in_registers and precision != IEEE:
            if precision == HALF:
                return _tile(128, 16, 8, lean=True)
            return _tile(32, 16, 4, 2, lean=True)
        return _odd_tile(arch, precision, head_dim)
    if precision == IEEE:
        if head_dim <= 32 and gpu.number == 89:  # which spills with the larger tile
            return _tile(32, 32, 4, lean=True)
        return _ieee_tile(head_dim)
    if head_dim == 128 and gpu.operands_in_registers:
        return _wide_tile(precision)
    if precision == TF32:
        if head_dim == 64 and gpu.number == 89:
            return _tile(32, 32, 4, 2, lean=True)
        return _tile(64, 32, 4, 2, lean=False)
    return _tile(128, 32 if head_dim == 16 and gpu.operands_in_registers else 64, 8, 2, lean=False)


@tunable
@at_least(lambda *_: {"block_m": LEAST_PRODUCT})
def attention_dkdv_config(arch: int, precision: str, head_dim: int) -> Tile:
    """Tiles of the kernel for dK and dV; the loop runs over queries."""
    if arch == INTERPRETER:
        return _tile(64, 64, 4)
    in_registers = architecture(arch).operands_in_registers
    if is_odd(head_dim):
        wide = head_dim > 64
        if precision == IEEE:
            return _tile(16, 16, 8)
        if precision == TF32:
            return _tile(16, 32 if wide or in_registers else 64, 8 if wide else 4)
        if in_registers:
            return _tile(32, 64, 8)
        return _tile(16, 64, 8, 1) if wide else _tile(32, 64, 4, 2)
    if precision == IEEE:
        if head_dim <= 64:
            return _tile(32, 32, 4 if head_dim <= 32 else 8)
        return _tile(16, 32, 8)
    if precision == TF32:
        if head_dim <= 32:
            return _tile(32, 64, 4, 2)
        if in_registers:
            return _tile(32, 32, 4 if head_dim == 64 else 8, 2)
        return _tile(32 if head_dim == 64 else 16, 64, 4, 2)
    if in_registers and head_dim >= 64:
        return _tile(32, 128, 8, 2) if head_dim == 64 else _tile(64, 64, 8, 2)
    return _tile(64 if head_dim <= 64 else 32, 128, 8, 2)


def delta_rows(arch: int) -> int:
    """Rows of one program of the delta kernel."""
    return 256 if arch == INTERPRETER else 16


REDUCE_BLOCK = 1024
"""Elements of one program of the kernel that adds the partial dK and dV."""

_MIN_CHUNK = 4
_MAX_SPLITS = 64
_PROGRAM_OVERHEAD = 3
_REDUCTION_OVERHEAD = 2


@remembered
def query_splits(programs: int, query_blocks: int, num_sms: int) -> tuple[int, int]:
    """How to cut the query loop of the dK/dV kernel: (splits, query blocks per split).

    `programs` (key blocks times batch times heads) may be far below the number of SMs, because the
    keys are few; then every program would walk a very long chain of queries while most of the
    device idles. The estimate is waves times (chain + fixed cost of a program), plus the second
    pass where there is one, in units of one query block. No split is empty, and together they cover
    all query blocks.
    """
    best = (float("inf"), 1, query_blocks)
    for wanted in range(1, min(_MAX_SPLITS, max(1, query_blocks // _MIN_CHUNK)) + 1):
        chunk = -(-query_blocks // wanted)
        splits = -(-query_blocks // chunk)
        waves = -(-programs * splits // num_sms)
        cost = waves * (chunk + _PROGRAM_OVERHEAD) + (_REDUCTION_OVERHEAD if splits > 1 else 0)
        best = min(best, (cost, splits, chunk))
    return best[1], best[2]


@triton.jit
def _online_softmax(
    b_q, p_k, p_v, o_n, o_d, m_d, stride_kn, stride_vn, Lk, scale_log2,
    BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reference, denominator and numerator of every row over all keys, with a running maximum."""
    # A finite start keeps rows right whose first keys all score -inf.
    b_max = tl.full([b_q.shape[0]], -3.0e38, tl.float32)
    b_l = tl.zeros([b_q.shape[0]], tl.float32)
    b_acc = tl.zeros([b_q.shape[0], b_q.shape[1]], tl.float32)
    for i_n in tl.range(0, Lk, BLOCK_N, num_stages=STAGES):
        m_n = o_n < Lk - i_n
        b_k = load_tile(p_k, o_n, o_d, stride_kn, m_n, m_d, True, PAD_D)
        b_v = load_tile(p_v, o_n, o_d, stride_vn, m_n, m_d, True, PAD_D)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_x = tl.where(m_n[None, :], b_x, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_p = tl.math.exp2(b_x - b_new[:, None])
        b_rescale = tl.math.exp2(b_max - b_new)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_acc = tl.dot(
            b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision=PRECISION
        )
        b_max = b_new
        p_k += BLOCK_N * stride_kn
        p_v += BLOCK_N * stride_vn
    return b_max, b_l, b_acc


@triton.jit(do_not_specialize=["H", "Lq", "Lk"])
def _attention_fwd_kernel(
    p_q, p_k, p_v, p_o, p_lse,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_om,
    H, Lq, Lk, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks * B * H,): one block of queries against all keys."""
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    i_m, i_bh, i_b, i_h = tile_of_program(tl.cdiv(Lq, BLOCK_M), BLOCK_M, H)
    p_q += i_b * stride_qb + i_h * stride_qh + i_m * stride_qm
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_o += (i_b * Lq + i_m) * stride_om + i_h * HEAD_DIM
    p_lse += i_bh * Lq + i_m

    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < Lq - i_m, o_d < HEAD_DIM
    b_q = load_tile(p_q, o_m, o_d, stride_qm, m_m, m_d, True, PAD_D)

    if LEAN:
        b_anchor, b_l, b_acc = _online_softmax(
            b_q, p_k, p_v, o_n, o_d, m_d, stride_kn, stride_vn, Lk, scale_log2,
            BLOCK_N, PAD_D, PRECISION, None,
        )  # fmt: skip
    else:
        # The last BLOCK_N keys give the anchor; those that the loop below meets again are left out
        # of the sums.
        n_loop = (tl.cdiv(Lk, BLOCK_N) - 1) * BLOCK_N
        i_last = (Lk - BLOCK_N).to(tl.int64)
        m_n = o_n + i_last >= 0
        p_kn, p_vn = p_k + i_last * stride_kn, p_v + i_last * stride_vn
        b_k = load_tile(p_kn, o_n, o_d, stride_kn, m_n, m_d, True, PAD_D)
        b_v = load_tile(p_vn, o_n, o_d, stride_vn, m_n, m_d, True, PAD_D)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_x = tl.where(m_n[None, :], b_x, -float("inf"))
        b_anchor = tl.max(b_x, 1)
        b_p = tl.math.exp2(b_x - b_anchor[:, None])
        b_p = tl.where((o_n + i_last >= n_loop)[None, :], b_p, 0.0)
        b_l = tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)

        p_kn, p_vn = p_k, p_v
        for _ in tl.range(0, n_loop, BLOCK_N):
            b_k = load_tile(p_kn, o_n, o_d, stride_kn, m_n, m_d, False, PAD_D)
            b_v = load_tile(p_vn, o_n, o_d, stride_vn, m_n, m_d, False, PAD_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_p = tl.math.exp2(b_s * scale_log2 - b_anchor[:, None])
            b_l += tl.sum(b_p, 1)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
            p_kn += BLOCK_N * stride_kn
            p_vn += BLOCK_N * stride_vn

        BOUND: tl.constexpr = 2.0**15 if p_v.dtype.element_ty == tl.float16 else 2.0**40
        # Written so that NaN counts as out of bounds.
        if tl.min((b_l < BOUND).to(tl.int32), 0) == 0:
            b_anchor, b_l, b_acc = _online_softmax(
                b_q, p_k, p_v, o_n, o_d, m_d, stride_kn, stride_vn, Lk, scale_log2,
                BLOCK_N, PAD_D, PRECISION, 1,
            )  # fmt: skip

    b_o = b_acc * (1.0 / b_l)[:, None]
    p_tile = p_o + o_m[:, None] * stride_om + o_d[None, :]
    tl.store(p_tile, b_o.to(p_o.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    LN2: tl.constexpr = 0.6931471805599453
    tl.store(p_lse + o_m, (b_anchor + tl.math.log2(b_l)) * LN2, mask=m_m)


@triton.jit(do_not_specialize=["H", "Lq"])
def _attention_bwd_delta_kernel(
    p_o, p_do, p_dlse, p_delta, stride_om, stride_gb, stride_gm, stride_gh, H, Lq,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * B * H,): delta = rowsum(grad_out * out) - grad_lse, as d lse / d s = p."""
    i_m, i_bh, i_b, i_h = tile_of_program(tl.cdiv(Lq, BLOCK_M), BLOCK_M, H)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < Lq - i_m, o_d < HEAD_DIM
    p_o += (i_b * Lq + i_m) * stride_om + i_h * HEAD_DIM
    p_do += i_b * stride_gb + i_h * stride_gh + i_m * stride_gm
    b_o = load_tile(p_o, o_m, o_d, stride_om, m_m, m_d, True, HEAD_DIM != BLOCK_D).to(tl.float32)
    b_do = load_tile(p_do, o_m, o_d, stride_gm, m_m, m_d, True, HEAD_DIM != BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    i_row = i_bh * Lq + i_m
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + i_row + o_m, mask=m_m, other=0.0)
    tl.store(p_delta + i_row + o_m, b_delta, mask=m_m)


@triton.jit(do_not_specialize=["H", "Lq", "Lk", "chunk"])
def _attention_bwd_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gm, stride_gh, stride_split, stride_dn,
    H, Lq, Lk, chunk, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks * B * H, splits): one block of keys against `chunk` queries.

    Scores are held transposed, [keys, queries], so that the products with grad_out and q need no
    transposition of a computed matrix. Keys past the end only reach rows that are not stored;
    queries past the end have q = grad_out = delta = lse = 0, so that their p is 1 and their
    contribution 0.
    """
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    i_n, i_bh, i_b, i_h = tile_of_program(tl.cdiv(Lk, BLOCK_N), BLOCK_N, H)
    i_s = tl.program_id(1)
    i_start = i_s * chunk
    i_stop = tl.minimum(i_start + chunk, Lq)
    p_q += i_b * stride_qb + i_h * stride_qh + i_start.to(tl.int64) * stride_qm
    p_do += i_b * stride_gb + i_h * stride_gh + i_start.to(tl.int64) * stride_gm
    p_k += i_b * stride_kb + i_h * stride_kh + i_n * stride_kn
    p_v += i_b * stride_vb + i_h * stride_vh + i_n * stride_vn
    p_lse += i_bh * Lq
    p_delta += i_bh * Lq

    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < Lk - i_n, o_d < HEAD_DIM
    b_k = load_tile(p_k, o_n, o_d, stride_kn, m_n, m_d, True, PAD_D)
    b_v = load_tile(p_v, o_n, o_d, stride_vn, m_n, m_d, True, PAD_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    LOG2_E: tl.constexpr = 1.4426950408889634
    for i_m in tl.range(i_start, i_stop, BLOCK_M):
        m_m = o_m < Lq - i_m
        b_q = load_tile(p_q, o_m, o_d, stride_qm, m_m, m_d, True, PAD_D)
        b_do = load_tile(p_do, o_m, o_d, stride_gm, m_m, m_d, True, PAD_D)
        b_lse = tl.load(p_lse + i_m + o_m, mask=m_m, other=0.0) * LOG2_E
        b_delta = tl.load(p_delta + i_m + o_m, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        p_q += BLOCK_M * stride_qm
        p_do += BLOCK_M * stride_gm

    o_out = i_s.to(tl.int64) * stride_split + (i_b * Lk + i_n) * stride_dn + i_h * HEAD_DIM
    o_tile = o_n[:, None] * stride_dn + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    tl.store(p_dk + o_out + o_tile, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out + o_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["splits"])
def _attention_bwd_reduce_kernel(
    p_partial_dk, p_partial_dv, p_dk, p_dv, numel, splits, BLOCK: tl.constexpr
):
    """Sum over the leading dimension of partials [splits, numel], always in the same order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_dk = tl.zeros([BLOCK], tl.float32)
    b_dv = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, splits):
        b_dk += tl.load(p_partial_dk + o, mask=m, other=0.0)
        b_dv += tl.load(p_partial_dv + o, mask=m, other=0.0)
        p_partial_dk += numel
        p_partial_dv += numel
    tl.store(p_dk + o, b_dk.to(p_dk.dtype.element_ty), mask=m)
    tl.store(p_dv + o, b_dv.to(p_dv.dtype.element_ty), mask=m)


@triton.jit
def _add_dq_block(
    b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_n, scale_log2,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_p = tl.math.exp2(b_s * scale_log2 - b_lse[:, None])
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASK:
        b_ds = tl.where(m_n[None, :], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["H", "Lq", "Lk"])
def _attention_bwd_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gm, stride_gh, stride_dm,
    H, Lq, Lk, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks * B * H,): one block of queries against all keys."""
    PAD_D: tl.constexpr = HEAD_DIM != BLOCK_D
    i_m, i_bh, i_b, i_h = tile_of_program(tl.cdiv(Lq, BLOCK_M), BLOCK_M, H)
    p_q += i_b * stride_qb + i_h * stride_qh + i_m * stride_qm
    p_do += i_b * stride_gb + i_h * stride_gh + i_m * stride_gm
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_dq += (i_b * Lq + i_m) * stride_dm + i_h * HEAD_DIM
    i_row = i_bh * Lq + i_m

    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < Lq - i_m, o_d < HEAD_DIM
    LOG2_E: tl.constexpr = 1.4426950408889634
    b_q = load_tile(p_q, o_m, o_d, stride_qm, m_m, m_d, True, PAD_D)
    b_do = load_tile(p_do, o_m, o_d, stride_gm, m_m, m_d, True, PAD_D)
    b_lse = tl.load(p_lse + i_row + o_m, mask=m_m, other=0.0) * LOG2_E
    b_delta = tl.load(p_delta + i_row + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    n_loop = tl.cdiv(Lk, BLOCK_N) * BLOCK_N if LEAN else (tl.cdiv(Lk, BLOCK_N) - 1) * BLOCK_N
    for i_n in tl.range(0, n_loop, BLOCK_N):
        m_n = o_n < Lk - i_n
        b_k = load_tile(p_k, o_n, o_d, stride_kn, m_n, m_d, LEAN, PAD_D)
        b_v = load_tile(p_v, o_n, o_d, stride_vn, m_n, m_d, LEAN, PAD_D)
        b_dq = _add_dq_block(
            b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_n, scale_log2, LEAN, PRECISION
        )
        p_k += BLOCK_N * stride_kn
        p_v += BLOCK_N * stride_vn
    if not LEAN:
        m_n = o_n < Lk - n_loop
        b_k = load_tile(p_k, o_n, o_d, stride_kn, m_n, m_d, True, PAD_D)
        b_v = load_tile(p_v, o_n, o_d, stride_vn, m_n, m_d, True, PAD_D)
        b_dq = _add_dq_block(
            b_dq, b_q, b_do, b_lse, b_delta, b_k, b_v, m_n, scale_log2, True, PRECISION
        )

    p_tile = p_dq + o_m[:, None] * stride_dm + o_d[None, :]
    tl.store(p_tile, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


def _constexprs(kernel: Any, head_dim: int, precision: str, tile: Tile) -> dict:
    """The constexprs of a kernel with matrix products."""
    return _with_products("LEAN" in kernel.arg_names, head_dim, precision, tile)


@remembered
def _with_products(lean: bool, head_dim: int, precision: str, tile: Tile) -> dict:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        **tile.blocks,
        "PRECISION": "tf32" if precision == TF32 else "ieee",
        **({"LEAN": tile.lean} if lean else {}),
    }


@remembered
def _delta_constexprs(arch: int, head_dim: int, has_dlse: bool) -> dict:
    block_d, rows = padded_head_dim(head_dim), delta_rows(arch)
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": rows, "HAS_DLSE": has_dlse}


_ROW_LAUNCH = {"num_warps": 4, "num_stages": 1}


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Lq, H, D] over k, v [B, Lk, H, D], all fp32, fp16 or bf16.

    Returns out [B, Lq, H, D], contiguous, in the dtype of q, and lse [B, H, Lq] fp32 (natural
    logarithm). An input whose last stride is not 1 is copied.
    """
    batch, n_q, heads, head_dim = q.shape
    out = empty_like(q)
    lse = q.new_empty((batch, heads, n_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    arch, _ = device_facts(q.device)
    precision = precision_class(q.element_size(), allow_tf32)
    tile = attention_fwd_config(arch, precision, attention_width(head_dim))
    launch(
        _attention_fwd_kernel, (cdiv(n_q, tile.block_m) * batch * heads,),
        q, k, v, out, lse, *strides(q), *strides(k), *strides(v), heads * head_dim,
        heads, n_q, k.shape[1], scale * LOG2E,
        **_constexprs(_attention_fwd_kernel, head_dim, precision, tile), **tile.launch,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, allow_tf32: bool,
    needs_dq: bool, needs_dk: bool, needs_dv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attention_fwd` for grad_out [B, Lq, H, D] and grad_lse [B, H, Lq] or None.

    Returns dq, dk, dv, contiguous, in the dtypes of q, k, v; those not needed are empty, [0]. dK
    and dV share one kernel: needing one of them costs as much as both.
    """
    batch, n_q, heads, head_dim = q.shape
    n_k = k.shape[1]
    dq, dk = empty_gradient(q, needs_dq), empty_gradient(k, needs_dk)
    dv = empty_gradient(v, needs_dv)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    if not (needs_dq or needs_dk or needs_dv):
        return dq, dk, dv
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    grad_out, out, lse = last_dim_contiguous(grad_out), out.contiguous(), lse.contiguous()
    arch, num_sms = device_facts(q.device)
    precision = precision_class(q.element_size(), allow_tf32)
    width = heads * head_dim
    grad_layout = strides(grad_out)
    layout = strides(q) + strides(k) + strides(v) + grad_layout

    delta = empty_like(lse)
    rows = delta_rows(arch)
    launch(
        _attention_bwd_delta_kernel, (cdiv(n_q, rows) * batch * heads,),
        out, grad_out, delta if grad_lse is None else grad_lse.float().contiguous(), delta,
        width, *grad_layout, heads, n_q,
        **_delta_constexprs(arch, head_dim, grad_lse is not None), **_ROW_LAUNCH,
    )  # fmt: skip

    if needs_dk or needs_dv:
        tile = attention_dkdv_config(arch, precision, attention_width(head_dim))
        programs = cdiv(n_k, tile.block_n) * batch * heads
        splits, chunk = query_splits(programs, cdiv(n_q, tile.block_m), num_sms)
        whole = dk if needs_dk else empty_like(k), dv if needs_dv else empty_like(v)
        sums = whole
        if splits > 1:
            sums = k.new_empty((2, splits, *k.shape), dtype=torch.float32).unbind()
        launch(
            _attention_bwd_dkdv_kernel, (programs, splits),
            q, k, v, grad_out, lse, delta, *sums, *layout, k.numel(), width,
            heads, n_q, n_k, chunk * tile.block_m, scale, scale * LOG2E,
            **_constexprs(_attention_bwd_dkdv_kernel, head_dim, precision, tile),
            **tile.launch,
        )  # fmt: skip
        if splits > 1:
            launch(
                _attention_bwd_reduce_kernel, (cdiv(k.numel(), REDUCE_BLOCK),),
                *sums, *whole, k.numel(), splits, BLOCK=REDUCE_BLOCK, **_ROW_LAUNCH,
            )  # fmt: skip

    if needs_dq:
        tile = attention_dq_config(arch, precision, attention_width(head_dim))
        launch(
            _attention_bwd_dq_kernel, (cdiv(n_q, tile.block_m) * batch * heads,),
            q, k, v, grad_out, lse, delta, dq, *layout, width,
            heads, n_q, n_k, scale, scale * LOG2E,
            **_constexprs(_attention_bwd_dq_kernel, head_dim, precision, tile), **tile.launch,
        )  # fmt: skip
    return dq, dk, dv


# fp16 has the tiles and instructions of bf16, so two head dimensions stand for it. Tiles depend on
# the padded head dimension, or, of odd ones, on themselves.
_OFFLINE = (
    ("bf16", HALF, (16, 32, 64, 128), None),
    ("fp16", HALF, (32, 64), None),
    ("fp32", TF32, (16, 32, 64, 128), None),
    ("fp32", IEEE, (16, 32, 64, 128), None),
    ("bf16", HALF, (33, 127), ()),
    ("fp32", TF32, (33, 127), ()),
    ("fp32", IEEE, (33, 127), ()),
)


def _dots(kernel: Any, arch: int, precision: str, tile: Tile) -> str:
    """What multiplies: few rows (for dK and dV the keys) are left to mma.sync."""
    rows = tile.block_n if kernel is _attention_bwd_dkdv_kernel else tile.block_m
    if precision != IEEE and rows < architecture(arch).least_rows:
        return "mma.sync"
    return precision


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples of
    unaligned ones."""
    chosen = (
        (_attention_fwd_kernel, attention_fwd_config, False),
        (_attention_bwd_dq_kernel, attention_dq_config, False),
        (_attention_bwd_dkdv_kernel, attention_dkdv_config, False),
        (_attention_bwd_dkdv_kernel, attention_dkdv_config, True),
    )
    for dtype, precision, head_dims, aligned in _OFFLINE:
        pointers = dict.fromkeys("p_q p_k p_v p_o p_do p_dq p_dk p_dv".split(), dtype)
        pointers |= dict.fromkeys("p_lse p_dlse p_delta p_partial_dk p_partial_dv".split(), "fp32")
        for head_dim in head_dims:
            case = f"{precision if dtype == 'fp32' else dtype} D{head_dim}"
            for kernel, choose, partials in chosen:
                if partials and dtype == "fp32":
                    continue  # the same types as without
                tile = choose(arch, precision, attention_width(head_dim))
                yield offline_entry(
                    kernel, case + " partials" * partials,
                    pointers | ({"p_dk": "fp32", "p_dv": "fp32"} if partials else {}),
                    _constexprs(kernel, head_dim, precision, tile), **tile.launch,
                    dots=_dots(kernel, arch, precision, tile), scores=tile.block_m * tile.block_n,
                    floats=("scale", "scale_log2"), aligned=aligned,
                )  # fmt: skip
            if precision == TF32:
                continue  # what follows has no products
            for has_dlse in (False, True):
                yield offline_entry(
                    _attention_bwd_delta_kernel, f"{dtype} D{head_dim}" + " grad_lse" * has_dlse,
                    pointers, _delta_constexprs(arch, head_dim, has_dlse), **_ROW_LAUNCH,
                    aligned=aligned,
                )  # fmt: skip
        if precision != TF32:
            block = {"BLOCK": REDUCE_BLOCK}
            yield offline_entry(
                _attention_bwd_reduce_kernel, dtype, pointers, block, **_ROW_LAUNCH, aligned=aligned
            )

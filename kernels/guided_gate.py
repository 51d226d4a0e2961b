"""The gate of the self-guided module: reweight the branches and fuse them, forward and backward.

    g = softmax(logits over present m)        K = number of present modalities
    branches_m = f_m x_m,  f_m = 1 + rho (K g_m - 1)
    fused = sum_m g_m x_m

Layout. x, branches [M, B, L, C], fused [B, L, C], logits [M, B, C] fp32, present [M, B] bool. Any
strides of x and of the gradients with a last stride of 1; logits and present are contiguous.

Saved for the backward: x, logits, present. With the gradients d_branches and d_fused
    dx_m = f_m d_branches_m + g_m d_fused
    dg_m = sum_l x_m (rho K d_branches_m + d_fused)
    dlogits_m = g_m (dg_m - sum_n g_n dg_n)

Work. Forward reads M and writes M + 1 maps, 3 FLOP per element; backward reads 2 M + 1 and writes
M, 8 FLOP. All modalities of a tile are held at once, as a block [modalities, tokens, channels],
hence one read of everything. Every program computes the softmax it needs, which is cheap: M C
values, against M L C features.

Numerics. fp32 inside, one rounding at the store. The sum over tokens: every program adds up its own
chunk of tokens, then the chunks are added in a fixed order: no atomics, so repeats are
bit-identical.

Limits. M <= 8. An absent modality is never read; its branch and its gradients are zero. An image in
which no modality is present has no softmax: its outputs are NaN, its gradients zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import (
    INTERPRETER,
    Tile,
    architecture,
    channel_block,
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
    offline_entry,
    strides,
)
from equiseg_fast.kernels._tuned import remembered, tunable


def padded_modalities(modalities: int) -> int:
    """How many modalities a tile has room for."""
    return power_of_two(modalities)


def _gate_tile(arch: int, modalities: int, channels: int, elements: int, num_warps: int) -> Tile:
    """The tile of one modality, when the tiles of all modalities together have `elements`."""
    if arch == INTERPRETER:
        return Tile(block_l=64, block_c=64, num_warps=4)
    block_c = channel_block(channels)
    block_l = elements // (padded_modalities(modalities) * block_c)
    return Tile(block_l=block_l, block_c=block_c, num_warps=num_warps)


@tunable
def guided_gate_fwd_config(arch: int, itemsize: int, modalities: int, channels: int) -> Tile:
    """Tiles of the forward kernel: enough tokens that one thread holds all modalities of an
    element, so that sums over modalities need no shuffle."""
    return _gate_tile(arch, modalities, channels, 4096, 8 if itemsize == 4 else 4)


@tunable
def guided_gate_bwd_config(arch: int, modalities: int, channels: int) -> Tile:
    """Tiles of the backward kernel; the loop runs over tokens, the sums stay in registers."""
    # With four warps the compiler for sm_100 and later spills rather than lower occupancy.
    num_warps = 8 if architecture(arch).number >= 100 else 4
    return _gate_tile(arch, modalities, channels, 2048, num_warps)


GATE_SUM_TILE = {"BLOCK_S": 32, "BLOCK_C": 16}
"""Chunks and channels of one step of the kernel that adds up the gradient of the logits."""


@triton.jit
def _gate_weights(p_logits, p_present, i_b, B, C, M, o_m, o_c, HAS_PRESENT: tl.constexpr):
    """Of image i_b: which modalities are present, how many (fp32), and their weights, [M, C]."""
    m_m = o_m < M
    if HAS_PRESENT:
        m_m = m_m & (tl.load(p_present + o_m * B + i_b, mask=m_m, other=0) != 0)
    p_z = p_logits + (o_m * B + i_b)[:, None] * C + o_c[None, :]
    b_z = tl.load(p_z, mask=m_m[:, None] & (o_c < C)[None, :], other=0.0)
    b_z = tl.where(m_m[:, None], b_z, -float("inf"))
    b_e = tl.exp(b_z - tl.max(b_z, 0)[None, :])
    b_g = b_e / tl.sum(b_e, 0)[None, :]
    return m_m, tl.sum(m_m.to(tl.float32), 0), b_g


@triton.jit
def _tile_position(n_l, n_c, chunk, BLOCK_C: tl.constexpr):
    """Grid (token chunks * channel blocks * B,), chunks fastest.

    Returns the image, the chunk, its first token, and the channels.
    """
    i_s = tl.program_id(0) % n_l
    i_c = tl.program_id(0) // n_l % n_c
    i_b = (tl.program_id(0) // (n_l * n_c)).to(tl.int64)
    return i_b, i_s, i_s * chunk, i_c * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit(do_not_specialize=["M", "B", "L", "chunk"])
def _guided_gate_fwd_kernel(
    p_x, p_logits, p_present, p_branches, p_fused,
    stride_xm, stride_xb, stride_xl, M, B, L, C, chunk, rho,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    i_b, _, i_start, o_c = _tile_position(tl.cdiv(L, chunk), tl.cdiv(C, BLOCK_C), chunk, BLOCK_C)
    o_m, o_l = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_L)
    m_m, b_number, b_g = _gate_weights(p_logits, p_present, i_b, B, C, M, o_m, o_c, HAS_PRESENT)
    b_factor = 1.0 + rho * (b_number * b_g - 1.0)
    m_c = (o_c < C)[None, None, :]
    o_x = (o_m * stride_xm)[:, None, None] + (o_l * stride_xl)[None, :, None] + o_c[None, None, :]
    o_branch = (o_m * B * L * C)[:, None, None] + (o_l * C)[None, :, None] + o_c[None, None, :]
    o_fused = (o_l * C)[:, None] + o_c[None, :]
    p_x += i_b * stride_xb + i_start.to(tl.int64) * stride_xl
    p_branches += (i_b * L + i_start) * C
    p_fused += (i_b * L + i_start) * C
    for i_l in tl.range(i_start, tl.minimum(i_start + chunk, L), BLOCK_L):
        m_lc = (o_l < L - i_l)[None, :, None] & m_c
        b_x = tl.load(p_x + o_x, mask=m_m[:, None, None] & m_lc, other=0.0).to(tl.float32)
        b_branch = b_x * b_factor[:, None, :]
        m_out = (o_m < M)[:, None, None] & m_lc
        tl.store(p_branches + o_branch, b_branch.to(p_branches.dtype.element_ty), mask=m_out)
        b_fused = tl.sum(b_x * b_g[:, None, :], 0)
        m_fused = (o_l < L - i_l)[:, None] & (o_c < C)[None, :]
        tl.store(p_fused + o_fused, b_fused.to(p_fused.dtype.element_ty), mask=m_fused)
        p_x += BLOCK_L * stride_xl
        p_branches += BLOCK_L * C
        p_fused += BLOCK_L * C


@triton.jit(do_not_specialize=["M", "B", "L", "chunk"])
def _guided_gate_bwd_kernel(
    p_x, p_logits, p_present, p_dbranches, p_dfused, p_dx, p_partial,
    stride_xm, stride_xb, stride_xl, stride_gm, stride_gb, stride_gl, stride_fb, stride_fl,
    M, B, L, C, chunk, rho,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PRESENT: tl.constexpr,
    HAS_DBRANCHES: tl.constexpr, HAS_DFUSED: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_DLOGITS: tl.constexpr,
):  # fmt: skip
    """dx, and the part of dg [chunks, M, B, C] that comes from one chunk of tokens."""
    i_b, i_s, i_start, o_c = _tile_position(tl.cdiv(L, chunk), tl.cdiv(C, BLOCK_C), chunk, BLOCK_C)
    o_m, o_l = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_L)
    m_m, b_number, b_g = _gate_weights(p_logits, p_present, i_b, B, C, M, o_m, o_c, HAS_PRESENT)
    b_factor = 1.0 + rho * (b_number * b_g - 1.0)
    b_gain = rho * b_number
    m_c = (o_c < C)[None, None, :]
    o_lc = o_c[None, None, :]
    o_x = (o_m * stride_xm)[:, None, None] + (o_l * stride_xl)[None, :, None] + o_lc
    o_db = (o_m * stride_gm)[:, None, None] + (o_l * stride_gl)[None, :, None] + o_lc
    o_df = (o_l * stride_fl)[None, :, None] + o_lc
    o_dx = (o_m * B * L * C)[:, None, None] + (o_l * C)[None, :, None] + o_lc
    p_x += i_b * stride_xb + i_start.to(tl.int64) * stride_xl
    p_dbranches += i_b * stride_gb + i_start.to(tl.int64) * stride_gl
    p_dfused += i_b * stride_fb + i_start.to(tl.int64) * stride_fl
    p_dx += (i_b * L + i_start) * C
    b_sum = tl.zeros([BLOCK_M, BLOCK_L, BLOCK_C], tl.float32)
    for i_l in tl.range(i_start, tl.minimum(i_start + chunk, L), BLOCK_L):
        m_lc = (o_l < L - i_l)[None, :, None] & m_c
        m_in = m_m[:, None, None] & m_lc
        b_dx = tl.zeros([BLOCK_M, BLOCK_L, BLOCK_C], tl.float32)
        b_dg = tl.zeros([BLOCK_M, BLOCK_L, BLOCK_C], tl.float32)
        if HAS_DBRANCHES:
            b_db = tl.load(p_dbranches + o_db, mask=m_in, other=0.0).to(tl.float32)
            b_dx += b_db * b_factor[:, None, :]
            b_dg += b_db * b_gain
        if HAS_DFUSED:
            b_df = tl.load(p_dfused + o_df, mask=m_lc, other=0.0).to(tl.float32)
            b_dx += b_df * b_g[:, None, :]
            b_dg += b_df
        if NEEDS_DX:
            # Without a present modality b_g is NaN.
            b_dx = tl.where(m_m[:, None, None], b_dx, 0.0)
            m_out = (o_m < M)[:, None, None] & m_lc
            tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_out)
        if NEEDS_DLOGITS:
            b_x = tl.load(p_x + o_x, mask=m_in, other=0.0).to(tl.float32)
            b_sum += tl.where(m_m[:, None, None], b_x * b_dg, 0.0)
        p_x += BLOCK_L * stride_xl
        p_dbranches += BLOCK_L * stride_gl
        p_dfused += BLOCK_L * stride_fl
        p_dx += BLOCK_L * C
    if NEEDS_DLOGITS:
        o_out = ((i_s * M.to(tl.int64) + o_m) * B + i_b)[:, None] * C + o_c[None, :]
        tl.store(p_partial + o_out, tl.sum(b_sum, 1), mask=(o_m < M)[:, None] & (o_c < C)[None, :])


@triton.jit(do_not_specialize=["M", "B", "chunks"])
def _guided_gate_bwd_logits_kernel(
    p_partial, p_logits, p_present, p_dlogits, M, B, C, chunks,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks * B,): dg summed over the chunks, then the backward of the softmax."""
    n_c = tl.cdiv(C, BLOCK_C)
    i_b = (tl.program_id(0) // n_c).to(tl.int64)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m, o_s = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_S)
    m_m, _, b_g = _gate_weights(p_logits, p_present, i_b, B, C, M, o_m, o_c, HAS_PRESENT)
    o_mc = (o_m * B + i_b)[:, None] * C + o_c[None, :]
    m_mc = (o_m < M)[:, None] & (o_c < C)[None, :]
    o_tile = (o_s.to(tl.int64) * M * B * C)[:, None, None] + o_mc[None, :, :]
    b_sum = tl.zeros([BLOCK_S, BLOCK_M, BLOCK_C], tl.float32)
    for i_s in tl.range(0, chunks, BLOCK_S):
        m_tile = (o_s < chunks - i_s)[:, None, None] & m_mc[None, :, :]
        b_sum += tl.load(p_partial + o_tile, mask=m_tile, other=0.0)
        p_partial += BLOCK_S * M.to(tl.int64) * B * C
    b_dg = tl.sum(b_sum, 0)
    b_dz = b_g * (b_dg - tl.sum(b_g * b_dg, 0)[None, :])
    tl.store(p_dlogits + o_mc, tl.where(m_m[:, None], b_dz, 0.0), mask=m_mc)


def _layout(x: torch.Tensor, tile: Tile, num_sms: int) -> tuple[int, int, int]:
    """For tiles of x [M, B, L, C]: how many programs, chunks of tokens, and tokens in a chunk."""
    _, batch, tokens, channels = x.shape
    rows = batch * cdiv(channels, tile.block_c)
    chunks, tiles = token_chunks(rows, cdiv(tokens, tile.block_l), num_sms)
    return rows * chunks, chunks, tiles * tile.block_l


@remembered
def _constexprs(tile: Tile, modalities: int, has_present: bool) -> dict:
    return {
        "BLOCK_M": padded_modalities(modalities),
        **tile.blocks,
        "HAS_PRESENT": has_present,
    }


def guided_gate_fwd(
    x: torch.Tensor, logits: torch.Tensor, present: torch.Tensor | None, rho: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate on x [M, B, L, C] (fp32, fp16, bf16), logits [M, B, C] fp32, present [M, B] or None.

    Returns branches [M, B, L, C] and fused [B, L, C], contiguous, in the dtype of x. Features whose
    last stride is not 1 are copied.
    """
    modalities, batch, tokens, channels = x.shape
    branches = empty_like(x)
    fused = x.new_empty((batch, tokens, channels))
    if x.numel() == 0:
        return branches, fused
    x, logits = last_dim_contiguous(x), logits.contiguous()
    arch, num_sms = device_facts(x.device)
    tile = guided_gate_fwd_config(arch, x.element_size(), modalities, channels)
    # Several waves of short programs: the loads of one overlap the stores of another.
    programs, _, chunk = _layout(x, tile, 4 * num_sms)
    launch(
        _guided_gate_fwd_kernel, (programs,),
        x, logits, logits if present is None else present.contiguous(), branches, fused,
        *strides(x), modalities, batch, tokens, channels, chunk, rho,
        **tile.launch, **_constexprs(tile, modalities, present is not None),
    )  # fmt: skip
    return branches, fused


def guided_gate_bwd(
    grad_branches: torch.Tensor | None, grad_fused: torch.Tensor | None,
    x: torch.Tensor, logits: torch.Tensor, present: torch.Tensor | None,
    rho: float, needs_dx: bool, needs_dlogits: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Backward of `guided_gate_fwd`, given the gradients of its outputs (any strides; either may be
    None).

    Returns dx [M, B, L, C] in the dtype of x and dlogits [M, B, C] fp32, contiguous; those not
    needed are empty, [0].
    """
    modalities, batch, tokens, channels = x.shape
    dx, dlogits = empty_gradient(x, needs_dx), empty_gradient(logits, needs_dlogits)
    if x.numel() == 0 or (grad_branches is None and grad_fused is None):
        return dx.zero_(), dlogits.zero_()
    if not (needs_dx or needs_dlogits):
        return dx, dlogits
    x, logits = last_dim_contiguous(x), logits.contiguous()
    mask = logits if present is None else present.contiguous()
    has_dbranches, has_dfused = grad_branches is not None, grad_fused is not None
    grad_branches = last_dim_contiguous(grad_branches) if has_dbranches else x
    grad_fused = last_dim_contiguous(grad_fused) if has_dfused else x[0]
    arch, num_sms = device_facts(x.device)
    tile = guided_gate_bwd_config(arch, modalities, channels)
    programs, chunks, chunk = _layout(x, tile, num_sms)
    partial = dlogits
    if needs_dlogits:
        partial = logits.new_empty((chunks, modalities, batch, channels))
    launch(
        _guided_gate_bwd_kernel, (programs,),
        x, logits, mask, grad_branches, grad_fused, dx, partial,
        *strides(x), *strides(grad_branches), *strides(grad_fused),
        modalities, batch, tokens, channels, chunk, rho,
        **tile.launch, **_constexprs(tile, modalities, present is not None),
        HAS_DBRANCHES=has_dbranches, HAS_DFUSED=has_dfused,
        NEEDS_DX=needs_dx, NEEDS_DLOGITS=needs_dlogits,
    )  # fmt: skip
    if needs_dlogits:
        launch(
            _guided_gate_bwd_logits_kernel, (batch * cdiv(channels, GATE_SUM_TILE["BLOCK_C"]),),
            partial, logits, mask, dlogits, modalities, batch, channels, chunks,
            num_warps=4, num_stages=1,
            BLOCK_M=padded_modalities(modalities), **GATE_SUM_TILE,
            HAS_PRESENT=present is not None,
        )  # fmt: skip
    return dx, dlogits


# The padded number of modalities, the block of channels and the dtype decide what a launcher asks
# for; fp16 has the instructions of bf16.
_OFFLINE = (
    *itertools.product(("bf16", "fp32"), (1, 2, 4, 8), (32, 64), (False,), (None,)),
    *itertools.product(("bf16", "fp32"), (4, 8), (64,), (True,), (None,)),
    ("fp16", 4, 64, False, None),
    *itertools.product(("bf16", "fp32"), (8,), (33,), (True,), ((),)),
)


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples
    of unaligned ones.

    A gradient that is missing or not wanted only leaves work out: one case of each shows it.
    """
    features = ("p_x", "p_branches", "p_fused", "p_dbranches", "p_dfused", "p_dx")
    statistics = dict.fromkeys(("p_logits", "p_partial", "p_dlogits"), "fp32") | {"p_present": "i1"}
    flags = ("HAS_DBRANCHES", "HAS_DFUSED", "NEEDS_DX", "NEEDS_DLOGITS")
    for dtype, modalities, channels, has_present, aligned in _OFFLINE:
        pointers = dict.fromkeys(features, dtype) | statistics
        case = f"{dtype} M{modalities} C{channels}" + (" present" if has_present else "")
        itemsize = 4 if dtype == "fp32" else 2
        tile = guided_gate_fwd_config(arch, itemsize, modalities, channels)
        constexprs = _constexprs(tile, modalities, has_present)
        yield offline_entry(
            _guided_gate_fwd_kernel, case, pointers, constexprs, **tile.launch, floats=("rho",),
            aligned=aligned,
        )  # fmt: skip
        tile = guided_gate_bwd_config(arch, modalities, channels)
        constexprs = _constexprs(tile, modalities, has_present)
        shown = (dtype, modalities, channels, has_present) == ("bf16", 4, 64, False)
        for left_out in ("", *flags) if shown else ("",):
            kind = f"{case} without {left_out}" if left_out else case
            wanted = constexprs | {flag: flag != left_out for flag in flags}
            yield offline_entry(
                _guided_gate_bwd_kernel, kind, pointers, wanted, **tile.launch, floats=("rho",),
                aligned=aligned,
            )  # fmt: skip
    for modalities, has_present, aligned in (
        *itertools.product((1, 2, 4, 8), (False, True), (None,)), (8, True, ()),
    ):  # fmt: skip
        blocks = {"BLOCK_M": modalities, **GATE_SUM_TILE, "HAS_PRESENT": has_present}
        case = f"M{modalities}" + (" present" if has_present else "")
        yield offline_entry(
            _guided_gate_bwd_logits_kernel, case, statistics, blocks, 4, 1, aligned=aligned
        )

"""Class prototypes: the mean feature of every class, per image and modality, forward and backward.

    counts[b, k] = number of tokens l of image b with label k
    prototypes[m, b, k] = sum of x[m, b, l] over those l / max(counts[b, k], 1)

Layout. x [M, B, L, C] of any strides with a last stride of 1, L = height * width; labels
[B, height, width] integer of any strides: the caller passes the view `labels[:, ::s, ::s]`, which
is read in place. Labels outside 0..K-1 and the ignored one belong to no class. prototypes
[M, B, K, C] fp32, counts [B, K] int64.

Saved for the backward: labels and counts. dx of a token is the gradient of its class divided by the
count, zero without a class.

Work. Forward reads x once and writes the prototypes, 1 addition per element; backward reads the
labels and writes dx. The sums of all classes are one product, one-hot [K, L] times x [L, C], so
that a token is read once whatever its class.

Numerics. fp32-accurate sums for every dtype. The products are exact: fp32 features are split into
three bf16 numbers that add up to them. Tensor cores truncate when they accumulate, which would add
up over many tokens; therefore a product spans one tile of tokens, and tiles are added with
rounding. Every program sums its own chunk of tokens, then chunks are added in a fixed order: no
atomics, so repeats are bit-identical. Where a feature is not finite, its channel is not finite in
any class of that image (0 * inf).

Limits. K <= 256, L < 2^31. Of fp32 features the parts below 2^-126 may be lost, and those beyond
the largest bf16 number (3.39e38) count as infinite.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import (
    HALF,
    INTERPRETER,
    LEAST_PRODUCT,
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
    last_dim_contiguous,
    launch,
    load_tile,
    offline_entry,
    strides,
)
from equiseg_fast.kernels._tuned import at_least, tunable


def padded_classes(arch: int, num_classes: int) -> int:
    """Rows of the one-hot matrix, which the tensor cores multiply."""
    return max(architecture(arch).least_rows, power_of_two(num_classes))


@tunable
@at_least(lambda *_: {"block_l": LEAST_PRODUCT})
def class_sums_config(arch: int, itemsize: int, num_classes: int, channels: int) -> Tile:
    """Tiles of the kernel that adds up the features of every class; the loop runs over tokens."""
    if arch == INTERPRETER:
        return Tile(block_l=64, block_c=64, num_warps=4, num_stages=3)
    classes = padded_classes(arch, num_classes)
    many, wide = classes > 64, itemsize == 4
    return Tile(
        block_l=16 if wide and classes > 128 else 32 if wide or many or is_odd(channels) else 64,
        block_c=32 if wide and many else channel_block(channels),
        num_warps=8 if many else 4,
        num_stages=3,
    )


CLASS_MEANS_TILE = {"BLOCK_S": 16, "BLOCK": 128}
"""Chunks and elements of one step of the kernel that divides sums of classes by their counts."""


@tunable
def class_gather_config(arch: int, channels: int) -> Tile:
    """Tiles of the kernel that gives every token the gradient of the prototype of its class."""
    if arch == INTERPRETER:
        return Tile(block_l=128, block_c=64, num_warps=4)
    block_c = channel_block(channels, largest=128)
    return Tile(block_l=4096 // block_c, block_c=block_c, num_warps=4)


@triton.jit
def _load_classes(p_labels, o_l, L, width, stride_lh, stride_lw, num_classes, ignore_index):
    """Classes of tokens o_l as int32, -1 for none; labels are compared in 64 bits."""
    m_l = o_l < L
    o_label = (o_l // width).to(tl.int64) * stride_lh + (o_l % width).to(tl.int64) * stride_lw
    b_label = tl.load(p_labels + o_label, mask=m_l, other=0).to(tl.int64)
    m_class = m_l & (b_label >= 0) & (b_label < num_classes) & (b_label != ignore_index)
    return tl.where(m_class, b_label, -1).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "stride_lb", "stride_lh", "stride_lw",
        "B", "rows", "L", "width", "num_classes", "ignore_index", "chunk",
    ]
)  # fmt: skip
def _class_sums_kernel(
    p_x, p_labels, p_sums, p_counts,
    stride_xm, stride_xb, stride_xl, stride_lb, stride_lh, stride_lw,
    B, rows, L, C, width, num_classes, ignore_index, chunk,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, M * B, K, C] of one chunk of tokens, and counts [chunks, B, K] int32.

    Grid (chunks * channel blocks * rows,) with rows = M * B, chunks fastest.
    """
    n_s, n_c = tl.cdiv(L, chunk), tl.cdiv(C, BLOCK_C)
    i_s = tl.program_id(0) % n_s
    i_c = tl.program_id(0) // n_s % n_c
    i_row = (tl.program_id(0) // (n_s * n_c)).to(tl.int64)
    i_m, i_b = i_row // B, i_row % B
    i_start = i_s * chunk
    i_stop = tl.minimum(i_start + chunk, L)
    p_labels += i_b * stride_lb
    p_x += i_m * stride_xm + i_b * stride_xb + i_start.to(tl.int64) * stride_xl

    o_k, o_l = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_L)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k, m_c = o_k < num_classes, o_c < C
    b_sum = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i_l in tl.range(i_start, i_stop, BLOCK_L):
        b_class = _load_classes(
            p_labels, i_l + o_l, L, width, stride_lh, stride_lw, num_classes, ignore_index
        )
        b_x = load_tile(p_x, o_l, o_c, stride_xl, o_l < L - i_l, m_c, True, True)
        b_minus = tl.where(o_k[:, None] == b_class[None, :], -1.0, 0.0)
        # Minus the sum is subtracted, because Triton turns the addition of a product into an
        # accumulation on the tensor cores.
        if b_x.dtype == tl.float32:
            b_minus = b_minus.to(tl.bfloat16)
            b_high = b_x.to(tl.bfloat16)
            b_rest = b_x - b_high.to(tl.float32)
            b_middle = b_rest.to(tl.bfloat16)
            b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)
            b_tile = tl.dot(b_minus, b_low, input_precision="ieee")
            b_tile = tl.dot(b_minus, b_middle, b_tile, input_precision="ieee")
            b_tile = tl.dot(b_minus, b_high, b_tile, input_precision="ieee")
        else:
            b_tile = tl.dot(b_minus.to(b_x.dtype), b_x, input_precision="ieee")
        b_sum -= b_tile
        p_x += BLOCK_L * stride_xl

    o_out = (i_s * rows.to(tl.int64) + i_row) * num_classes * C
    p_tile = p_sums + o_out + o_k[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_sum, mask=m_k[:, None] & m_c[None, :])

    # The counts of an image do not depend on modality and channels.
    if (i_m == 0) & (i_c == 0):
        b_count = tl.zeros([BLOCK_K], tl.int32)
        for i_l in tl.range(i_start, i_stop, BLOCK_L):
            b_class = _load_classes(
                p_labels, i_l + o_l, L, width, stride_lh, stride_lw, num_classes, ignore_index
            )
            b_count += tl.sum((o_k[:, None] == b_class[None, :]).to(tl.int32), 1)
        tl.store(p_counts + (i_s * B.to(tl.int64) + i_b) * num_classes + o_k, b_count, mask=m_k)


@triton.jit(do_not_specialize=["size", "classes", "chunks"])
def _class_means_kernel(
    p_sums, p_partial_counts, p_prototypes, p_counts, size, classes, C, chunks,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, size] and counts [chunks, classes] to means, size = M * classes * C.

    Here classes = B * K: every image has its own.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_class = o // C % classes
    o_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK_S, BLOCK], tl.int32)
    for i_s in tl.range(0, chunks, BLOCK_S):
        i_chunk = (i_s + o_s).to(tl.int64)[:, None]
        m = (o_s < chunks - i_s)[:, None] & (o < size)[None, :]
        b_sum += tl.load(p_sums + i_chunk * size + o[None, :], mask=m, other=0.0)
        b_count += tl.load(p_partial_counts + i_chunk * classes + o_class[None, :], mask=m, other=0)
    b_number = tl.sum(b_count, 0)
    b_mean = tl.math.div_rn(tl.sum(b_sum, 0), tl.maximum(b_number, 1).to(tl.float32))
    tl.store(p_prototypes + o, b_mean, mask=o < size)
    tl.store(p_counts + o_class, b_number.to(tl.int64), mask=(o < classes * C) & (o % C == 0))


@triton.jit(
    do_not_specialize=[
        "stride_lb", "stride_lh", "stride_lw", "B", "L", "width", "num_classes", "ignore_index",
    ]
)  # fmt: skip
def _class_gather_kernel(
    p_grad, p_labels, p_counts, p_dx,
    stride_gm, stride_gb, stride_gk, stride_lb, stride_lh, stride_lw,
    B, L, C, width, num_classes, ignore_index,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks * channel blocks * M * B,): dx of one tile of tokens and channels."""
    n_l, n_c = tl.cdiv(L, BLOCK_L), tl.cdiv(C, BLOCK_C)
    i_l = tl.program_id(0) % n_l * BLOCK_L
    o_c = tl.program_id(0) // n_l % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i_row = (tl.program_id(0) // (n_l * n_c)).to(tl.int64)
    i_m, i_b = i_row // B, i_row % B
    o_l = tl.arange(0, BLOCK_L)
    p_labels += i_b * stride_lb
    b_class = _load_classes(
        p_labels, i_l + o_l, L, width, stride_lh, stride_lw, num_classes, ignore_index
    )
    m_class = b_class >= 0
    b_count = tl.load(p_counts + i_b * num_classes + b_class, mask=m_class, other=1).to(tl.float32)
    p_grad += i_m * stride_gm + i_b * stride_gb
    b_grad = load_tile(p_grad, b_class.to(tl.int64), o_c, stride_gk, m_class, o_c < C, True, True)
    b_dx = b_grad * (1.0 / b_count)[:, None]
    p_tile = p_dx + (i_row * L + i_l) * C + o_l[:, None] * C + o_c[None, :]
    m_out = (o_l < L - i_l)[:, None] & (o_c < C)[None, :]
    tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_out)


def class_prototypes_fwd(
    x: torch.Tensor, labels: torch.Tensor, num_classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prototypes of x [M, B, L, C] (fp32, fp16, bf16; M, L, C >= 1), labels [B, height, width].

    Returns prototypes [M, B, K, C] fp32 and counts [B, K] int64, contiguous. Features whose last
    stride is not 1 are copied.
    """
    modalities, batch, tokens, channels = x.shape
    size = (modalities, batch, num_classes, channels)
    prototypes = x.new_empty(size, dtype=torch.float32)
    counts = x.new_empty((batch, num_classes), dtype=torch.int64)
    if x.numel() == 0:
        return prototypes, counts
    x = last_dim_contiguous(x)
    arch, num_sms = device_facts(x.device)
    tile = class_sums_config(arch, x.element_size(), num_classes, channels)
    programs = modalities * batch * cdiv(channels, tile.block_c)
    chunks, tiles = token_chunks(programs, cdiv(tokens, tile.block_l), num_sms)
    sums = x.new_empty((chunks, *size), dtype=torch.float32)
    partial_counts = x.new_empty((chunks, batch, num_classes), dtype=torch.int32)
    launch(
        _class_sums_kernel, (programs * chunks,),
        x, labels, sums, partial_counts, *strides(x), *labels.stride(),
        batch, modalities * batch, tokens, channels, labels.size(2), num_classes, ignore_index,
        tiles * tile.block_l,
        **tile.launch, BLOCK_K=padded_classes(arch, num_classes), **tile.blocks,
    )  # fmt: skip
    launch(
        _class_means_kernel, (cdiv(prototypes.numel(), CLASS_MEANS_TILE["BLOCK"]),),
        sums, partial_counts, prototypes, counts,
        prototypes.numel(), counts.numel(), channels, chunks,
        num_warps=4, num_stages=1, **CLASS_MEANS_TILE,
    )  # fmt: skip
    return prototypes, counts


def class_prototypes_bwd(
    grad: torch.Tensor,
    labels: torch.Tensor,
    counts: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dx [M, B, L, C] in `dtype`, contiguous, for grad [M, B, K, C] fp32 of any strides."""
    modalities, batch, num_classes, channels = grad.shape
    tokens = labels.size(1) * labels.size(2)
    dx = grad.new_empty((modalities, batch, tokens, channels), dtype=dtype)
    if dx.numel() == 0:
        return dx
    grad = last_dim_contiguous(grad)
    arch, _ = device_facts(grad.device)
    tile = class_gather_config(arch, channels)
    tiles = cdiv(tokens, tile.block_l) * cdiv(channels, tile.block_c)
    launch(
        _class_gather_kernel, (tiles * modalities * batch,),
        grad, labels, counts, dx, *strides(grad), *labels.stride(), batch, tokens, channels,
        labels.size(2), num_classes, ignore_index,
        **tile.launch, **tile.blocks,
    )  # fmt: skip
    return dx


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples
    of unaligned ones.

    They depend on the padded number of classes and on the block of channels; the labels are int64.
    """
    dtypes = {"bf16": 2, "fp16": 2, "fp32": 4}
    pointers = {"p_labels": "i64", "p_sums": "fp32", "p_counts": "i32"}
    padded = dict.fromkeys(padded_classes(arch, n) for n in (16, 32, 64, 128, 256))
    for dtype, classes, aligned in itertools.product(dtypes, padded, (None, ())):
        if dtype == "fp16" and (classes != 64 or aligned is not None):
            continue  # it has the tiles and the instructions of bf16
        if aligned is not None and classes not in (64, 256):
            continue
        widths = (32, 64) if aligned is None else (33,)
        tiles = (class_sums_config(arch, dtypes[dtype], classes, c) for c in widths)
        for tile in dict.fromkeys(tiles):
            blocks = {"BLOCK_K": classes, **tile.blocks}
            case = f"{dtype} K{classes} C{tile.block_c}"
            yield offline_entry(
                _class_sums_kernel, case, pointers | {"p_x": dtype}, blocks,
                **tile.launch, dots=HALF, aligned=aligned,
            )  # fmt: skip
    means = {"p_partial_counts": "i32", "p_prototypes": "fp32", "p_counts": "i64"}
    for aligned in (None, ()):
        yield offline_entry(
            _class_means_kernel, "fp32", pointers | means, CLASS_MEANS_TILE, 4, 1, aligned=aligned
        )
    for dtype, channels, aligned in (
        *itertools.product(dtypes, (32, 64, 128), (None,)),
        *itertools.product(("bf16", "fp32"), (33,), ((),)),
    ):
        tile = class_gather_config(arch, channels)
        yield offline_entry(
            _class_gather_kernel, f"{dtype} C{channels}",
            {"p_grad": "fp32", "p_labels": "i64", "p_counts": "i64", "p_dx": dtype},
            tile.blocks, **tile.launch, aligned=aligned,
        )  # fmt: skip

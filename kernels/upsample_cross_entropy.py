"""Cross-entropy per pixel of bilinearly upsampled logits, without the upsampled logits.

    v[k, y, x] = sum_ij wy(y, i) wx(x, j) logits[k, i, j]
    wy(y, i) = max(0, 1 - |clamp((y + 1/2) h / H - 1/2) - i|),   clamp(s) = min(max(s, 0), h - 1)
    lse = log(sum_k exp(v)),   loss = lse - v[label]

which is bilinear interpolation with align_corners=False: positions before the first sample and
after the last one repeat it. Positions are exact: that of a pixel is the integer (2 y + 1) h - H
over 2 H, and so no factor is special.

Layout. logits [B, K, h, w]: the kernels read rows [B, h, w, pitch] of classes, pitch a multiple of
16, so that a thread holds neighbouring classes of one position and sums over most of them without
talking to other threads. Anything else is copied to that form first; at a factor of 4 the copy is
1/16 of what eager writes as upsampled logits. labels, loss, lse [B, H, W].

Cells. A cell is what lies between samples i, i + 1 and j, j + 1, with half a cell around the image:
(h + 1) (w + 1) cells of at most ceil(H / h) x ceil(W / w) pixels that share four corners, for any
factor, whole or not. Forward: a program holds the corners of some cells and walks over the pixels.

Backward. d logits[k, i, j] = sum over the pixels of the four cells around (i, j) of
weight * grad * (p - [k = label]) with p = exp(v - lse): a gather in a fixed order, without atomics
and without a transient. A program owns columns j in a strip of rows i and walks down; what a row of
cells gives to the samples below is carried on. A pixel is evaluated for its left and its right
column, and once more where strips meet: 2 (1 + 1 / strip) times. Neither strips nor blocks change
a bit. Classes do not depend on one another and are cut into blocks of at most 32.

Saved for the backward: logits, labels, lse.

Work. Forward: logits and labels read, loss and lse written (8 bytes a pixel); 11 K FLOP a pixel.
Backward: logits, labels, lse, grad read, d logits written; 8 K FLOP per evaluation of a pixel.

Numerics. fp32 inside whatever the logits are, one rounding at the store. The loss is
(max - v[label]) + log(sum), without cancellation where the label wins by far. A label that is
neither a class nor ignored has a loss of NaN.

Limits. K <= 256; (h + 1) (w + 1) < 2^31; (2 H + 1) (h + 1) < 2^31, and so for the width. With
large factors on tiny maps (32 times 16 x 16 samples) the backward has too few positions to fill a
large GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from equiseg_fast.kernels._arch import INTERPRETER, Tile, power_of_two
from equiseg_fast.kernels._common import (
    OfflineEntry,
    cdiv,
    device_facts,
    empty_like,
    last_dim_contiguous,
    launch,
    offline_entry,
)
from equiseg_fast.kernels._tuned import at_least, remembered, tunable

CLASS_PITCH = 16
"""Classes of a row of logits are padded to a multiple of this, so that Triton loads vectors."""

_CLASS_BLOCK = 32
_CTAS_PER_SM = 12
_MAX_STRIP = 8


def _class_tile(arch: int, block_k: int, elements: int) -> Tile:
    if arch == INTERPRETER:
        return Tile(block_m=64, block_k=block_k, num_warps=4)
    return Tile(block_m=max(1, elements // block_k), block_k=block_k, num_warps=2)


@tunable
@at_least(lambda arch, classes: {"block_k": classes})
def upsample_cross_entropy_fwd_config(arch: int, classes: int) -> Tile:
    """`block_m` cells by all classes."""
    return _class_tile(arch, max(CLASS_PITCH, power_of_two(classes)), 512)


@tunable
def upsample_cross_entropy_bwd_config(arch: int, classes: int) -> Tile:
    """`block_m` columns by a block of classes."""
    return _class_tile(arch, CLASS_PITCH if classes <= CLASS_PITCH else _CLASS_BLOCK, 512)


def upsample_cross_entropy_lines(arch: int, programs: int, lines: int, num_sms: int) -> int:
    """Pixel lines of its cells that a forward program walks over: fewer where programs are few."""
    if arch == INTERPRETER:
        return lines
    parts = max(1, num_sms * _CTAS_PER_SM // programs)
    return -(-lines // min(parts, lines))


@remembered
def upsample_cross_entropy_strip(columns: int, rows: int, tile: Tile, num_sms: int) -> int:
    """Rows of samples of one backward program; `columns` in all images and class blocks.

    A strip of s rows costs s + 1, and long strips leave SMs idle. It changes no result.
    """
    costs = []
    for strip in range(1, min(_MAX_STRIP, rows) + 1):
        programs = -(-columns * -(-rows // strip) // tile.block_m)
        costs.append((-(-programs // (num_sms * _CTAS_PER_SM)) * (strip + 1), strip))
    return min(costs)[1]


@triton.jit
def _first_pixel(o_cell, size, samples):
    """First pixel of a cell; that of the cell after the last one is `size`."""
    o_first = (size * (2 * o_cell + 1) + samples - 1) // (2 * samples)
    return tl.where(o_cell < 0, 0, tl.minimum(o_first, size))


@triton.jit
def _fraction(o_pixel, o_cell, size, samples, scale):
    """Where a pixel lies between the two samples of its cell, 0 to 1; `scale` is 1 / (2 size)."""
    o_source = (2 * o_pixel + 1) * samples - size
    o_source = tl.minimum(tl.maximum(o_source, 0), 2 * size * (samples - 1))
    return (o_source - 2 * size * o_cell).to(tl.float32) * scale


@triton.jit
def _samples(p_logits, o_i, o_j, o_k, m, w, pitch):
    """The classes `o_k` at low-resolution positions, [positions, classes] fp32."""
    p = p_logits + ((o_i.to(tl.int64) * w + o_j) * pitch)[:, None] + o_k[None, :]
    # Bounded by the pitch, a multiple of 16: the number of classes would split the vector loads.
    return tl.load(p, mask=m[:, None] & (o_k < pitch)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _class_of(b_label, K):
    """Labels as int32, -1 if they are no class; compared before they could lose bits."""
    return tl.where((b_label >= 0) & (b_label < K), b_label.to(tl.int32), -1)


@triton.jit
def _mix(b_0, b_1, b_f):
    return b_0 * (1.0 - b_f)[:, None] + b_1 * b_f[:, None]


_SIZES = ["K", "h", "w", "H", "W", "n_y", "n_x", "rows", "strip", "ignore_index"]


@triton.jit(do_not_specialize=_SIZES)
def _upsample_cross_entropy_fwd_kernel(
    p_logits, p_labels, p_loss, p_lse,
    pitch, K, h, w, H, W, n_y, n_x, rows, ignore_index, scale_y, scale_x,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (cell blocks * B, parts): `rows` lines of the pixels of BLOCK_M cells, all classes."""
    n_cells = (h + 1) * (w + 1)
    n_m = tl.cdiv(n_cells, BLOCK_M)
    i_b = (tl.program_id(0) // n_m).to(tl.int64)
    p_logits += i_b * h * w * pitch
    i_pixels = i_b * H * W
    o_cell = (tl.program_id(0) % n_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_cell = o_cell < n_cells
    o_i, o_j = o_cell // (w + 1) - 1, o_cell % (w + 1) - 1
    o_k = tl.arange(0, BLOCK_K)

    o_top, o_bottom = tl.maximum(o_i, 0), tl.minimum(o_i + 1, h - 1)
    o_left, o_right = tl.maximum(o_j, 0), tl.minimum(o_j + 1, w - 1)
    b_00 = _samples(p_logits, o_top, o_left, o_k, m_cell, w, pitch)
    b_01 = _samples(p_logits, o_top, o_right, o_k, m_cell, w, pitch)
    b_10 = _samples(p_logits, o_bottom, o_left, o_k, m_cell, w, pitch)
    b_11 = _samples(p_logits, o_bottom, o_right, o_k, m_cell, w, pitch)
    y_first, y_stop = _first_pixel(o_i, H, h), _first_pixel(o_i + 1, H, h)
    x_first, x_stop = _first_pixel(o_j, W, w), _first_pixel(o_j + 1, W, w)

    LOG2_E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    # Finite, as a weight of 0 times infinity would be NaN.
    NEVER: tl.constexpr = -1.0e30
    i_y = tl.program_id(1) * rows
    for i_row in tl.range(i_y, tl.minimum(i_y + rows, n_y)):
        o_y = y_first + i_row
        m_y = m_cell & (o_y < y_stop)
        b_fy = _fraction(o_y, o_i, H, h, scale_y)
        b_l = tl.where((o_k < K)[None, :], _mix(b_00, b_10, b_fy), NEVER)
        b_r = tl.where((o_k < K)[None, :], _mix(b_01, b_11, b_fy), NEVER)
        o_line = i_pixels + o_y.to(tl.int64) * W
        for i_column in tl.range(0, n_x):
            o_x = x_first + i_column
            m = m_y & (o_x < x_stop)
            b_label = tl.load(p_labels + o_line + o_x, mask=m, other=0)
            m_valid = b_label != ignore_index
            b_class = _class_of(b_label, K)
            b_v = _mix(b_l, b_r, _fraction(o_x, o_j, W, w, scale_x))
            b_max = tl.max(b_v, 1)
            b_sum = tl.sum(tl.math.exp2((b_v - b_max[:, None]) * LOG2_E), 1)
            b_target = tl.sum(tl.where(o_k[None, :] == b_class[:, None], b_v, 0.0), 1)
            b_target = tl.where(b_class >= 0, b_target, float("nan"))
            b_log = tl.math.log2(b_sum) * LN2
            tl.store(
                p_loss + o_line + o_x, tl.where(m_valid, (b_max - b_target) + b_log, 0.0), mask=m
            )
            tl.store(p_lse + o_line + o_x, b_max + b_log, mask=m)


@triton.jit
def _add_cells(
    b_row, b_l, b_r, p_labels, p_lse, p_grad, o_line, o_j, o_k, m_y,
    K, w, W, n_x, ignore_index, scale_x,
    RIGHT: tl.constexpr,
):  # fmt: skip
    """Add a line of pixels of the cells `o_j`, by their weight for the right or left corner."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    x_first, x_stop = _first_pixel(o_j, W, w), _first_pixel(o_j + 1, W, w)
    for i_column in tl.range(0, n_x):
        o_x = x_first + i_column
        m = m_y & (o_x < x_stop)
        b_label = tl.load(p_labels + o_line + o_x, mask=m, other=0)
        m_valid = m & (b_label != ignore_index)
        b_grad = tl.load(p_grad + o_line + o_x, mask=m_valid, other=0.0)
        # Beyond its cell a value is extrapolated and could overflow: there p = exp(-inf) = 0.
        b_lse = tl.load(p_lse + o_line + o_x, mask=m_valid, other=float("inf")) * LOG2_E
        b_f = _fraction(o_x, o_j, W, w, scale_x)
        b_p = tl.math.exp2(_mix(b_l, b_r, b_f) * LOG2_E - b_lse[:, None])
        b_p = tl.where(o_k[None, :] == _class_of(b_label, K)[:, None], b_p - 1.0, b_p)
        if RIGHT:
            b_grad *= b_f
        else:
            b_grad *= 1.0 - b_f
        b_row += b_p * b_grad[:, None]
    return b_row


@triton.jit(do_not_specialize=_SIZES)
def _upsample_cross_entropy_bwd_kernel(
    p_logits, p_labels, p_lse, p_grad, p_dlogits,
    pitch, K, h, w, H, W, n_y, n_x, strip, ignore_index, scale_y, scale_x,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks * B, class blocks): BLOCK_M columns, each of one strip of sample rows."""
    n_columns = tl.cdiv(h, strip) * w
    n_m = tl.cdiv(n_columns, BLOCK_M)
    i_b = (tl.program_id(0) // n_m).to(tl.int64)
    p_logits += i_b * h * w * pitch
    p_dlogits += i_b * h * w * K
    i_pixels = i_b * H * W
    o_column = (tl.program_id(0) % n_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_column = o_column < n_columns
    o_first, o_j = (o_column // w) * strip, o_column % w
    o_left, o_right = tl.maximum(o_j - 1, 0), tl.minimum(o_j + 1, w - 1)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)

    b_here = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i_row in tl.range(-1, strip):
        o_i = o_first + i_row
        m_i = m_column & (o_i < h)
        o_top, o_bottom = tl.maximum(o_i, 0), tl.minimum(o_i + 1, h - 1)
        b_tl = _samples(p_logits, o_top, o_left, o_k, m_i, w, pitch)
        b_tm = _samples(p_logits, o_top, o_j, o_k, m_i, w, pitch)
        b_tr = _samples(p_logits, o_top, o_right, o_k, m_i, w, pitch)
        b_bl = _samples(p_logits, o_bottom, o_left, o_k, m_i, w, pitch)
        b_bm = _samples(p_logits, o_bottom, o_j, o_k, m_i, w, pitch)
        b_br = _samples(p_logits, o_bottom, o_right, o_k, m_i, w, pitch)
        y_first, y_stop = _first_pixel(o_i, H, h), _first_pixel(o_i + 1, H, h)
        b_below = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for i_y in tl.range(0, n_y):
            o_y = y_first + i_y
            m_y = m_i & (o_y < y_stop)
            b_fy = _fraction(o_y, o_i, H, h, scale_y)
            b_l, b_m, b_r = _mix(b_tl, b_bl, b_fy), _mix(b_tm, b_bm, b_fy), _mix(b_tr, b_br, b_fy)
            o_line = i_pixels + o_y.to(tl.int64) * W
            b_row = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            b_row = _add_cells(
                b_row, b_l, b_m, p_labels, p_lse, p_grad, o_line, o_j - 1, o_k, m_y,
                K, w, W, n_x, ignore_index, scale_x, True,
            )  # fmt: skip
            b_row = _add_cells(
                b_row, b_m, b_r, p_labels, p_lse, p_grad, o_line, o_j, o_k, m_y,
                K, w, W, n_x, ignore_index, scale_x, False,
            )  # fmt: skip
            b_here += b_row * (1.0 - b_fy)[:, None]
            b_below += b_row * b_fy[:, None]
        # The row above the strip belongs to others: it is walked over for what it adds below.
        m_store = m_i & (o_i >= o_first)
        p_out = p_dlogits + ((o_i.to(tl.int64) * w + o_j) * K)[:, None] + o_k[None, :]
        tl.store(
            p_out, b_here.to(p_dlogits.dtype.element_ty), mask=m_store[:, None] & (o_k < K)[None, :]
        )
        b_here = b_below


def _class_rows(logits: torch.Tensor) -> torch.Tensor:
    """[B, K, h, w] -> [B, h, w, pitch] in contiguous memory, zeros behind the K classes."""
    classes = logits.shape[1]
    rows = logits.permute(0, 2, 3, 1)
    pitch = -(-classes // CLASS_PITCH) * CLASS_PITCH
    if pitch == classes:
        return last_dim_contiguous(rows.contiguous())
    return torch.constant_pad_nd(rows, (0, pitch - classes)).contiguous()


def _geometry(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[tuple[int, ...], tuple[float, float]]:
    """(K, h, w, H, W, pixel rows and columns of a cell) and (1 / 2H, 1 / 2W)."""
    _, classes, h, w = logits.shape
    height, width = labels.shape[1:]
    return (
        (classes, h, w, height, width, cdiv(height, h), cdiv(width, w)),
        (0.5 / height, 0.5 / width),
    )


def upsample_cross_entropy_fwd(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and lse, [B, H, W] fp32, of logits [B, K, h, w] and integer labels [B, H, W].

    Any strides; copied are logits unless dense and channels-last with K a multiple of 16, and
    labels unless contiguous.
    """
    loss, lse = empty_like(labels, torch.float32), empty_like(labels, torch.float32)
    if labels.numel() == 0:
        return loss, lse
    rows, labels = _class_rows(logits), labels.contiguous()
    sizes, scales = _geometry(logits, labels)
    arch, num_sms = device_facts(logits.device)
    tile = upsample_cross_entropy_fwd_config(arch, logits.shape[1])
    _, h, w, *_, n_y, _ = sizes
    programs = cdiv((h + 1) * (w + 1), tile.block_m) * len(labels)
    lines = upsample_cross_entropy_lines(arch, programs, n_y, num_sms)
    launch(
        _upsample_cross_entropy_fwd_kernel, (programs, cdiv(n_y, lines)),
        rows, labels, loss, lse, rows.shape[-1], *sizes, lines, ignore_index, *scales,
        **tile.launch, **tile.blocks,
    )  # fmt: skip
    return loss, lse


def upsample_cross_entropy_bwd(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    """d logits [B, K, h, w] in channels-last memory, in the dtype of logits, for grad [B, H, W]."""
    batch, classes, h, w = logits.shape
    out = logits.new_empty((batch, h, w, classes))
    if labels.numel() == 0 or out.numel() == 0:
        return out.zero_().permute(0, 3, 1, 2)
    rows, labels, lse, grad = (
        _class_rows(logits),
        labels.contiguous(),
        lse.contiguous(),
        grad.contiguous(),
    )
    sizes, scales = _geometry(logits, labels)
    arch, num_sms = device_facts(logits.device)
    tile = upsample_cross_entropy_bwd_config(arch, classes)
    blocks = cdiv(classes, tile.block_k)
    strip = upsample_cross_entropy_strip(batch * blocks * w, h, tile, num_sms)
    columns = cdiv(h, strip) * w
    launch(
        _upsample_cross_entropy_bwd_kernel, (cdiv(columns, tile.block_m) * batch, blocks),
        rows, labels, lse, grad, out, rows.shape[-1], *sizes, strip, ignore_index, *scales,
        **tile.launch, **tile.blocks,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


# Logits are copied to rows of whole vectors whatever their number of classes.
_PADDED = ("p_logits", "p_loss", "p_lse", "p_dlogits", "pitch")

# Numbers of classes: one for every width of a block; 25 and 150 are DeLiVER's and ADE20K's.
_OFFLINE = (
    ("bf16", "u8", (2, 25, 64, 128, 150), None),
    ("fp16", "i64", (25,), None),
    ("fp32", "i64", (2, 25, 64, 128, 150), None),
    ("bf16", "u8", (150,), _PADDED),
    ("fp32", "i64", (150,), _PADDED),
)


def offline_entries(arch: int) -> Iterator[OfflineEntry]:
    """Every specialisation that the launchers choose on `arch` for aligned inputs, and examples of
    unaligned ones."""
    for dtype, labels, numbers, aligned in _OFFLINE:
        pointers = {"p_logits": dtype, "p_labels": labels, "p_dlogits": dtype}
        pointers |= dict.fromkeys(("p_loss", "p_lse", "p_grad"), "fp32")
        for kernel, choose in (
            (_upsample_cross_entropy_fwd_kernel, upsample_cross_entropy_fwd_config),
            (_upsample_cross_entropy_bwd_kernel, upsample_cross_entropy_bwd_config),
        ):
            for tile in dict.fromkeys(choose(arch, classes) for classes in numbers):
                yield offline_entry(
                    kernel, f"{dtype} {labels} K{tile.block_k} M{tile.block_m}", pointers,
                    tile.blocks, **tile.launch, scores=tile.block_m * tile.block_k,
                    floats=("scale_y", "scale_x"), aligned=aligned,
                )  # fmt: skip

"""Launch configurations as a function of the architecture, the precision and the padded head
dimension.

Pure Python, no Triton: nothing is measured or searched when a model runs, so the same input gives
the same bits. The numbers come from compiling every entry offline (`python -m benchmarks
resources`): the largest tiles without spilled registers and within the shared memory of the
architecture, with the tensor-core instruction of that architecture (wgmma wants at least 64 rows
per group of four warps).

Architectures are `major * 10 + minor` of the compute capability; 0 stands for Triton's interpreter,
where time is the number of programs times operations, so tiles are large and only as small as lets
loops be exercised by short inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from equiseg_fast.kernels._tuned import at_least, remembered, tunable

INTERPRETER = 0

HALF, TF32, IEEE = "half", "tf32", "ieee"
PRECISIONS = (HALF, TF32, IEEE)
"""16-bit operands; fp32 operands rounded to TF32; fp32 operands multiplied as fp32."""

HEAD_DIMS = (16, 32, 64, 128)
"""Padded head dimensions."""

LEAST_PRODUCT = 16
"""Terms of a sum of products on tensor cores; Triton refuses fewer."""


@dataclass(frozen=True)
class TileConfig:
    """`block_m` queries by `block_n` keys per step, and the warps and pipeline stages for them.

    `lean` kernels contain their products once: no separate anchor or last block. Where operands
    pass through registers, each further copy of a product keeps them there for longer (spills of
    kilobytes were seen), and the few instructions per score that a lean kernel has on top vanish
    beside the products. Only the forward and the dQ kernel know the difference.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    lean: bool = False

    def launch(self) -> dict[str, int]:
        """The launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def precision_class(itemsize: int, allow_tf32: bool) -> str:
    """The class of a floating dtype of `itemsize` bytes."""
    if itemsize == 2:
        return HALF
    return TF32 if allow_tf32 else IEEE


def padded_head_dim(head_dim: int) -> int:
    """The smallest supported tile width that holds `head_dim`."""
    for padded in HEAD_DIMS:
        if 1 <= head_dim <= padded:
            return padded
    raise ValueError(f"head_dim must be between 1 and {HEAD_DIMS[-1]}, got {head_dim}")


_ARGUMENTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch": (
        "0 for the interpreter, or 10 * major + minor of a compute capability from 8.0 on",
        lambda x: x == INTERPRETER or 80 <= x < 200,
    ),
    "precision": (f"one of {', '.join(PRECISIONS)}", lambda x: x in PRECISIONS),
    "head_dim": (
        f"one of {', '.join(map(str, HEAD_DIMS))}, or less than 128 and no multiple of 16",
        lambda x: 1 <= x <= HEAD_DIMS[-1] and attention_width(x) == x,
    ),
    "itemsize": ("2 or 4", lambda x: x in (2, 4)),
    **dict.fromkeys(
        ("channels", "classes", "num_classes", "modalities"),
        ("a positive integer", lambda x: x > 0),
    ),
}


def argument_problem(name: str, value: Any) -> str:
    """What an argument of the functions below must be, if the value is no such thing; else ""."""
    allowed, fits = _ARGUMENTS[name]
    kind = str if name == "precision" else int
    return "" if type(value) is kind and fits(value) else allowed


def _operands_in_shared_memory(arch: int) -> bool:
    """Whether matrix products read their operands from shared memory (wgmma, tcgen05).

    Elsewhere (mma.sync) operands live in registers, which are then too few for the head dimension
    128 unless tiles are narrow and the loop is the lean one.
    """
    return arch in (90, 100)


def has_mma_sync(arch: int) -> bool:
    """Whether operands of matrix products pass through registers, as on all but sm_90 to sm_110."""
    return arch < 90 or arch >= 120


_FEW_THREADS = (86, 87, 89)
"""With 1536 threads per SM instead of 2048: the compiler rather spills than gives up a resident
program, as it does for sm_100 and later."""


def is_odd(size: int) -> bool:
    """Whether rows of `size` elements rule out vectors: then every element has an address of its
    own in registers, and tiles have to be smaller not to spill."""
    return size % 16 != 0


def attention_width(head_dim: int) -> int:
    """What the configurations of attention depend on: the padded dimension, or, odd ones, each its
    own."""
    return head_dim if is_odd(head_dim) else padded_head_dim(head_dim)


def _odd_attention(arch: int, precision: str, head_dim: int) -> TileConfig:
    """Forward and dQ where rows have no vectors."""
    if precision == IEEE:
        return _ieee_config(padded_head_dim(head_dim))
    in_registers = has_mma_sync(arch)
    if head_dim > 64 and not in_registers:
        return TileConfig(64, 16, 8, 1, lean=True)
    if precision == HALF:
        return TileConfig(64, 32, 8 if in_registers else 4, 2, lean=True)
    return TileConfig(32, 16, 4, 2, True) if in_registers else TileConfig(64, 16, 4, 1, True)


@tunable
@at_least(lambda *_: {"block_n": LEAST_PRODUCT})
def attention_fwd_config(arch: int, precision: str, head_dim: int) -> TileConfig:
    """Tiles of the forward kernel; the loop runs over keys.

    Eight warps on 128 x 64 scores stay within 128 registers up to a head dimension of 64 on sm_90:
    two programs share a multiprocessor, and one computes exponentials while the other multiplies.
    """
    if arch == INTERPRETER:
        return TileConfig(128, 64, 4, 1)
    if is_odd(head_dim):
        return _odd_attention(arch, precision, head_dim)
    if precision == IEEE:
        return _ieee_config(head_dim)
    if head_dim == 128 and has_mma_sync(arch):
        if precision == TF32:
            return TileConfig(32, 32, 4, 2, lean=True)
        return TileConfig(64, 64, 8, 2, lean=True)
    if precision == TF32:
        return TileConfig(64, {16: 64, 32: 64, 64: 32, 128: 16}[head_dim], 4, 2)
    return TileConfig(128, 64, 8, 3 if head_dim <= 32 else 2)


@tunable
@at_least(lambda *_: {"block_m": LEAST_PRODUCT})
def attention_dkdv_config(arch: int, precision: str, head_dim: int) -> TileConfig:
    """Tiles of the kernel for dK and dV; the loop runs over queries."""
    if arch == INTERPRETER:
        return TileConfig(64, 64, 4, 1)
    if is_odd(head_dim):
        if precision == IEEE:
            return TileConfig(16, 16, 8, 1)
        wide, in_registers = head_dim > 64, has_mma_sync(arch)
        if precision == TF32:
            return TileConfig(16, 32 if wide or in_registers else 64, 8 if wide else 4, 1)
        if in_registers:
            return TileConfig(32, 64, 8, 1)
        return TileConfig(16, 64, 8, 1) if wide else TileConfig(32, 64, 4, 2)
    if precision == IEEE:
        if head_dim <= 64:
            return TileConfig(32, 32, 4 if head_dim <= 32 else 8, 1)
        return TileConfig(16, 32, 8, 1)
    if precision == TF32:
        if head_dim <= 32:
            return TileConfig(32, 64, 4, 2)
        if has_mma_sync(arch):
            return TileConfig(32, 32, 4 if head_dim == 64 else 8, 2)
        return TileConfig(32 if head_dim == 64 else 16, 64, 4, 2)
    if has_mma_sync(arch) and head_dim >= 64:
        return TileConfig(32, 128, 8, 2) if head_dim == 64 else TileConfig(64, 64, 8, 2)
    return TileConfig(64 if head_dim <= 64 else 32, 128, 8, 2)


@tunable
@at_least(lambda *_: {"block_n": LEAST_PRODUCT})
def attention_dq_config(arch: int, precision: str, head_dim: int) -> TileConfig:
    """Tiles of the kernel for dQ; the loop runs over keys."""
    if arch == INTERPRETER:
        return TileConfig(128, 64, 4, 1)
    if is_odd(head_dim):
        if head_dim > 64 and not has_mma_sync(arch) and precision != IEEE:
            half = precision == HALF
            return TileConfig(128, 16, 8, 1, True) if half else TileConfig(32, 16, 4, 2, True)
        return _odd_attention(arch, precision, head_dim)
    if precision == IEEE:
        if head_dim <= 32 and arch in _FEW_THREADS:
            return TileConfig(32, 32, 4, 1, lean=True)
        return _ieee_config(head_dim)
    if head_dim == 128 and has_mma_sync(arch):
        if precision == TF32:
            return TileConfig(32, 32, 4, 2, lean=True)
        return TileConfig(64, 64, 8, 2, lean=True)
    if precision == TF32:
        if head_dim == 64 and arch in _FEW_THREADS:
            return TileConfig(32, 32, 4, 2, lean=True)
        return TileConfig(64, 32, 4, 2)
    return TileConfig(128, 32 if head_dim == 16 and has_mma_sync(arch) else 64, 8, 2)


def _ieee_config(head_dim: int) -> TileConfig:
    if head_dim <= 32:
        return TileConfig(64, 32, 4, 1, lean=True)
    if head_dim == 64:
        return TileConfig(64, 32, 8, 1, lean=True)
    return TileConfig(32, 16, 8, 1, lean=True)


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
def query_splits(programs: int, query_blocks: int, processors: int) -> tuple[int, int]:
    """How to cut the query loop of the dK/dV kernel: (splits, query blocks per split).

    `programs` (key blocks times batch times heads) may be far below the number of multiprocessors,
    because the keys are few; then every program would walk a very long chain of queries while most
    of the device idles. The estimate is waves times (chain + fixed cost of a program), plus the
    second pass where there is one, in units of one query block. Splits never are empty and together
    cover all query blocks.
    """
    best = (float("inf"), 1, query_blocks)
    for wanted in range(1, min(_MAX_SPLITS, max(1, query_blocks // _MIN_CHUNK)) + 1):
        chunk = -(-query_blocks // wanted)
        splits = -(-query_blocks // chunk)
        waves = -(-programs * splits // processors)
        cost = waves * (chunk + _PROGRAM_OVERHEAD) + (_REDUCTION_OVERHEAD if splits > 1 else 0)
        best = min(best, (cost, splits, chunk))
    return best[1], best[2]


QUERY_HUB_MODALITIES = 8
"""The most modalities that the query hub takes: a byte holds two of them."""


@dataclass(frozen=True)
class MapTile:
    """`block_h` rows by `block_w` columns of tokens by `block_c` channels."""

    block_h: int
    block_w: int
    block_c: int
    num_warps: int

    def count(self, height: int, width: int) -> int:
        """Tiles of a map."""
        return -(-height // self.block_h) * -(-width // self.block_w)

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_H": self.block_h, "BLOCK_W": self.block_w, "BLOCK_C": self.block_c}


@dataclass(frozen=True)
class TokenTile:
    """`block_l` consecutive tokens by `block_c` channels."""

    block_l: int
    block_c: int
    num_warps: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_L": self.block_l, "BLOCK_C": self.block_c}


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def channel_block(channels: int, largest: int = 64) -> int:
    """The widest block of channels, 32 to `largest`, that wastes the fewest in the last block."""
    blocks = [b for b in (32, 64, 128) if b <= max(32, largest)]
    return min(blocks, key=lambda b: (-(-channels // b) * b, -b))


def _map_tile(tokens: int, block_c: int, num_warps: int) -> MapTile:
    """Square, or twice as wide as high: the fewest neighbours outside."""
    block_h = 1 << (tokens.bit_length() - 1) // 2
    return MapTile(block_h, tokens // block_h, block_c, num_warps)


def _hub_warps(arch: int, itemsize: int, channels: int) -> int:
    """Warps of a tile: twice as many where loads in flight take the registers."""
    return 8 if itemsize == 4 or is_odd(channels) or arch >= 100 else 4


def _hub_elements(channels: int) -> int:
    """Tokens times channels of a tile."""
    if channels < 16:  # nearly all of a tile is padding
        return 256
    return 1024 if is_odd(channels) else 2048


def query_hub_max_registers(arch: int) -> int | None:
    """Registers per thread that the kernels may take; None leaves it to the compiler.

    Some would rather spill than give up a resident program.
    """
    return 255 if arch >= 100 or arch in _FEW_THREADS else None


@tunable
def query_hub_fwd_config(arch: int, itemsize: int, channels: int) -> MapTile:
    """Tiles of the forward kernel.

    Up to 128 channels they hold all of them and compute the scores too. Beyond, they stream blocks
    of channels, and the scores come from a kernel with the tiles of `query_hub_score_config`.
    """
    if channels > 128:
        return query_hub_score_config(arch, itemsize, channels)
    if arch == INTERPRETER:
        return MapTile(8, 16, _power_of_two(channels), 4)
    block_c = max(16, _power_of_two(channels))
    tokens = _hub_elements(channels) // block_c
    return _map_tile(tokens, block_c, _hub_warps(arch, itemsize, channels))


@tunable
def query_hub_score_config(arch: int, itemsize: int, channels: int) -> MapTile:
    """Tiles of the kernel that computes scores alone."""
    if arch == INTERPRETER:
        return MapTile(8, 16, 128, 4)
    block_c = channel_block(channels)
    tokens = _hub_elements(channels) // block_c
    return _map_tile(tokens, block_c, _hub_warps(arch, itemsize, channels))


@tunable
def query_hub_bwd_score_config(arch: int, itemsize: int, channels: int) -> TokenTile:
    """Tiles of the backward kernel that sums over channels; the loop runs over them."""
    if arch == INTERPRETER:
        return TokenTile(128, 128, 4)
    block_c = channel_block(channels)
    # For sm_80 and its like the compiler spills even with half of the other tiles.
    halves = 2 if is_odd(channels) and arch < 90 else 1
    tokens = _hub_elements(channels) // halves // block_c
    return TokenTile(tokens, block_c, _hub_warps(arch, itemsize, channels))


@tunable
def query_hub_dx_config(arch: int, itemsize: int, channels: int) -> TokenTile:
    """Tiles of the kernel for dx."""
    return query_hub_bwd_score_config(arch, itemsize, channels)


@tunable
def query_hub_dweight_config(arch: int, itemsize: int, channels: int) -> TokenTile:
    """Tiles of the kernel for dweight; the loop runs over tokens, nine sums stay in registers."""
    if arch == INTERPRETER:
        return TokenTile(64, 128, 4)
    block_c = channel_block(channels)
    return TokenTile(_hub_elements(channels) // 2 // block_c, block_c, 4)


_PROGRAMS_PER_PROCESSOR = 4


def token_chunks(programs: int, token_blocks: int, processors: int) -> tuple[int, int]:
    """How to share out a sum over blocks of tokens: (chunks, blocks per chunk).

    `programs` is the number of independent sums. Chunks never are empty and together cover all.
    """
    wanted = max(1, -(-_PROGRAMS_PER_PROCESSOR * processors // programs))
    chunk = -(-token_blocks // min(wanted, token_blocks))
    return -(-token_blocks // chunk), chunk


GATE_SUM_TILE = (32, 16)
"""Chunks and channels of one step of the kernel that adds up the gradient of the gate's logits."""


def padded_modalities(modalities: int) -> int:
    """How many modalities a tile of the gate has room for."""
    return _power_of_two(modalities)


def _gate_tile(
    arch: int, modalities: int, channels: int, elements: int, num_warps: int
) -> TokenTile:
    """The tile of one modality, when the tiles of all modalities together have `elements`."""
    if arch == INTERPRETER:
        return TokenTile(64, 64, 4)
    block_c = channel_block(channels)
    block_l = elements // (padded_modalities(modalities) * block_c)
    return TokenTile(block_l, block_c, num_warps)


@tunable
def guided_gate_fwd_config(arch: int, itemsize: int, modalities: int, channels: int) -> TokenTile:
    """Tiles of the forward kernel: enough tokens to keep all modalities of one in one thread."""
    return _gate_tile(arch, modalities, channels, 4096, 8 if itemsize == 4 else 4)


@tunable
def guided_gate_bwd_config(arch: int, modalities: int, channels: int) -> TokenTile:
    """Tiles of the backward kernel; the loop runs over tokens, the sums stay in registers."""
    # The compiler for sm_100 rather spills than gives up a resident program of four warps.
    return _gate_tile(arch, modalities, channels, 2048, 8 if arch >= 100 else 4)


CLASS_SUMS_STAGES = 3
"""Pipeline stages of the kernel that adds up the features of every class."""

CLASS_MEANS_TILE = (16, 128)
"""Chunks and elements of one step of the kernel that divides sums of classes by their counts."""


def padded_classes(arch: int, num_classes: int) -> int:
    """Rows of the one-hot matrix: wgmma and tcgen05 multiply at least 64, mma.sync 16."""
    return max(64 if arch in (90, 100) else 16, _power_of_two(num_classes))


@tunable
@at_least(lambda *_: {"block_l": LEAST_PRODUCT})
def class_sums_config(arch: int, itemsize: int, num_classes: int, channels: int) -> TokenTile:
    """Tiles of the kernel that adds up the features of every class; the loop runs over tokens."""
    if arch == INTERPRETER:
        return TokenTile(64, 64, 4)
    classes = padded_classes(arch, num_classes)
    many, wide = classes > 64, itemsize == 4
    block_l = 16 if wide and classes > 128 else 32 if wide or many or is_odd(channels) else 64
    return TokenTile(block_l, 32 if wide and many else channel_block(channels), 8 if many else 4)


@tunable
def class_gather_config(arch: int, channels: int) -> TokenTile:
    """Tiles of the kernel that hands the gradients of prototypes to their tokens."""
    if arch == INTERPRETER:
        return TokenTile(128, 64, 4)
    block_c = channel_block(channels, largest=128)
    return TokenTile(4096 // block_c, block_c, 4)


@dataclass(frozen=True)
class RowTile:
    """`block_w` tokens of one row by `block_c` channels; the loop runs down the rows of a strip."""

    block_w: int
    block_c: int
    num_warps: int


def _mixer_tile(arch: int, channels: int, elements: int, num_warps: int) -> RowTile:
    if arch == INTERPRETER:
        return RowTile(32, 64, 4)
    block_c = channel_block(channels)
    # Odd widths: half as many, so that the addresses of all fit into registers.
    return RowTile(elements // (2 if is_odd(channels) else 1) // block_c, block_c, num_warps)


@tunable
def pooling_mixer_conv_config(arch: int, channels: int) -> RowTile:
    """Tiles of the 7x7 convolution: beside 49 weights a thread has room for two elements."""
    return _mixer_tile(arch, channels, 256, 4)


@tunable
def pooling_mixer_pool_config(arch: int, channels: int) -> RowTile:
    """Tiles of the pools: 24 sums in the making; four elements a thread make loads of 16 bytes."""
    return _mixer_tile(arch, channels, 512, 4)


@tunable
def pooling_mixer_dweight_config(arch: int, channels: int) -> RowTile:
    """Tiles of the gradients of the weights: 50 sums, 7 rows and 7 shifts."""
    # For sm_90 the compiler spills with one element per thread, not with two.
    return _mixer_tile(arch, channels, 512 if is_odd(channels) and arch == 90 else 256, 4)


def pooling_mixer_reduce_config(arch: int) -> tuple[int, int]:
    """Partial sums and numbers of one step of the kernel that adds the gradients of the weights."""
    return (8, 1024) if arch == INTERPRETER else (32, 32)


_MIXER_INTERPRETER_ROWS = 16
_MIXER_RESIDENT = 3
_MIXER_OVERHEAD = 8


@remembered
def pooling_mixer_rows(arch: int, columns: int, height: int, half: int, processors: int) -> int:
    """The rows of a strip of an image of `height` rows, where `columns` programs work abreast.

    A strip also walks through the `half` rows before and after it: long strips waste less, short
    ones fill the device. The estimate is waves times (rows walked + fixed cost of a program).
    """
    if arch == INTERPRETER:
        return min(height, _MIXER_INTERPRETER_ROWS)
    best = (float("inf"), height)
    for wanted in range(1, -(-height // 8) + 1):
        rows = -(-height // wanted)
        strips = columns * -(-height // rows)
        waves = -(-strips // (processors * _MIXER_RESIDENT))
        best = min(best, (waves * (rows + 2 * half + _MIXER_OVERHEAD), rows))
    return best[1]


def pooling_mixer_chunks(strips: int, blocks: int, processors: int) -> tuple[int, int]:
    """How to share out a sum over strips for `blocks` channel blocks: (programs, strips each)."""
    wanted = max(1, -(-2 * _MIXER_RESIDENT * processors // blocks))
    chunk = -(-strips // min(wanted, strips))
    return -(-strips // chunk), chunk


CLASS_PITCH = 16
"""Classes of a row of logits are padded to a multiple of this, so that Triton loads vectors."""

_CLASS_BLOCK = 32
_RESIDENT = 12
_MAX_STRIP = 8


def _class_tile(arch: int, block_k: int, elements: int) -> TileConfig:
    if arch == INTERPRETER:
        return TileConfig(64, block_k, 4, 1)
    return TileConfig(max(1, elements // block_k), block_k, 2, 1)


@tunable
@at_least(lambda arch, classes: {"block_n": classes})
def upsample_cross_entropy_fwd_config(arch: int, classes: int) -> TileConfig:
    """`block_m` cells by all classes (`block_n`)."""
    block_k = max(CLASS_PITCH, 1 << (classes - 1).bit_length())
    return _class_tile(arch, block_k, 512)


@tunable
def upsample_cross_entropy_bwd_config(arch: int, classes: int) -> TileConfig:
    """`block_m` columns by a block of classes (`block_n`)."""
    return _class_tile(arch, CLASS_PITCH if classes <= CLASS_PITCH else _CLASS_BLOCK, 512)


def upsample_cross_entropy_lines(arch: int, programs: int, lines: int, processors: int) -> int:
    """Pixel lines of its cells that a forward program walks over: fewer where programs are few."""
    if arch == INTERPRETER:
        return lines
    parts = max(1, processors * _RESIDENT // programs)
    return -(-lines // min(parts, lines))


@remembered
def upsample_cross_entropy_strip(
    columns: int, rows: int, config: TileConfig, processors: int
) -> int:
    """Rows of samples of one backward program; `columns` in all images and class blocks.

    A strip of s rows costs s + 1, and long strips leave processors idle. It changes no result.
    """
    costs = []
    for strip in range(1, min(_MAX_STRIP, rows) + 1):
        programs = -(-columns * -(-rows // strip) // config.block_m)
        costs.append((-(-programs // (processors * _RESIDENT)) * (strip + 1), strip))
    return min(costs)[1]


@dataclass(frozen=True)
class StripConfig:
    """Programs that walk down strips of `block_w` columns and `block_c` channels.

    By their registers, `resident` of them fit on one multiprocessor.
    """

    block_w: int
    block_c: int
    num_warps: int
    resident: int


def _strip(channels: int, num_warps: int, resident: int) -> StripConfig:
    block_c = 64 if channels > 32 else 32
    return StripConfig(512 // block_c, block_c, num_warps, resident)


@tunable
def depthwise_conv_config(arch: int, itemsize: int, channels: int) -> StripConfig:
    """Strips of the 3x3 depthwise convolution: every thread loads 16 bytes at a time."""
    if arch == INTERPRETER:
        return StripConfig(64, 64, 4, 1)
    return _strip(channels, 2, 6) if itemsize == 2 else _strip(channels, 4, 4)


def depthwise_bwd_max_registers(itemsize: int) -> int | None:
    """Per thread of the backward in half precision, where sm_80 takes more without need; None
    leaves it to the compiler."""
    return 136 if itemsize == 2 else None


@tunable
def depthwise_bwd_config(arch: int, channels: int) -> StripConfig:
    """Strips of its backward: ten sums leave registers for four elements per thread."""
    if arch == INTERPRETER:
        return StripConfig(64, 64, 4, 1)
    # The compiler for sm_120 rather spills than gives up a resident program of four warps.
    return _strip(channels, 8, 2) if arch >= 120 else _strip(channels, 4, 3)


SUMS_TILE = {"BLOCK_N": 128, "BLOCK_C": 32}
"""Partial sums and channels that a program of the second pass adds at a time."""

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


def _norm_tile(channels: int, elements: int, num_warps: int) -> TokenTile:
    """Whole rows; a row of more than `elements` gets more warps instead of more per thread."""
    block_c = max(16, _power_of_two(channels))
    wide = max(1, block_c // elements)
    return TokenTile(max(1, elements // block_c), block_c, num_warps * wide)


@tunable
@at_least(lambda arch, channels: {"block_c": channels})
def norm_fwd_config(arch: int, channels: int) -> TokenTile:
    """Rows that a program adds and normalises: 16 elements of either input per thread, on any
    architecture."""
    return _norm_tile(channels, 4096, 8)


NORM_BWD_REGISTERS = 128
"""Per thread of the backward. With four warps all programs that `token_chunks` makes are resident;
left alone the compiler takes more, or, for sm_100, rather spills than takes more than 96."""


@tunable
@at_least(lambda arch, itemsize, channels: {"block_c": channels})
def norm_bwd_config(arch: int, itemsize: int, channels: int) -> TokenTile:
    """Rows of one step of its backward; two sums per element stay in registers, on any
    architecture."""
    if is_odd(channels):
        return _norm_tile(channels, 512 if channels <= 512 else 1024, 4)
    return _norm_tile(channels, 2048 if itemsize == 2 else 1024, 4)

"""Architectures: the facts that kernels and `python -m benchmarks resources` share, and tiles.

Pure Python, no Triton. An architecture is `10 * major + minor` of a compute capability; 0 stands
for Triton's interpreter, where time grows with the number of programs, so tiles are large, but
small enough that short inputs still run every loop more than once.

The launch configurations at the top of each kernel file are functions of the architecture, the
precision and numbers of channels: nothing is measured or searched when a model runs, so the same
input gives the same bits. Their numbers come from compiling every entry offline (`python -m
benchmarks resources`): the largest tiles without spilled registers and within the shared memory of
the architecture, with its tensor-core instruction.

A new architecture is one row of `ARCHITECTURES`; then `resources` compiles what is missing, and
what spills there gets smaller tiles in its kernel's file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

INTERPRETER = 0

KIB = 1024

LEAST_PRODUCT = 16
"""Terms of a sum of products on tensor cores, and rows of mma.sync; Triton refuses fewer."""


@dataclass(frozen=True)
class Architecture:
    """What is the same for all GPUs from `sm_<since>` up to the next row; `number` is the compile
    target.

    `tensor_core` is the instruction family of matrix products, `shared_limit` the bytes of shared
    memory that a program can have on any of them.

    `spills_for_occupancy`: where kernels need many registers, the compiler spills rather than lower
    occupancy, unless it is told how many they may take. It does so with 1536 threads per SM instead
    of 2048, and from sm_100 on.
    """

    number: int
    since: int
    tensor_core: str
    shared_limit: int
    spills_for_occupancy: bool

    @property
    def operands_in_registers(self) -> bool:
        """Whether operands of matrix products pass through registers; wgmma and tcgen05 read them
        from shared memory.

        Registers are then too few for wide operands, such as a head dimension of 128, unless tiles
        are narrow and the loop is a lean one.
        """
        return self.tensor_core == "mma.sync"

    @property
    def least_rows(self) -> int:
        """The fewest rows of a product by `tensor_core`; smaller ones are left to mma.sync."""
        return LEAST_PRODUCT if self.tensor_core == "mma.sync" else 64


ARCHITECTURES = (
    Architecture(80, 80, "mma.sync", 163 * KIB, False),  # A100
    Architecture(89, 86, "mma.sync", 99 * KIB, True),  # GeForce RTX 30 and 40, A10, L40S
    Architecture(90, 90, "wgmma", 227 * KIB, False),  # H100, H200
    Architecture(100, 100, "tcgen05", 227 * KIB, True),  # B200, B300
    Architecture(120, 120, "mma.sync", 99 * KIB, True),  # GeForce RTX 50
)
"""In ascending order."""


@functools.cache
def architecture(arch: int) -> Architecture:
    """The last row that begins at or before `arch`: sm_103 is treated as sm_100, sm_121 as sm_120.

    Whatever comes after the last row gets mma.sync, which every architecture has, and little shared
    memory, which is conservative. The interpreter is treated as the oldest. Raises ValueError for
    what is older than sm_80.
    """
    if arch == INTERPRETER:
        return ARCHITECTURES[0]
    rows = [row for row in ARCHITECTURES if row.since <= arch]
    if not rows:
        raise ValueError(f"arch must be 0 (the interpreter) or at least 80; got {arch}")
    return rows[-1]


HALF, TF32, IEEE = "half", "tf32", "ieee"
PRECISIONS = (HALF, TF32, IEEE)
"""16-bit operands; fp32 operands rounded to TF32; fp32 operands multiplied as fp32."""

ITEMSIZES = (2, 4)
"""Bytes of an element of fp16 or bf16, and of fp32."""


def precision_class(itemsize: int, allow_tf32: bool) -> str:
    """The class of a floating dtype of `itemsize` bytes. Raises ValueError unless these are 2 or 4:
    fp8 or fp64 would silently be treated as fp32."""
    if itemsize == 2:
        return HALF
    if itemsize == 4:
        return TF32 if allow_tf32 else IEEE
    raise ValueError(f"itemsize must be 2 (fp16, bf16) or 4 (fp32); got {itemsize}")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program works on at a time, and with how many warps and pipeline stages:
    `Tile(block_m=128, block_n=64, num_warps=8, num_stages=2)`.

    A kernel has some of the blocks, as its constexprs BLOCK_M, BLOCK_N and so on: rows m and
    columns n of a product, classes k, rows h and columns w of a map, tokens l, channels c. What it
    does not have is None.

    `lean` kernels contain their products once (see `attention`). `ctas_per_sm`: how many programs
    of a kernel that walks down strips fit on one SM, by their registers.
    """

    block_m: int | None = None
    block_n: int | None = None
    block_k: int | None = None
    block_h: int | None = None
    block_w: int | None = None
    block_l: int | None = None
    block_c: int | None = None
    num_warps: int
    num_stages: int = 1
    lean: bool | None = None
    ctas_per_sm: int | None = None

    def settings(self) -> dict[str, int]:
        """What the kernel has, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    # Every launch asks for both.

    @functools.cached_property
    def blocks(self) -> dict[str, int]:
        """The constexprs for the sizes of the tile. Callers must not modify the dictionary."""
        return {n.upper(): v for n, v in self.settings().items() if n.startswith("block_")}

    @functools.cached_property
    def launch(self) -> dict[str, int]:
        """The launch options. Callers must not modify the dictionary."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __repr__(self) -> str:
        return f"Tile({', '.join(f'{name}={value}' for name, value in self.settings().items())})"


def is_odd(size: int) -> bool:
    """Whether `size` is no multiple of 16. Then Triton, which specialises on that, cannot prove
    that rows are aligned: every element has an address of its own in registers, and tiles have to
    be smaller not to spill."""
    return size % 16 != 0


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def channel_block(channels: int, largest: int = 64) -> int:
    """The widest block of channels, 32 to `largest`, that wastes the fewest in the last block."""
    blocks = [b for b in (32, 64, 128) if b <= max(32, largest)]
    return min(blocks, key=lambda b: (-(-channels // b) * b, -b))


_CTAS_PER_SM = 4
"""Programs per SM that a sum over tokens is cut into: enough to keep loads in flight."""


def token_chunks(programs: int, token_blocks: int, num_sms: int) -> tuple[int, int]:
    """How to share out a sum over blocks of tokens: (chunks, blocks per chunk).

    `programs` is the number of independent sums. No chunk is empty, and together they cover all.
    """
    wanted = max(1, -(-_CTAS_PER_SM * num_sms // programs))
    chunk = -(-token_blocks // min(wanted, token_blocks))
    return -(-token_blocks // chunk), chunk

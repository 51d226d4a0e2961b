"""The operations of `equiseg_fast.ops`, in the order of their share of a training step.

Each is declared by its cost: what the forward and what the backward cannot do without, for a shape
and a number of bytes per element. What the docstrings add up is read or written once; weights and
statistics are nothing, and a multiply-add is 2 FLOPs.
"""

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.common import data
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.data import NUM_CLASSES
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, Unsupported, op_problem
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference

OPS: list[Op] = []
RATIO = 4
"""Hidden channels of Mix-FFN over those of its tokens."""

Formula = Callable[[Shape, int], tuple[Work, Work]]


def operation(
    inputs: Callable[[Shape], Mapping[str, Any]],
    *,
    rivals: Mapping[str, Callable[..., Any]] | None = None,
    logits: tuple[str, ...] = (),
    fields: Callable[[Shape], Mapping[str, Any]] = lambda shape: {},
    **declared: Any,
) -> Callable[[Formula], Formula]:
    """Declares the operation of that name in `ops`, `reference` and `baselines`, with the cost that
    is decorated; what its docstring says of the forward is its `Op.formula`.

    inputs: its arguments, random tensors by their size. rivals: other providers. logits: inputs in
    fp32, one vector per image. fields: of `Problem`; declared: of `Op`.
    """
    rivals = rivals or {}

    def declare(formula: Formula) -> Formula:
        name, text = formula.__name__, formula.__doc__ or ""

        def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
            arguments = dict(inputs(shape))
            for i, (key, value) in enumerate(arguments.items()):
                if key == "labels":
                    arguments[key] = data.labels(value, seed, device)
                elif isinstance(value, tuple):
                    own, scale = torch.float32 if key in logits else dtype, _deviation(key, value)
                    arguments[key] = data.random_normal(value, own, seed + i, device, scale)
            functions = backends(getattr(ops, name), getattr(baselines, name)) | rivals
            more = dict(fields(shape))
            summed = [key for key in arguments if key.endswith(("weight", "bias")) or key in logits]
            if summed:  # over all tokens
                kinds = {f"d{key}": "parameter" for key in summed}
                more |= {"kinds": kinds, "contraction": 0, "chain": shape.rows * shape.tokens}
            return op_problem(arguments, functions, getattr(reference, name), **more)

        def cost(shape: Shape, itemsize: int) -> Cost:
            forward, backward = formula(shape, itemsize)
            return Cost((forward,), (backward,))

        words = " ".join(text.removeprefix("Forward: ").partition("Backward:")[0].split())
        words = words.removesuffix(".")
        OPS.append(Op(name, build, cost, words, rivals=tuple(rivals), **declared))
        return formula

    return declare


def _deviation(name: str, size: tuple[int, ...]) -> float:
    """Fan-in ** -0.5 of weights; the filters of all modalities are one `dw_weight`."""
    fan_in = prod(size[2 if name == "dw_weight" else 1 :])
    return fan_in**-0.5 if name.endswith("weight") else 1.0


def _map_size(s: Shape) -> dict[str, int]:
    return {"height": s.h, "width": s.w}


# ---- rivals -------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            try:
                return _heads_first(F.scaled_dot_product_attention, q, k, v)
            except RuntimeError as error:
                if not any(x in str(error) for x in ("No available kernel", "No viable backend")):
                    raise
                raise Unsupported(f"{backend.name} has no kernel for these inputs") from error

    return call


def _heads_first(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`[B, L, H, D]` through a function on `[B, H, L, D]`, all views."""
    return function(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _heads_first(_compiled_flex(), q, k, v)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# ---- declarations -------------------------------------------------------------------------------


@operation(
    lambda s: {
        "q": (s.rows, s.tokens, s.heads, s.channels // s.heads),
        "k": (s.rows, s.keys, s.heads, s.channels // s.heads),
        "v": (s.rows, s.keys, s.heads, s.channels // s.heads),
    },
    rivals={
        "sdpa_math": _sdpa(SDPBackend.MATH),
        "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex": _flex,
    },
    fields=lambda s: {"contraction": min(s.tokens, s.keys)},
)
def attention(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: q + k + v + out; two products of Lq Lk C, 1 exponential per score (what else
    a softmax does is hidden behind it). Backward: + three gradients + that of out; five products,
    one of them the scores, recomputed because storing them costs more, and so their
    exponentials."""
    moved = 2 * s.rows * (s.tokens + s.keys) * s.channels * itemsize
    product = 2 * s.rows * s.tokens * s.keys * s.channels
    exps = s.rows * s.heads * s.tokens * s.keys
    return Work(moved, 2 * product, exps=exps), Work(2 * moved, 5 * product, exps=exps)


@operation(
    lambda s: {
        "x": (s.rows, s.tokens, RATIO * s.channels),
        "weight": (RATIO * s.channels, 1, 3, 3),
        "bias": (RATIO * s.channels,),
        **_map_size(s),
    },
)
def depthwise_conv_gelu(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + out of 4 C channels; per element 9 multiply-adds, GELU as 1 FLOP and 1
    exponential. Backward: x + dout + dx; the convolution again for GELU's derivative (2
    exponentials: the normal distribution and its density), then both gradients of it."""
    n = s.rows * s.tokens * RATIO * s.channels
    return Work(2 * n * itemsize, 0, 19 * n, n), Work(3 * n * itemsize, 0, 56 * n, 2 * n)


@operation(
    lambda s: {
        "x": (s.rows, s.tokens, s.channels),
        "fc1_weight": (RATIO * s.channels, s.channels),
        "fc1_bias": (RATIO * s.channels,),
        "dw_weight": (RATIO * s.channels, 1, 3, 3),
        "dw_bias": (RATIO * s.channels,),
        "fc2_weight": (s.channels, RATIO * s.channels),
        "fc2_bias": (s.channels,),
        **_map_size(s),
    },
)
def mix_ffn(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + out, as if hidden features cost nothing; two products of C by 4 C, and
    between them the depthwise convolution with GELU. Backward: x + dout + dx; two products for
    each, two convolutions for the one, GELU's derivative and the product with it."""
    n = s.rows * s.tokens * s.channels
    hidden = RATIO * n
    product = 2 * hidden * s.channels
    return (
        Work(2 * n * itemsize, 2 * product, 19 * hidden, hidden),
        Work(3 * n * itemsize, 4 * product, 38 * hidden, 2 * hidden),
    )


@operation(
    lambda s: {
        "x": (s.rows, s.tokens, s.channels),
        "update": (s.rows, s.tokens, s.channels),
        "weight": (s.channels,),
        "bias": (s.channels,),
    },
    fields=lambda s: {"output_names": ("total", "normed")},
)
def add_layer_norm(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + update + total + normed; per element the addition, 4 for mean and
    variance, 3 to normalise. Backward: total + both gradients + the one of x and update; per
    element 2 for the normalised total, 3 for both gradients of the parameters, 9 for dx."""
    n = s.rows * s.tokens * s.channels
    return Work(4 * n * itemsize, vector=8 * n), Work(4 * n * itemsize, vector=14 * n)


@operation(
    lambda s: {
        "x": (s.modalities, s.batch, s.tokens, s.channels),
        "dw_weight": (s.modalities, s.channels, 3, 3),
        "dw_bias": (s.modalities, s.channels),
        "pw_weight": (s.modalities, s.channels),
        "pw_bias": (s.modalities,),
        **_map_size(s),
    },
    rivals={"baseline_cl": baselines.channels_last(baselines.query_hub)},
    refuses=lambda s: "the hub needs two modalities or more" if s.modalities < 2 else "",
)
def query_hub(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + hubs; per element 9 + 1 multiply-adds of the score net, 2 for the gate, 2
    comparisons for the two largest, 1 choice; a sigmoid per token. Backward: x + dhubs + dx; the
    score again, and twice its multiply-adds for the gradients."""
    sigmoids = s.rows * s.tokens
    n = sigmoids * s.channels
    return Work(2 * n * itemsize, 0, 25 * n, sigmoids), Work(3 * n * itemsize, 0, 65 * n, sigmoids)


@operation(
    lambda s: {
        "x": (s.rows, s.tokens, s.channels),
        "weight": (s.channels, 1, 7, 7),
        "bias": (s.channels,),
        **_map_size(s),
    },
    rivals={"baseline_cl": baselines.channels_last(baselines.pooling_mixer)},
)
def pooling_mixer(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + out; per element 49 multiply-adds and three pools, each as two running
    sums (4 additions) and one division, added up (3). Backward: x + dout + dx; the pools
    transposed, then both gradients of the convolution."""
    n = s.rows * s.tokens * s.channels
    return (
        Work(2 * n * itemsize, vector=(98 + 18) * n),
        Work(3 * n * itemsize, vector=(2 * 98 + 18) * n),
    )


@operation(
    lambda s: {
        "x": (s.modalities, s.batch, s.tokens, s.channels),
        "logits": (s.modalities, s.batch, s.channels),
    },
    logits=("logits",),
    fields=lambda s: {"output_names": ("branches", "fused")},
)
def guided_gate(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + branches + fused; per element 1 multiplication and 1 multiply-add; the
    softmax over M B C logits is nothing but their exponentials. Backward: x + both gradients + dx;
    per element 2 multiply-adds for x and 2 for the logits."""
    logits = s.rows * s.channels
    n = logits * s.tokens
    fused = n // s.modalities
    return (
        Work((2 * n + fused) * itemsize, vector=3 * n, exps=logits),
        Work((3 * n + fused) * itemsize, vector=8 * n, exps=logits),
    )


@operation(
    # Labels as large as the padded images: whole pixels per token.
    lambda s: {
        "x": (s.modalities, s.batch, s.tokens, s.channels),
        "labels": (s.batch, s.h * s.stride, s.w * s.stride),
        "num_classes": NUM_CLASSES,
        **_map_size(s),
    },
    fields=lambda s: {
        "output_names": ("prototypes", "counts"),
        "kinds": {"prototypes": "parameter"},
        "chain": s.tokens,
        "synchronising": frozenset({"baseline"}),
    },
)
def class_prototypes(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: x + a label (8) per token + prototypes (fp32); 1 addition per element.
    Backward: labels + dprototypes + dx; 1 multiplication per element."""
    n = s.rows * s.tokens * s.channels
    prototypes = 4 * s.rows * NUM_CLASSES * s.channels
    work = Work(n * itemsize + 8 * s.batch * s.tokens + prototypes, vector=n)
    return work, work


@operation(
    lambda s: {
        "logits": (s.batch, NUM_CLASSES, s.h, s.w),
        "labels": (s.batch, s.height, s.width),
    },
    fields=lambda s: {"contraction": 0},
    stages=(1,),
)
def upsample_cross_entropy(s: Shape, itemsize: int) -> tuple[Work, Work]:
    """Forward: bytes: logits + labels (8) + loss (fp32); per pixel and class 3 linear
    interpolations of 3 FLOPs, then subtract and sum as 2, and 1 exponential. Backward: logits +
    labels + both gradients; interpolation and softmax again, then 4 multiply-adds that scatter to
    the corners."""
    logits = s.batch * NUM_CLASSES * s.tokens * itemsize
    pixels = s.batch * s.height * s.width
    n = NUM_CLASSES * pixels
    return (
        Work(logits + 12 * pixels, vector=11 * n, exps=n),
        Work(2 * logits + 12 * pixels, vector=19 * n, exps=n),
    )

"""`ops.attention` on the queries and spatially reduced keys of one stage."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape, Unsupported

SDPA = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


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


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


OTHERS = {
    **{name: _sdpa(backend) for name, backend in SDPA.items()},
    "flex": _flex,
    "flash_attn": _flash_attn,
    "xformers": _xformers,
}


def inputs(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    dim = shape.channels // shape.heads
    lengths = {"q": shape.tokens, "k": shape.keys, "v": shape.keys}
    return {name: draw(shape.rows, length, shape.heads, dim) for name, length in lengths.items()}


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read q, k, v, write out; two products of Lq * Lk * C multiply-adds, one exponential
    per score (what else a softmax does per score is hidden behind it and not counted).

    Backward: read q, k, v, out and its gradient, write three gradients; five products, one of them
    the scores, recomputed because storing them costs more, and so their exponentials.
    """
    q = shape.rows * shape.tokens * shape.channels * itemsize
    k = shape.rows * shape.keys * shape.channels * itemsize
    product = 2 * shape.rows * shape.tokens * shape.keys * shape.channels
    scores = shape.rows * shape.heads * shape.tokens * shape.keys
    return Cost.of_op(
        Work(2 * q + 2 * k, matrix=2 * product, exps=scores),
        Work(4 * q + 4 * k, matrix=5 * product, exps=scores),
    )


OPS = (
    operation(
        "attention",
        inputs,
        cost=cost,
        formula="bytes: q + k + v + out; FLOPs: 4 R Lq Lk C; exponentials: R H Lq Lk",
        rank=1,
        rivals=OTHERS,
        fields=lambda shape: {"contraction": min(shape.tokens, shape.keys)},
    ),
)

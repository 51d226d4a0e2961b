"""`ops.attention` on the queries and spatially reduced keys of one stage."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import baselines
from benchmarks.cost import Work
from benchmarks.registry import Cost, Op, Problem, Shape, Unsupported, backends, op_problem
from equiseg_fast import ops, reference
from equiseg_fast.testing import random_normal

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            try:
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise Unsupported(f"{backend.name} has no kernel for these inputs") from error

    return call


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    dim = shape.channels // shape.heads
    lengths = {"q": shape.tokens, "k": shape.keys, "v": shape.keys}
    inputs = {
        name: random_normal(
            (shape.rows, length, shape.heads, dim), dtype, seed=seed + i, device=device
        )
        for i, (name, length) in enumerate(lengths.items())
    }
    functions = backends(ops.attention, baselines.attention)
    functions |= {name: _sdpa(backend) for name, backend in SDPA.items()}
    return op_problem(
        inputs, ("q", "k", "v"), functions, reference.attention,
        contraction=min(shape.tokens, shape.keys),
    )  # fmt: skip


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read q, k, v, write out; two products of Lq * Lk * C multiply-adds, one exponential
    per score (what else a softmax does per score is hidden behind it and not counted).

    Backward: read q, k, v, out and its gradient, write three gradients; five products, one of them
    the scores again, which nobody wants to have kept, and so their exponentials.
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
    Op(
        "attention",
        "attention",
        build,
        cost,
        "bytes: q + k + v + out; FLOPs: 4 R Lq Lk C; exponentials: R H Lq Lk",
        extra_providers=tuple(SDPA),
    ),
)

"""`ops.mix_ffn`, the feed-forward half of a block, with hidden tokens four times as wide."""

import torch

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.cases.depthwise_conv_gelu import RATIO
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    c, e = shape.channels, RATIO * shape.channels
    sizes = {
        "x": ((shape.rows, shape.tokens, c), 1.0),
        "fc1_weight": ((e, c), c**-0.5),
        "fc1_bias": ((e,), 1.0),
        "dw_weight": ((e, 1, 3, 3), 1 / 3),
        "dw_bias": ((e,), 1.0),
        "fc2_weight": ((c, e), e**-0.5),
        "fc2_bias": ((c,), 1.0),
    }
    inputs = {
        name: random_normal(size, dtype, seed=seed + i, scale=scale, device=device)
        for i, (name, (size, scale)) in enumerate(sizes.items())
    }
    return op_problem(
        {**inputs, "height": shape.h, "width": shape.w},
        tuple(inputs),
        backends(ops.mix_ffn, baselines.mix_ffn),
        reference.mix_ffn,
        kinds={f"d{name}": "parameter" for name in inputs if name != "x"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


def cost(shape: Shape, itemsize: int, ratio: int = RATIO) -> Cost:
    """Forward: read x, write out, as if hidden features cost nothing; two products of C by ratio C
    and the depthwise convolution with GELU between them, 1 exponential per hidden element.

    Backward: read x and the gradient, write its own; two products for each of the forward, two
    convolutions for the one, GELU's derivative (2 exponentials) and the product with it.
    """
    tokens = shape.rows * shape.tokens
    c, e = shape.channels, ratio * shape.channels
    moved = tokens * c * itemsize
    return Cost.of_op(
        Work(2 * moved, 4 * tokens * c * e, 19 * tokens * e, tokens * e),
        Work(3 * moved, 8 * tokens * c * e, 38 * tokens * e, 2 * tokens * e),
    )


OPS = (
    Op(
        "mix_ffn",
        "mix_ffn",
        build,
        cost,
        "bytes: x + out; FLOPs: 16 C^2 + 76 C, exponentials: 4 C per token",
    ),
)

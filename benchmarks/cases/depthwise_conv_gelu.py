"""`ops.depthwise_conv_gelu` on the four times wider hidden tokens of Mix-FFN."""

import torch

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference

RATIO = 4


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    channels = RATIO * shape.channels
    sizes = {
        "x": (shape.rows, shape.tokens, channels),
        "weight": (channels, 1, 3, 3),
        "bias": (channels,),
    }
    inputs = {
        name: random_normal(
            size, dtype, seed=seed + i, scale=1 / 3 if name == "weight" else 1.0, device=device
        )
        for i, (name, size) in enumerate(sizes.items())
    }
    return op_problem(
        {**inputs, "height": shape.h, "width": shape.w},
        ("x", "weight", "bias"),
        backends(ops.depthwise_conv_gelu, baselines.depthwise_conv_gelu),
        reference.depthwise_conv_gelu,
        kinds={"dweight": "parameter", "dbias": "parameter"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x, write out (weights are nothing); 9 multiply-adds per element, GELU as 1
    FLOP and 1 exponential.

    Backward: read x and the gradient, write its own; the convolution again for GELU's derivative
    (2 exponentials: of the normal distribution and of its density), then both gradients of it.
    """
    n = shape.rows * shape.tokens * RATIO * shape.channels
    return Cost.of_op(
        Work(2 * n * itemsize, vector=19 * n, exps=n),
        Work(3 * n * itemsize, vector=(3 * 18 + 2) * n, exps=2 * n),
    )


OPS = (
    Op(
        "depthwise_conv_gelu",
        "depthwise_conv_gelu",
        build,
        cost,
        "bytes: x + out, 4 C channels; FLOPs: 19, exponentials: 1 per element",
    ),
)

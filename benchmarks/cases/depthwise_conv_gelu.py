"""`ops.depthwise_conv_gelu` on the four times wider hidden tokens of Mix-FFN."""

from typing import Any

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape

RATIO = 4


def inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    channels = RATIO * shape.channels
    return {
        "x": draw(shape.rows, shape.tokens, channels),
        "weight": draw(channels, 1, 3, 3, scale=1 / 3),
        "bias": draw(channels),
        "height": shape.h,
        "width": shape.w,
    }


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
    operation(
        "depthwise_conv_gelu",
        inputs,
        cost=cost,
        formula="bytes: x + out, 4 C channels; FLOPs: 19, exponentials: 1 per element",
        rank=2,
        parameters=("weight", "bias"),
    ),
)

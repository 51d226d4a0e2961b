"""`ops.mix_ffn`, the feed-forward half of a block, with hidden tokens four times as wide."""

from typing import Any

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape
from benchmarks.cases.depthwise_conv_gelu import RATIO


def inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    c, e = shape.channels, RATIO * shape.channels
    return {
        "x": draw(shape.rows, shape.tokens, c),
        "fc1_weight": draw(e, c, scale=c**-0.5),
        "fc1_bias": draw(e),
        "dw_weight": draw(e, 1, 3, 3, scale=1 / 3),
        "dw_bias": draw(e),
        "fc2_weight": draw(c, e, scale=e**-0.5),
        "fc2_bias": draw(c),
        "height": shape.h,
        "width": shape.w,
    }


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
    operation(
        "mix_ffn",
        inputs,
        cost=cost,
        formula="bytes: x + out; FLOPs: 16 C^2 + 76 C, exponentials: 4 C per token",
        rank=3,
        parameters=("fc1_weight", "fc1_bias", "dw_weight", "dw_bias", "fc2_weight", "fc2_bias"),
    ),
)

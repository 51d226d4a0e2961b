"""`ops.pooling_mixer` on the hubs of all primaries."""

from typing import Any

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape
from benchmarks.providers import baselines


def inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(shape.rows, shape.tokens, shape.channels),
        "weight": draw(shape.channels, 1, 7, 7, scale=1 / 7),
        "bias": draw(shape.channels),
        "height": shape.h,
        "width": shape.w,
    }


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x, write out; per element 49 multiply-adds and three pools, each as two running
    sums (4 additions) and one division, added up (3).

    Backward: read x and the gradient, write its own; the pools transposed, then both gradients of
    the convolution.
    """
    n = shape.rows * shape.tokens * shape.channels
    pools = 3 * 5 + 3
    return Cost.of_op(
        Work(2 * n * itemsize, vector=(98 + pools) * n),
        Work(3 * n * itemsize, vector=(2 * 98 + pools) * n),
    )


OPS = (
    operation(
        "pooling_mixer",
        inputs,
        cost=cost,
        formula="bytes: x + out; FLOPs: 116 per element",
        rank=6,
        rivals={"baseline_cl": baselines.channels_last(baselines.pooling_mixer)},
        parameters=("weight", "bias"),
    ),
)

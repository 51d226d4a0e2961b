"""`ops.query_hub` on the embedded tokens of all modalities."""

from typing import Any

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape
from benchmarks.providers import baselines


def refuses(shape: Shape) -> str:
    return "the hub needs two modalities or more" if shape.modalities < 2 else ""


def inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    m, c = shape.modalities, shape.channels
    return {
        "x": draw(m, shape.batch, shape.tokens, c),
        "dw_weight": draw(m, c, 3, 3, scale=1 / 3),
        "dw_bias": draw(m, c),
        "pw_weight": draw(m, c, scale=c**-0.5),
        "pw_bias": draw(m),
        "height": shape.h,
        "width": shape.w,
    }


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x, write all hubs; per element 9 + 1 multiply-adds of the score net, 2 for the
    gate, 2 comparisons for the two largest, 1 choice; a sigmoid per token.

    Backward: read x and the gradients of the hubs, write its own; the score again, and twice its
    multiply-adds for the gradients.
    """
    n = shape.rows * shape.tokens * shape.channels
    sigmoids = shape.rows * shape.tokens
    return Cost.of_op(
        Work(2 * n * itemsize, vector=25 * n, exps=sigmoids),
        Work(3 * n * itemsize, vector=(3 * 20 + 5) * n, exps=sigmoids),
    )


OPS = (
    operation(
        "query_hub",
        inputs,
        cost=cost,
        formula="bytes: x + hubs; FLOPs: 25 per element; exponentials: 1 per token",
        rank=5,
        rivals={"baseline_cl": baselines.channels_last(baselines.query_hub)},
        parameters=("dw_weight", "dw_bias", "pw_weight", "pw_bias"),
        refuses=refuses,
    ),
)

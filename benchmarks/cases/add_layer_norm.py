"""`ops.add_layer_norm` on the residual stream of the encoder."""

from torch import Tensor

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape


def _liger(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    total = x + update
    return total, liger_layer_norm(total, weight, bias, 1e-5)


def inputs(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    x, update = (draw(shape.rows, shape.tokens, shape.channels) for _ in range(2))
    return {"x": x, "update": update, "weight": draw(shape.channels), "bias": draw(shape.channels)}


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x and update, write total and normed (weights and statistics are nothing); per
    element the addition, 4 for mean and variance, and 3 to normalise.

    Backward: read total and both gradients, write the one of x and update; per element 2 for the
    normalised total, 3 for both gradients of the parameters, and 9 for dx.
    """
    n = shape.rows * shape.tokens * shape.channels
    return Cost.of_op(Work(4 * n * itemsize, vector=8 * n), Work(4 * n * itemsize, vector=14 * n))


OPS = (
    operation(
        "add_layer_norm",
        inputs,
        cost=cost,
        formula="bytes: x + update + total + normed; FLOPs: 8 per element",
        rank=4,
        rivals={"liger": _liger},
        parameters=("weight", "bias"),
        fields=lambda shape: {"output_names": ("total", "normed")},
    ),
)

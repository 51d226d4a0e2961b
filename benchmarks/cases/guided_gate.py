"""`ops.guided_gate` on the features behind the cross-attention."""

import torch
from torch import Tensor

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape


def inputs(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    m, b, c = shape.modalities, shape.batch, shape.channels
    return {"x": draw(m, b, shape.tokens, c), "logits": draw(m, b, c, dtype=torch.float32)}


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x, write branches and the fused map; per element 1 multiplication and 1
    multiply-add. The softmax over M * B * C logits is nothing but their exponentials.

    Backward: read x and both gradients, write its own; per element 2 multiply-adds for x and 2 for
    the logits.
    """
    n = shape.rows * shape.tokens * shape.channels
    fused = n // shape.modalities
    logits = shape.rows * shape.channels
    return Cost.of_op(
        Work((2 * n + fused) * itemsize, vector=3 * n, exps=logits),
        Work((3 * n + fused) * itemsize, vector=8 * n, exps=logits),
    )


OPS = (
    operation(
        "guided_gate",
        inputs,
        cost=cost,
        formula="bytes: x + branches + fused; FLOPs: 3 per element",
        rank=7,
        parameters=("logits",),
        fields=lambda shape: {"output_names": ("branches", "fused")},
    ),
)

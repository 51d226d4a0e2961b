"""`ops.guided_gate` on the features behind the cross-attention."""

import torch

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    size = (shape.modalities, shape.batch, shape.tokens, shape.channels)
    logits = (shape.modalities, shape.batch, shape.channels)
    inputs = {
        "x": random_normal(size, dtype, seed=seed, device=device),
        "logits": random_normal(logits, torch.float32, seed=seed + 1, device=device),
    }
    return op_problem(
        inputs,
        ("x", "logits"),
        backends(ops.guided_gate, baselines.guided_gate),
        reference.guided_gate,
        output_names=("branches", "fused"),
        kinds={"dlogits": "parameter"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


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
    Op(
        "guided_gate",
        "guided_gate",
        build,
        cost,
        "bytes: x + branches + fused; FLOPs: 3 per element",
    ),
)

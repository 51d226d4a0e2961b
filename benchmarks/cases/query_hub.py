"""`ops.query_hub` on the embedded tokens of all modalities."""

import torch

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, Unsupported, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def refuses(shape: Shape) -> str:
    return "the hub needs two modalities or more" if shape.modalities < 2 else ""


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    if reason := refuses(shape):
        raise Unsupported(reason)
    m, c = shape.modalities, shape.channels
    sizes = {
        "x": ((m, shape.batch, shape.tokens, c), 1.0),
        "dw_weight": ((m, c, 3, 3), 1 / 3),
        "dw_bias": ((m, c), 1.0),
        "pw_weight": ((m, c), c**-0.5),
        "pw_bias": ((m,), 1.0),
    }
    inputs = {
        name: random_normal(size, dtype, seed=seed + i, scale=scale, device=device)
        for i, (name, (size, scale)) in enumerate(sizes.items())
    }
    return op_problem(
        {**inputs, "height": shape.h, "width": shape.w},
        tuple(inputs),
        {
            **backends(ops.query_hub, baselines.query_hub),
            "baseline_cl": baselines.channels_last(baselines.query_hub),
        },
        reference.query_hub,
        kinds={f"d{name}": "parameter" for name in inputs if name != "x"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


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
    Op(
        "query_hub",
        "query_hub",
        build,
        cost,
        "bytes: x + hubs; FLOPs: 25 per element; exponentials: 1 per token",
        extra_providers=("baseline_cl",),
        refuses=refuses,
    ),
)

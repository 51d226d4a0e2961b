"""`ops.pooling_mixer` on the hubs of all primaries."""

import torch

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    c = shape.channels
    sizes = {"x": (shape.rows, shape.tokens, c), "weight": (c, 1, 7, 7), "bias": (c,)}
    inputs = {
        name: random_normal(
            size, dtype, seed=seed + i, scale=1 / 7 if name == "weight" else 1.0, device=device
        )
        for i, (name, size) in enumerate(sizes.items())
    }
    return op_problem(
        {**inputs, "height": shape.h, "width": shape.w},
        ("x", "weight", "bias"),
        {
            **backends(ops.pooling_mixer, baselines.pooling_mixer),
            "baseline_cl": baselines.channels_last(baselines.pooling_mixer),
        },
        reference.pooling_mixer,
        kinds={"dweight": "parameter", "dbias": "parameter"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


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
    Op(
        "pooling_mixer",
        "pooling_mixer",
        build,
        cost,
        "bytes: x + out; FLOPs: 116 per element",
        extra_providers=("baseline_cl",),
    ),
)

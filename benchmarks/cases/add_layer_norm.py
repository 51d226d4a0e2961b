"""`ops.add_layer_norm` on the residual stream of the encoder."""

import torch
from torch import Tensor

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def _liger(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    total = x + update
    return total, liger_layer_norm(total, weight, bias, 1e-5)


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    features, channels = (shape.rows, shape.tokens, shape.channels), (shape.channels,)
    sizes = {"x": features, "update": features, "weight": channels, "bias": channels}
    inputs = {
        name: random_normal(size, dtype, seed=seed + i, device=device)
        for i, (name, size) in enumerate(sizes.items())
    }
    return op_problem(
        inputs,
        tuple(sizes),
        {**backends(ops.add_layer_norm, baselines.add_layer_norm), "liger": _liger},
        reference.add_layer_norm,
        output_names=("total", "normed"),
        kinds={"dweight": "parameter", "dbias": "parameter"},
        contraction=0,
        chain=shape.rows * shape.tokens,
    )


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x and update, write total and normed (weights and statistics are nothing); per
    element the addition, 4 for mean and variance, and 3 to normalise.

    Backward: read total and both gradients, write the one of x and update; per element 2 for the
    normalised total, 3 for both gradients of the parameters, and 9 for dx.
    """
    n = shape.rows * shape.tokens * shape.channels
    return Cost.of_op(Work(4 * n * itemsize, vector=8 * n), Work(4 * n * itemsize, vector=14 * n))


OPS = (
    Op(
        "add_layer_norm",
        "add_layer_norm",
        build,
        cost,
        "bytes: x + update + total + normed; FLOPs: 8 per element",
        extra_providers=("liger",),
    ),
)

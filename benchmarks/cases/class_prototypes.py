"""`ops.class_prototypes` on the features of a stage and the labels of the image."""

import torch

from benchmarks.cases.common import data
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import NUM_CLASSES, Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    size = (shape.modalities, shape.batch, shape.tokens, shape.channels)
    inputs = {
        "x": random_normal(size, dtype, seed=seed, device=device),
        # As large as the padded images: whole pixels per token.
        "labels": data.labels(
            shape.batch, shape.h * shape.stride, shape.w * shape.stride, seed, device
        ),
        "num_classes": NUM_CLASSES,
        "height": shape.h,
        "width": shape.w,
    }
    return op_problem(
        inputs,
        ("x",),
        backends(ops.class_prototypes, baselines.class_prototypes),
        reference.class_prototypes,
        output_names=("prototypes", "counts"),
        kinds={"prototypes": "parameter"},
        chain=shape.tokens,
        synchronising=frozenset({"baseline"}),
    )


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read x once and one label (8 bytes) per token, write the prototypes in fp32; one
    addition per element.

    Backward: read labels and the gradient of the prototypes, write that of x; one multiplication
    per element.
    """
    n = shape.rows * shape.tokens * shape.channels
    labels = 8 * shape.batch * shape.tokens
    prototypes = 4 * shape.rows * NUM_CLASSES * shape.channels
    work = Work(n * itemsize + labels + prototypes, vector=n)
    return Cost.of_op(work, work)


OPS = (
    Op(
        "class_prototypes",
        "class_prototypes",
        build,
        cost,
        "bytes: x + labels + prototypes (fp32); FLOPs: 1 per element",
    ),
)

"""`ops.upsample_cross_entropy` on the logits of the head; one map, of the size of stage 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import data
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import NUM_CLASSES, Op
from benchmarks.cases.common.problem import Problem, Shape, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import backends
from equiseg_fast import ops, reference


def _liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits upsampled to rows of classes, which Liger overwrites with their gradient."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    size = tuple(labels.shape[-2:])
    full = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    rows = full.permute(0, 2, 3, 1).flatten(0, 2)
    loss = liger_cross_entropy(rows, labels.flatten(), ignore_index=data.IGNORE, reduction="none")
    return loss.view(labels.shape)


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    size = (shape.batch, NUM_CLASSES, shape.h, shape.w)
    inputs = {
        "logits": random_normal(size, dtype, seed=seed, device=device),
        "labels": data.labels(shape.batch, shape.height, shape.width, seed, device),
    }
    return op_problem(
        inputs,
        ("logits",),
        {
            **backends(ops.upsample_cross_entropy, baselines.upsample_cross_entropy),
            "liger": _liger,
        },
        reference.upsample_cross_entropy,
        contraction=0,
        synchronising=frozenset({"liger"}),
    )


def cost(shape: Shape, itemsize: int) -> Cost:
    """Forward: read logits and labels (8 bytes), write the fp32 loss; per label pixel and class 3
    linear interpolations of 3 FLOPs (subtract, multiply, add), then subtract and sum as 2, and an
    exponential; the logarithm per pixel is nothing.

    Backward: read logits, labels and the gradient, write that of the logits; interpolation and
    softmax again, then 4 multiply-adds that scatter to the corners.
    """
    logits = shape.batch * NUM_CLASSES * shape.tokens * itemsize
    pixels = shape.batch * shape.height * shape.width
    forward = 11 * NUM_CLASSES * pixels
    exps = NUM_CLASSES * pixels
    return Cost.of_op(
        Work(logits + 12 * pixels, vector=forward, exps=exps),
        Work(2 * logits + 12 * pixels, vector=forward + 8 * NUM_CLASSES * pixels, exps=exps),
    )


OPS = (
    Op(
        "upsample_cross_entropy",
        "upsample_cross_entropy",
        build,
        cost,
        "bytes: logits + labels + fp32 loss; FLOPs: 11, exponentials: 1 per pixel and class",
        extra_providers=("liger",),
        stages=(1,),
    ),
)

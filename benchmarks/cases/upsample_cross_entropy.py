"""`ops.upsample_cross_entropy` on the logits of the head; one map, of the size of stage 1."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.data import IGNORE, NUM_CLASSES
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape


def _liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits upsampled to rows of classes, which Liger overwrites with their gradient."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    size = tuple(labels.shape[-2:])
    full = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    rows = full.permute(0, 2, 3, 1).flatten(0, 2)
    loss = liger_cross_entropy(rows, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.view(labels.shape)


def inputs(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    return {
        "logits": draw(shape.batch, NUM_CLASSES, shape.h, shape.w),
        "labels": draw.labels(shape.batch, shape.height, shape.width),
    }


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
    operation(
        "upsample_cross_entropy",
        inputs,
        cost=cost,
        formula=(
            "bytes: logits + labels + fp32 loss; FLOPs: 11, exponentials: 1 per pixel and class"
        ),
        rank=9,
        rivals={"liger": _liger},
        fields=lambda shape: {"contraction": 0, "synchronising": frozenset({"liger"})},
        stages=(1,),
    ),
)

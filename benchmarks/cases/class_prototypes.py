"""`ops.class_prototypes` on the features of a stage and the labels of the image."""

from typing import Any

from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.data import NUM_CLASSES
from benchmarks.cases.common.op import Draw, operation
from benchmarks.cases.common.problem import Shape


def inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    """Labels as large as the padded images: whole pixels per token."""
    height, width = shape.h * shape.stride, shape.w * shape.stride
    return {
        "x": draw(shape.modalities, shape.batch, shape.tokens, shape.channels),
        "labels": draw.labels(shape.batch, height, width),
        "num_classes": NUM_CLASSES,
        "height": shape.h,
        "width": shape.w,
    }


def fields(shape: Shape) -> dict[str, Any]:
    return {
        "output_names": ("prototypes", "counts"),
        "kinds": {"prototypes": "parameter"},
        "chain": shape.tokens,
        "synchronising": frozenset({"baseline"}),
    }


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
    operation(
        "class_prototypes",
        inputs,
        cost=cost,
        formula="bytes: x + labels + prototypes (fp32); FLOPs: 1 per element",
        rank=8,
        fields=fields,
    ),
)

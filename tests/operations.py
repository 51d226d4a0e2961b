"""What a test file says of its operation, for tests that go over all of them: see
`tests/every_operation.py`."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from equiseg_fast.ops import _backend
from equiseg_fast.testing import random_normal

needs_interpreter = pytest.mark.skipif(
    not _backend.INTERPRET, reason="kernels on CPU tensors need TRITON_INTERPRET=1"
)

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
LAYOUTS = ("transposed", "sliced", "expanded", "channels_last")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MEAN = 3.0
"""Of the features in every parity test: rounding what has an offset shows where it should not be
rounded, and centred numbers hide it."""


class Sizes(NamedTuple):
    """What the inputs of an operation are made of; each uses what it needs."""

    modalities: int = 3
    batch: int = 2
    height: int = 3
    width: int = 4
    channels: int = 6
    classes: int = 5
    factor: int = 2


Shapes = dict[str, tuple[int, ...]]


class Operation(NamedTuple):
    """shapes: of the floating inputs, all differentiable; others: labels, masks, sizes, numbers,
    from a seed; fp32: floating inputs that are fp32 for half-precision features; kinds and
    contraction: as for `check_op_parity`; centred: floating inputs without a mean; composed: on the
    CPU it is made of operators that PyTorch itself can transform, and no `autograd.Function` of
    ours, which has no forward mode."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: Callable[[Sizes], Shapes]
    others: Callable[[Sizes, int], dict[str, Any]] = lambda sizes, seed: {}
    fp32: tuple[str, ...] = ()
    kinds: dict[str, str] = {}  # noqa: RUF012 (never changed)
    contraction: Callable[[Sizes], int | None] = lambda sizes: None
    centred: tuple[str, ...] = ()
    composed: bool = False

    def inputs(
        self,
        sizes: Sizes = Sizes(),  # noqa: B008 (immutable)
        dtype: torch.dtype = torch.float32,
        layout: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Keyword arguments; `layout` gives every floating input its memory."""
        tensors = {}
        for i, (name, shape) in enumerate(self.shapes(sizes).items()):
            wide = torch.float32 if name in self.fp32 and dtype.itemsize < 4 else dtype
            # Weights as a network has them: what they make has the size of what they take.
            fan_in = prod(shape[1:]) if name.endswith("weight") else 1
            centred = name in self.centred or name.endswith(("weight", "bias"))
            mean = 0.0 if centred else MEAN
            x = random_normal(shape, wide, seed=100 * seed + i, scale=fan_in**-0.5, mean=mean)
            tensors[name] = layout(x)
        return {**tensors, **self.others(sizes, seed)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def map_size(s: Sizes, seed: int) -> dict[str, Any]:
    return {"height": s.height, "width": s.width}


def random_present(s: Sizes, seed: int) -> dict[str, Any]:
    """A mask with at least one modality in every image."""
    mask = torch.rand(s.modalities, s.batch, generator=generator(seed)) < 0.7
    mask[seed % s.modalities] = True
    return {"present": mask}


def random_labels(classes: int, *size: int, seed: int) -> Tensor:
    labels = torch.randint(0, classes + 1, size, generator=generator(seed))
    return labels.masked_fill(labels == classes, 255)


def token_shape(s: Sizes) -> tuple[int, ...]:
    return (s.batch, s.height * s.width, s.channels)


def stencil_shapes(side: int) -> Callable[[Sizes], Shapes]:
    def shapes(s: Sizes) -> Shapes:
        return {"x": token_shape(s), "weight": (s.channels, 1, side, side), "bias": (s.channels,)}

    return shapes

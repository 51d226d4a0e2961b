"""One case made concrete: its shape, and the computations that are compared and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equiseg_fast.models.config import HEADS, SR_RATIOS, VARIANTS

Outputs = tuple[Tensor, ...]


class Unsupported(Exception):
    """A provider that cannot do a case; the message says why."""


@dataclass(frozen=True)
class Shape:
    """EQUISeg, CMNeXt or SegFormer at one size.

    variant: of the encoder. stage: 1 to 4 picks the tensors of that stage, 0 is the whole model.
    height, width: of the images, in pixels, of any size: patch embeddings round up and the spatial
    reduction of the attention rounds down. (EQUISeg pads its images to multiples of 32 first.)
    """

    variant: str
    stage: int
    height: int
    width: int
    batch: int = 1
    modalities: int = 3

    @property
    def channels(self) -> int:
        return VARIANTS[self.variant][0][self.stage - 1]

    @property
    def heads(self) -> int:
        return HEADS[self.stage - 1]

    @property
    def stride(self) -> int:
        """Image pixels per token, along each side."""
        return 2 ** (self.stage + 1)

    @property
    def h(self) -> int:
        # Rounding up at every patch embedding on the way is rounding up once.
        return -(-self.height // self.stride)

    @property
    def w(self) -> int:
        return -(-self.width // self.stride)

    @property
    def tokens(self) -> int:
        return self.h * self.w

    @property
    def keys(self) -> int:
        """Tokens after the spatial reduction of the attention."""
        ratio = SR_RATIOS[self.stage - 1]
        return (self.h // ratio) * (self.w // ratio)

    @property
    def rows(self) -> int:
        """Modalities and images in one batch."""
        return self.modalities * self.batch

    @property
    def label(self) -> str:
        stage = f" s{self.stage}" if self.stage else ""
        size = f"{self.height}x{self.width}"
        return f"{self.variant}{stage} {size} B{self.batch} M{self.modalities}"


@dataclass
class Problem:
    """One case made concrete on a device.

    calls: provider -> forward computation; what it returns is compared and differentiated.
    leaves: the tensors gradients are taken for, by name.
    cast: dtype -> (reference forward, its leaves) computed in that dtype, the oracle of parity.
    synchronising: providers that wait for the device, which no CUDA graph can capture.
    inputs: of the public operation. ignored: tensors that exist anyway and are not counted as saved
        for the backward.
    kinds, contraction, chain: of the results, see `equiseg_fast.testing.assert_parity`; the chain
        is that of the most naive provider, which adds all tokens one after the other.
    agreement: None for the tolerance policy; else the relative RMS error allowed for outputs and
        for gradients, against `cast` (whole models, which have no rounding floor of their own).
    """

    calls: dict[str, Callable[[], Outputs]]
    leaves: dict[str, Tensor]
    cast: Callable[[torch.dtype], tuple[Callable[[], Outputs], list[Tensor]]]
    synchronising: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[Tensor] = ()
    output_names: Sequence[str] = ("out",)
    kinds: Mapping[str, str] = field(default_factory=dict)
    contraction: int | None = None
    chain: int = 1
    agreement: tuple[float, float] | None = None


def op_problem(
    inputs: Mapping[str, Any],
    functions: Mapping[str, Callable[..., Any]],
    reference: Callable[..., Any],
    **fields: Any,
) -> Problem:
    """A problem from functions of the same keyword arguments, of which floating tensors are
    differentiated; fields: of `Problem`."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}

    def bound(function: Callable[..., Any], **moved: Tensor) -> Callable[[], Outputs]:
        arguments = {**inputs, **moved}

        def call() -> Outputs:
            outputs = function(**arguments)
            return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

        return call

    def cast(dtype: torch.dtype) -> tuple[Callable[[], Outputs], list[Tensor]]:
        moved = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
        return bound(reference, **moved), list(moved.values())

    calls = {name: bound(function) for name, function in functions.items()}
    return Problem(calls, leaves, cast, inputs=inputs, ignored=list(tensors.values()), **fields)

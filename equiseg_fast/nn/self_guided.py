"""Self-guided module (SGM): the gate that balances modalities, and the loss that teaches it."""

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import class_prototypes, guided_gate
from equiseg_fast.ops._checks import (
    check_flags,
    check_ignore_index,
    check_order,
    check_present,
    check_sizes,
    number,
    positive,
)
from equiseg_fast.ops._math import (
    all_present,
    gate_descriptors,
    gate_weights,
    prototype_kl,
    split_teachers,
)
from equiseg_fast.ops._registry import without_autocast

from ._forms import as_tokens, check_channels, check_form, like, map_to_tokens
from ._init import init_module
from ._layer import Layer
from ._plain import plain_parameters
from .common import backend_repr


class SelfGuidedGate(Layer):
    """Mutual-guidance gate: weights per modality and channel from all modalities' means.

    dim: channels; reduction: width of the perceptron is dim // reduction; rho: strength of the
    reweighting of the branches; tau: temperature of the softmax over modalities. The last layer
    starts at zero, so that every modality starts with the same weight. Runs in fp32, but
    for linear layers with hooks, adapters and their like, which are called in the dtype of x.
    """

    def __init__(self, dim: int, reduction: int = 4, rho: float = 0.5, tau: float = 1.0) -> None:
        super().__init__()
        check_sizes(dim=dim, reduction=reduction)
        if dim < reduction:
            raise ValueError(f"reduction must be at most dim = {dim}; got {reduction}")
        self.dim = dim
        self.rho = number("rho", rho)
        self.tau = positive("tau", tau)
        self.fc1 = nn.Linear(2 * dim, dim // reduction)
        self.fc2 = nn.Linear(dim // reduction, dim)
        init_module(self.fc1)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def logits(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x as for `forward`, present `[M, B]` bool -> `[M, B, dim]` fp32."""
        return self._logits(self._tokens(x, present), present)

    @overload
    def forward(
        self, x: Tensor, *, present: Tensor | None = None, return_weights: Literal[False] = False
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, x: Tensor, *, present: Tensor | None = None, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, *, present: Tensor | None = None, return_weights: bool = False
    ) -> tuple[Tensor, ...]:
        """x, tokens `[M, B, L, dim]` or maps `[M, B, dim, H, W]` -> branches of its shape and
        fused `[B, L, dim]` or `[B, dim, H, W]`; with return_weights also the weights, `[M, B, dim]`
        fp32, which sum to 1 over the present modalities.

        present `[M, B]` bool. Nothing here needs height and width. Raises TypeError or ValueError
        naming the argument.
        """
        check_flags(return_weights=return_weights)
        tokens = self._tokens(x, present)
        logits = self._logits(tokens, present)
        branches, fused = guided_gate(tokens, logits, present=present, rho=self.rho)
        if x.dim() > tokens.dim():
            size = (x.shape[-2], x.shape[-1])
            branches, fused = like(branches, x, *size), like(fused, x[0], *size)
        if return_weights:
            return branches, fused, gate_weights(logits, present=present)
        return branches, fused

    def _logits(self, x: Tensor, present: Tensor | None) -> Tensor:
        parameters = plain_parameters(self.fc1, self.fc2)
        with without_autocast(x.device.type):
            descriptors = gate_descriptors(x, present=present)
            if parameters is not None:
                w1, b1, w2, b2 = (p.to(descriptors.dtype) for p in parameters)
                return F.linear(F.gelu(F.linear(descriptors, w1, b1)), w2, b2) / self.tau
        y = self.fc2(F.gelu(self.fc1(descriptors.to(x.dtype))))
        return y.to(descriptors.dtype) / self.tau

    def _tokens(self, x: Tensor, present: Tensor | None) -> Tensor:
        tokens = map_to_tokens(x) if check_form("x", x, "M, B") else x
        if len(tokens) < 1:
            raise ValueError(f"x must have at least one modality; got shape {list(x.shape)}")
        check_channels("x", tokens, self.dim)
        check_present(present, tokens)
        return tokens

    def extra_repr(self) -> str:
        shapes = (0, 0, 0, self.dim), (0, 0, self.dim)
        settings = f"dim={self.dim}, rho={self.rho}, tau={self.tau}"
        return f"{settings}, {backend_repr('guided_gate', self, *shapes)}"


class PrototypeLoss(Layer):
    """Prototype self-distillation of one stage: half of the modalities teach the others.

    num_classes: K; tau: temperature of the softmax over classes; ignore_index: label to skip.
    """

    def __init__(self, num_classes: int, tau: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_ignore_index(ignore_index)
        self.num_classes = num_classes
        self.tau = positive("tau", tau)
        self.ignore_index = ignore_index

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        order: Tensor,
        height: int | None = None,
        width: int | None = None,
        *,
        present: Tensor | None = None,
    ) -> Tensor:
        """Features and labels -> scalar, fp32.

        x: tokens `[M, B, L, C]` with height and width, or maps `[M, B, C, H, W]`; labels
        `[B, s*height, s*width]` integer; order `[M]` int64: the permutation of modalities from
        which teachers are taken first, e.g. `torch.randperm(M)`; present `[M, B]` bool. Raises
        TypeError or ValueError naming the argument.
        """
        x, height, width = as_tokens("x", x, height, width, "M, B")
        check_order(order, "x", x)
        check_present(present, x)
        prototypes, counts = class_prototypes(
            x, labels, self.num_classes, height, width, ignore_index=self.ignore_index
        )
        teacher = split_teachers(all_present(x) if present is None else present, order)
        return prototype_kl(prototypes, counts, teacher, present=present, tau=self.tau)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, tau={self.tau}, ignore_index={self.ignore_index}"

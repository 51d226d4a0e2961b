"""Self-guided module (SGM): the gate that balances modalities, and the loss that teaches it."""

import torch
from torch import Tensor, nn

from equiseg_fast import reference
from equiseg_fast.ops import class_prototypes, guided_gate
from equiseg_fast.ops._registry import without_autocast

from ._init import init_module


class SelfGuidedGate(nn.Module):
    """Mutual-guidance gate: weights per modality and channel from all modalities' means.

    dim: channels; reduction: width of the perceptron is dim // reduction; rho: strength of the
    reweighting of the branches; tau: temperature of the softmax over modalities. The last layer
    starts at zero, so that every modality starts with the same weight. Runs in fp32.
    """

    def __init__(self, dim: int, reduction: int = 4, rho: float = 0.5, tau: float = 1.0) -> None:
        super().__init__()
        self.rho = rho
        self.tau = tau
        self.fc1 = nn.Linear(2 * dim, dim // reduction)
        self.fc2 = nn.Linear(dim // reduction, dim)
        init_module(self.fc1)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def logits(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x `[M, B, L, dim]`, present `[M, B]` bool -> `[M, B, dim]` fp32."""
        with without_autocast(x.device.type):
            descriptors = reference.gate_descriptors(x, present=present)
            layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            w1, b1, w2, b2 = (p.to(descriptors.dtype) for p in layers)
            return reference.gate_logits(descriptors, w1, b1, w2, b2, tau=self.tau)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x `[M, B, L, dim]` -> branches `[M, B, L, dim]` and fused `[B, L, dim]`."""
        return guided_gate(x, self.logits(x, present=present), present=present, rho=self.rho)

    def extra_repr(self) -> str:
        return f"rho={self.rho}, tau={self.tau}"


class PrototypeLoss(nn.Module):
    """Prototype self-distillation of one stage: half of the modalities teach the others.

    num_classes: K; tau: temperature of the softmax over classes; ignore_index: label to skip.
    """

    def __init__(self, num_classes: int, tau: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tau = tau
        self.ignore_index = ignore_index

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        height: int,
        width: int,
        order: Tensor,
        *,
        present: Tensor | None = None,
    ) -> Tensor:
        """Features `[M, B, L, C]`, labels `[B, s*height, s*width]` integer -> scalar, fp32.

        order `[M]`: the permutation of modalities from which teachers are taken first, e.g.
        `torch.randperm(M)`; present `[M, B]` bool.
        """
        prototypes, counts = class_prototypes(
            x, labels, self.num_classes, height, width, ignore_index=self.ignore_index
        )
        here = present
        if here is None:
            here = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        teacher = reference.split_teachers(here, order)
        return reference.prototype_kl(prototypes, counts, teacher, present=present, tau=self.tau)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, tau={self.tau}, ignore_index={self.ignore_index}"

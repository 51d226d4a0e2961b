"""Self-query hub: what the other modalities have to say to each primary one."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from equiseg_fast.ops import query_hub


class SelfQueryHub(nn.Module):
    """One score net per modality; all primaries are served in one pass (`ops.query_hub`)."""

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__()
        self.dw_weight = nn.Parameter(torch.empty(modalities, dim, 3, 3))
        self.dw_bias = nn.Parameter(torch.zeros(modalities, dim))
        self.pw_weight = nn.Parameter(torch.empty(modalities, dim))
        self.pw_bias = nn.Parameter(torch.zeros(modalities))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each net as `init_module` would start its two convolutions."""
        nn.init.normal_(self.dw_weight, std=sqrt(2 / 9))
        nn.init.normal_(self.pw_weight, std=sqrt(2))

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        *,
        present: Tensor | None = None,
        subset: Sequence[int] | None = None,
    ) -> Tensor:
        """x `[M, B, L, dim]` -> hub of every primary `[M, B, L, dim]`.

        present `[M, B]` bool; subset: which score nets serve the M modalities of x, None for all.
        """
        nets: list[Tensor] = [self.dw_weight, self.dw_bias, self.pw_weight, self.pw_bias]
        if subset is not None:
            nets = [p[list(subset)] for p in nets]
        dw_weight, dw_bias, pw_weight, pw_bias = nets
        return query_hub(x, dw_weight, dw_bias, pw_weight, pw_bias, height, width, present=present)

    def extra_repr(self) -> str:
        modalities, dim = self.dw_bias.shape
        return f"dim={dim}, modalities={modalities}"

"""Cross-modal Transformer Block (CMTB) of one stage, behind the encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equiseg_fast.ops._checks import check_flags, check_present, check_sizes, rate
from equiseg_fast.ops._math import has_others

from ._forms import as_tokens, check_belongs, check_channels, check_same_form, like
from ._layer import Layer
from .attention import CrossModalAttention
from .pooling_mixer import ParallelPoolingMixer
from .query_hub import SelfQueryHub


class CrossModalBlock(Layer):
    """Every modality as primary attends to what the others have to say, all in one batch.

    dim: channels; modalities: number of score nets; heads, sr_ratio: of the cross-attention;
    ppx_depth, ppx_ratio, drop_path: of the pooling mixers. Weights but the score nets are shared
    by all modalities. Source: EQUISeg (arXiv 2509.24505), CMTB.
    """

    def __init__(
        self,
        dim: int,
        modalities: int,
        heads: int,
        sr_ratio: int,
        *,
        ppx_depth: int = 1,
        ppx_ratio: int = 8,
        drop_path: float = 0.0,
        output_projection: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(ppx_depth=ppx_depth, ppx_ratio=ppx_ratio)
        drop_path = rate("drop_path", drop_path)
        check_flags(output_projection=output_projection)
        self.dim = dim
        self.modalities = modalities
        self.query_hub = SelfQueryHub(dim, modalities)
        self.mixer = nn.ModuleList(
            ParallelPoolingMixer(dim, ppx_ratio, drop_path) for _ in range(ppx_depth)
        )
        self.mixer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossModalAttention(dim, heads, sr_ratio)
        if not output_projection:
            self.attn.proj = nn.Identity()  # type: ignore[assignment]

    def forward(
        self,
        embedded: Tensor,
        encoded: Tensor,
        height: int | None = None,
        width: int | None = None,
        *,
        present: Tensor | None = None,
        subset: Sequence[int] | None = None,
    ) -> Tensor:
        """embedded (source of the hub) and encoded: tokens `[M, B, L, dim]` with height and width,
        or maps `[M, B, dim, H, W]` -> what encoded is.

        present `[M, B]` bool; subset: which score nets serve the M modalities, None for all. A
        modality that is alone keeps its encoding. Raises TypeError or ValueError naming the
        argument.
        """
        check_same_form("encoded", encoded, "embedded", embedded, "M, B")
        given = encoded
        encoded, rows, columns = as_tokens("encoded", encoded, height, width, "M, B")
        embedded, _, _ = as_tokens("embedded", embedded, height, width, "M, B")
        check_channels("encoded", encoded, self.dim)
        check_belongs("encoded", encoded, self.mixer_norm)
        check_belongs("embedded", embedded, self.mixer_norm)
        check_present(present, encoded)
        out = self._fuse(embedded, encoded, rows, columns, present, subset)
        return like(out, given, rows, columns)

    def _fuse(
        self,
        embedded: Tensor,
        encoded: Tensor,
        height: int,
        width: int,
        present: Tensor | None,
        subset: Sequence[int] | None,
    ) -> Tensor:
        keep = rows = None
        if present is not None:
            encoded = encoded.masked_fill(~present[:, :, None, None], 0.0)
            keep = present & has_others(present)
            rows = keep.flatten()
        hub = self.query_hub(embedded, height, width, present=present, subset=subset)
        source = hub.flatten(0, 1)
        for block in self.mixer:
            source = block(source, height, width, rows)
        source = self.mixer_norm(source)
        update = self.attn(encoded.flatten(0, 1), source, height, width).view_as(encoded)
        if keep is not None:
            update = torch.where(keep[:, :, None, None], update, 0.0)
        return encoded + update

    def extra_repr(self) -> str:
        return f"dim={self.dim}, modalities={self.modalities}"

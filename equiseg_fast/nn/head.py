"""All-MLP decode head of SegFormer, folded."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops._layout import to_map


class _Projection(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)


class _Fuse(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)


class SegmentationHead(nn.Module):
    """Four stages to one map of logits at the resolution of the first.

    in_channels: channels of the four stages; dim: decoder width; num_classes; dropout: rate of
    the channel dropout before the classifier. Parameter names are SegFormer's.

    The published head projects every stage to `dim`, upsamples, concatenates and fuses with a 1x1
    convolution. Upsampling commutes with 1x1 convolutions and keeps constants, so the projection
    and the stage's slice of the fusing convolution are multiplied first and applied at the stage's
    own resolution: the same function (`reference.segmentation_head`) at 5 to 8 % of the work.
    `fold=False` computes it as published.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        num_classes: int,
        dropout: float = 0.1,
        fold: bool = True,
    ) -> None:
        super().__init__()
        self.fold = fold
        self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4 = (
            _Projection(channels, dim) for channels in in_channels
        )
        self.linear_fuse = _Fuse(4 * dim, dim)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """features: four tokens `[B, H_s W_s, C_s]`, sizes `(H_s, W_s)` -> `[B, K, H_1, W_1]`."""
        fused = self._folded(features, sizes) if self.fold else self._published(features, sizes)
        y = F.relu(self.linear_fuse.bn(fused), inplace=True)
        return self.linear_pred(self.dropout(y))

    def _projections(self) -> list[nn.Linear]:
        stages = (self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4)
        return [stage.proj for stage in stages]

    def _folded(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        # The concatenation is in the order stage 4, 3, 2, 1.
        slices = self.linear_fuse.conv.weight.flatten(1).chunk(4, dim=1)[::-1]
        projections = self._projections()
        bias = sum(f @ p.bias for f, p in zip(slices, projections, strict=True))
        maps: list[Tensor] = []
        for x, size, f, p in zip(features, sizes, slices, projections, strict=True):
            y = F.linear(x, f @ p.weight, bias if not maps else None)
            maps.append(_upsample(to_map(y, *size), sizes[0]))
        return sum(maps[1:], start=maps[0])

    def _published(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        maps = [
            _upsample(to_map(p(x), *size), sizes[0])
            for x, size, p in zip(features, sizes, self._projections(), strict=True)
        ]
        return self.linear_fuse.conv(torch.cat(maps[::-1], dim=1))

    def extra_repr(self) -> str:
        return f"fold={self.fold}"


def _upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

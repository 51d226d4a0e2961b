"""Parallel pooling mixer (PPX) of CMNeXt (arXiv 2303.01480), on tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import pooling_mixer

from .common import DepthwiseConv, DropPath, TokenBatchNorm


class _Mixing(nn.Module):
    """7x7 depthwise convolution with pools, a 1x1 convolution, and a sigmoid gate on the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.conv4 = nn.Conv2d(dim, dim, 1)

    def forward(self, u: Tensor, height: int, width: int) -> Tensor:
        a = pooling_mixer(u, self.conv0.weight, self.conv0.bias, height, width)
        gate = F.linear(a, self.conv4.weight.flatten(1), self.conv4.bias).sigmoid()
        return torch.addcmul(u, gate, u)


class _ConvFFN(nn.Module):
    """Mix-FFN with 1x1 convolutions for linear layers, as CMNeXt names and shapes them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias)
        x = self.dwconv(x, height, width)
        return F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias)


class ParallelPoolingMixer(nn.Module):
    """One PPX block. dim: channels; ratio: hidden width of its feed-forward part over dim.

    Parameter names are CMNeXt's. `reference.pooling_mixer_block` is the formula.
    """

    def __init__(
        self, dim: int, ratio: int = 8, drop_path: float = 0.0, layer_scale: float = 1e-2
    ) -> None:
        super().__init__()
        self.norm1 = TokenBatchNorm(dim)
        self.attn = _Mixing(dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.c_nets = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False))
        self.norm2 = TokenBatchNorm(dim)
        self.mlp = _ConvFFN(dim, ratio * dim)
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int, rows: Tensor | None = None) -> Tensor:
        """`[R, L, dim]` -> `[R, L, dim]`; rows `[R]` bool enter the batch statistics."""
        u = self.norm1(x, height, width, rows)
        x = x + self.drop_path(self.layer_scale_1 * self.attn(u, height, width))
        gate = self.c_nets(x.mean(dim=1, keepdim=True)).sigmoid()
        y = self.mlp(self.norm2(x, height, width, rows), height, width)
        return gate * x + self.drop_path(self.layer_scale_2 * y)

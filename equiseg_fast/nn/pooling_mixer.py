"""Parallel pooling mixer (PPX) of CMNeXt (arXiv 2303.01480), on tokens."""

import torch
from torch import Tensor, nn

from equiseg_fast.ops import mix_ffn, pooling_mixer
from equiseg_fast.ops._layout import to_map, to_tokens

from .common import DepthwiseConv, DropPath, TokenBatchNorm


class _Mixing(nn.Module):
    """7x7 depthwise convolution with pools, a 1x1 convolution, and a sigmoid: a gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.conv4 = nn.Conv2d(dim, dim, 1)

    def forward(self, u: Tensor, height: int, width: int) -> Tensor:
        a = pooling_mixer(u, self.conv0.weight, self.conv0.bias, height, width)
        return to_tokens(self.conv4(to_map(a, height, width))).sigmoid()


class _ConvFFN(nn.Module):
    """Mix-FFN with 1x1 convolutions for linear layers, as CMNeXt names and shapes them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        conv = self.dwconv.dwconv
        return mix_ffn(
            x, self.fc1.weight.flatten(1), self.fc1.bias, conv.weight, conv.bias,
            self.fc2.weight.flatten(1), self.fc2.bias, height, width,
        )  # fmt: skip


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
        self.norm2: TokenBatchNorm | None = TokenBatchNorm(dim)
        self.mlp = _ConvFFN(dim, ratio * dim)
        self.layer_scale_2: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int, rows: Tensor | None = None) -> Tensor:
        """`[R, L, dim]` -> `[R, L, dim]`; rows `[R]` bool enter the batch statistics."""
        u = self.norm1(x, height, width, rows)
        # layer_scale_1 * (u + gate * u), with one product on the features
        scale = torch.addcmul(self.layer_scale_1, self.attn(u, height, width), self.layer_scale_1)
        if self.training:
            x = x + self.drop_path(u * scale)
        else:
            x = torch.addcmul(x, u, scale)
        gate = self.c_nets(x.mean(dim=1, keepdim=True)).sigmoid()
        if self.norm2 is None:
            return torch.addcmul(self.mlp(x, height, width), gate, x)
        y = self.layer_scale_2 * self.mlp(self.norm2(x, height, width, rows), height, width)
        return torch.addcmul(self.drop_path(y), gate, x)

    @torch.no_grad()
    def fold_(self) -> "ParallelPoolingMixer":
        """For inference: multiply `norm2` into `mlp.fc1` and `layer_scale_2` into `mlp.fc2`.

        Exactly the same function of its inputs with two passes less over the features. `norm1`
        stays, because what it returns is also what the gate multiplies. Cannot be undone, and
        training raises RuntimeError afterwards. Returns the module.
        """
        if self.norm2 is None:
            return self
        scale, shift = self.norm2.scale_and_shift()
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        fc1.bias += fc1.weight.flatten(1) @ shift
        fc1.weight *= scale[:, None, None]
        fc2.bias *= self.layer_scale_2
        fc2.weight *= self.layer_scale_2[:, None, None, None]
        self.norm2 = None
        self.layer_scale_2 = None
        return self.eval()

    def train(self, mode: bool = True) -> "ParallelPoolingMixer":
        """As `nn.Module.train`; RuntimeError for a mixer folded for inference."""
        if mode and self.norm2 is None:
            raise RuntimeError("this mixer was folded for inference; train another copy of it")
        return super().train(mode)

"""Small layers that several others are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import depthwise_conv_gelu, mix_ffn
from equiseg_fast.ops._layout import linear, to_map, to_tokens


class Linear(nn.Linear):
    """`nn.Linear` on tokens `[R, L, in]` -> `[R, L, out]`, faster on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DropPath(nn.Module):
    """Stochastic depth: in training drop whole rows of a residual branch `[R, ...]`.

    A row is kept with probability `1 - rate` and then divided by it.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * (torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that also works when parameters are cast and running statistics are not, as
    in sharded training with mixed precision: it computes in the dtype of the statistics."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.running_mean.dtype
        if self.weight.dtype == dtype:
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.to(dtype), self.bias.to(dtype),
            self.training, self.momentum, self.eps,
        )  # fmt: skip


class TokenBatchNorm(BatchNorm2d):
    """Batch normalisation of tokens `[R, L, C]` over rows and tokens.

    In training `rows` `[R]` bool says which rows the statistics are taken from; rows of absent
    modalities hold nothing real. Without any such row the running statistics serve.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, height: int, width: int, rows: Tensor | None = None
    ) -> Tensor:
        if rows is None or not self.training:
            return to_tokens(super().forward(to_map(x, height, width)))
        stats = x.float() if x.element_size() < 4 else x
        weight = rows.to(stats.dtype)[:, None, None]
        count = weight.sum() * x.shape[1]
        mean = (stats * weight).sum((0, 1)) / count.clamp(min=1)
        var = ((stats - mean).square() * weight).sum((0, 1)) / count.clamp(min=1)
        self._update(mean.detach(), var.detach(), count)
        some = count > 0
        mean = torch.where(some, mean, self.running_mean.to(mean.dtype))
        var = torch.where(some, var, self.running_var.to(var.dtype))
        scale = (var + self.eps).rsqrt() * self.weight
        return ((stats - mean) * scale + self.bias).to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What the norm does outside training: scale and shift, `[C]` each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        dtype = self.running_mean.dtype
        momentum = self.momentum * (count > 0).to(dtype)
        unbiased = var * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(dtype), momentum)
        self.running_var.lerp_(unbiased.to(dtype), momentum)
        self.num_batches_tracked.add_(1)


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: convolution, then LayerNorm on tokens."""

    def __init__(
        self, in_channels: int, dim: int, kernel: int, stride: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Map `[R, C_in, H, W]` -> tokens `[R, L, dim]` and the size `(height, width)` of L."""
        y = self.proj(x)
        return self.norm(to_tokens(y)), y.shape[2], y.shape[3]


class MixFFN(nn.Module):
    """Mix-FFN of SegFormer on tokens: linear, 3x3 depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """`[R, L, dim]` -> `[R, L, dim]`, L = height * width."""
        conv = self.dwconv.dwconv
        return mix_ffn(
            x, self.fc1.weight, self.fc1.bias, conv.weight, conv.bias, self.fc2.weight,
            self.fc2.bias, height, width,
        )  # fmt: skip


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution and GELU on tokens; the parameters are those of `nn.Conv2d`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """`[R, L, dim]` -> `[R, L, dim]`, L = height * width."""
        return depthwise_conv_gelu(x, self.dwconv.weight, self.dwconv.bias, height, width)

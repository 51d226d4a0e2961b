"""Small layers that several others are made of."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import _backend, _checks, depthwise_conv_gelu, mix_ffn
from equiseg_fast.ops._layout import linear, to_map, to_tokens

from . import _foreign
from ._forms import as_tokens, check_belongs, check_channels, like
from ._layer import Layer
from ._plain import is_plain, keeps_size, plain, plain_parameters
from ._sharing import adopt


def backend_repr(op: str, layer: nn.Module, *shapes: Sequence[int]) -> str:
    """For `extra_repr`: the backend that is chosen for `op`, and the one that would take it now.

    shapes: of its arguments, in the dtype and on the device of the layer.
    """
    # A layer of which everything is quantised has no parameters.
    example = next(layer.parameters(), torch.empty(0, device="cpu"))
    choice, would_run = _backend.choice_for(op, *(example.new_empty(shape) for shape in shapes))
    return f"backend={choice}" if choice == would_run else f"backend={choice} -> {would_run}"


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on tokens `[R, L, in]` -> `[R, L, out]`: on the CPU faster than a call of it,
    if it is plain; anything else in its place is called."""
    return linear(x, layer.weight, layer.bias) if is_plain(layer) else layer(x)


@plain
class DropPath(nn.Module):
    """Stochastic depth: in training drop whole rows of a residual branch `[R, ...]`.

    A row is kept with probability `1 - rate` and then divided by it.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = _checks.rate("rate", rate)

    def forward(self, x: Tensor) -> Tensor:
        _checks.check_tensor("x", x, _checks.FLOATING, "[R, ...]")
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * (torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class PatchEmbed(Layer):
    """Overlapping patch embedding: convolution, then LayerNorm on tokens."""

    def __init__(
        self, in_channels: int, dim: int, kernel: int, stride: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        _checks.check_sizes(in_channels=in_channels, dim=dim, kernel=kernel, stride=stride)
        eps = _checks.positive("eps", eps)
        self.in_channels = in_channels
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Map `[R, C_in, H, W]` -> tokens `[R, L, dim]` and the size `(height, width)` of L."""
        _checks.check_tensor("x", x, _checks.FLOATING, "[R, C_in, H, W]")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have in_channels = {self.in_channels} channels; got {x.shape[1]}"
            )
        if min(x.shape[2:]) < 1:
            raise ValueError(f"x must have at least one position; got shape {list(x.shape)}")
        check_belongs("x", x, self.proj)
        y = self.proj(x)
        return self.norm(to_tokens(y)), y.shape[2], y.shape[3]


class MixFFN(Layer):
    """Mix-FFN of SegFormer: linear, 3x3 depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, hidden=hidden)
        self.dim = dim
        self.hidden = hidden
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    @classmethod
    def from_torch(cls, module: Any) -> "MixFFN":
        """This layer on the parameters of somebody else's Mix-FFN, which stay the same objects.

        module: `Mlp` of SegFormer's authors or CMNeXt, or `SegformerMixFFN` of transformers (4; 5
        calls it `SegformerMixMLP`). Its structure is checked, not its `forward`; it is left as it
        is. Raises TypeError that says what is missing or different, dropout above 0 for example.
        """
        spelling = _foreign.spelling_of(module, cls.__name__, _foreign.MIX_FFN)
        _foreign.demand(cls.__name__, _foreign.is_mix_ffn(module))
        _foreign.demand_no_dropout(module, "dropout", "drop")
        fc1, fc2 = (_foreign.child(module, spelling.children[n]) for n in ("fc1", "fc2"))
        if fc1.in_features != getattr(fc2, "out_features", 0):
            raise TypeError(f"{cls.__name__} returns as many channels as it takes; got {module}")
        with torch.device("meta"):
            layer = cls(fc1.in_features, fc1.out_features)
        adopt(layer, module, spelling)
        return layer

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Tokens `[R, L, dim]` with height and width, or a map `[R, dim, H, W]` -> the same."""
        tokens, height, width = as_tokens("x", x, height, width)
        check_channels("x", tokens, self.dim)
        check_belongs("x", tokens, self.fc1)
        parameters = ffn_parameters(self)
        if parameters is None:
            y = self.fc2(self.dwconv(self.fc1(tokens), height, width))
        else:
            w1, b1, dw_weight, dw_bias, w2, b2 = parameters
            y = mix_ffn(tokens, w1, b1, dw_weight, dw_bias, w2, b2, height, width)
        return like(y, x, height, width)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, {backend_repr('mix_ffn', self, (0,))}"


def ffn_parameters(ffn: Any) -> Any:
    """Those of `fc1`, the depthwise convolution and `fc2` of a Mix-FFN, if all three are plain."""
    if not is_plain(ffn.dwconv):
        return None
    conv = ffn.dwconv.dwconv
    parameters = plain_parameters(ffn.fc1, conv, ffn.fc2)
    return parameters if parameters and keeps_size(conv, 3, conv.in_channels) else None


@plain
class DepthwiseConv(Layer):
    """3x3 depthwise convolution and GELU; the parameters are those of `nn.Conv2d`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim)
        self.dim = dim
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Tokens `[R, L, dim]` with height and width, or a map `[R, dim, H, W]` -> the same."""
        tokens, height, width = as_tokens("x", x, height, width)
        check_channels("x", tokens, self.dim)
        check_belongs("x", tokens, self.dwconv)
        parameters = plain_parameters(self.dwconv)
        if parameters is None or not keeps_size(self.dwconv, 3, self.dim):
            y = F.gelu(to_tokens(self.dwconv(to_map(tokens, height, width))))
        else:
            weight, bias = parameters
            y = depthwise_conv_gelu(tokens, weight, bias, height, width)
        return like(y, x, height, width)

    def extra_repr(self) -> str:
        return backend_repr("depthwise_conv_gelu", self, (0,))

"""Parallel pooling mixer (PPX) of CMNeXt (arXiv 2303.01480)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import _checks, mix_ffn, pooling_mixer
from equiseg_fast.ops._layout import to_map, to_tokens

from . import _foreign
from ._forms import as_tokens, check_belongs, check_channels, like
from ._layer import Layer
from ._plain import demand_plain, is_plain, keeps_size, plain, plain_parameters
from ._sharing import adopt
from .common import DepthwiseConv, DropPath, backend_repr, ffn_parameters
from .norm import BatchNorm2d, batch_norm_tokens, scale_and_shift

_SCALES = ("layer_scale_1", "layer_scale_2")


@plain
class _Mixing(nn.Module):
    """7x7 depthwise convolution with pools, a 1x1 convolution, and a sigmoid: a gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.conv4 = nn.Conv2d(dim, dim, 1)

    def forward(self, u: Tensor, height: int, width: int) -> Tensor:
        parameters = plain_parameters(self.conv0)
        if parameters is None or not keeps_size(self.conv0, 7, u.shape[-1]):
            y = self.conv0(to_map(u, height, width))
            pools = (F.avg_pool2d(y, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11))
            a = sum(pools, start=y)
        else:
            weight, bias = parameters
            a = to_map(pooling_mixer(u, weight, bias, height, width), height, width)
        return to_tokens(self.conv4(a)).sigmoid()


@plain
class _ConvFFN(nn.Module):
    """Mix-FFN with 1x1 convolutions for linear layers, as CMNeXt names and shapes them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        parameters = ffn_parameters(self)
        if parameters is None or not (keeps_size(self.fc1, 1) and keeps_size(self.fc2, 1)):
            x = self.dwconv(to_tokens(self.fc1(to_map(x, height, width))), height, width)
            return to_tokens(self.fc2(to_map(x, height, width)))
        w1, b1, dw_weight, dw_bias, w2, b2 = parameters
        return mix_ffn(x, w1.flatten(1), b1, dw_weight, dw_bias, w2.flatten(1), b2, height, width)


class ParallelPoolingMixer(Layer):
    """One PPX block. dim: channels; ratio: hidden width of its feed-forward part over dim.

    drop_path: rate of its two branches; layer_scale: what the scales of both start with. Parameter
    names are CMNeXt's. `reference.pooling_mixer_block` is the formula.
    `nn.SyncBatchNorm.convert_sync_batchnorm` makes the statistics of its norms those of all
    processes, those of a part of the rows, too.
    """

    def __init__(
        self, dim: int, ratio: int = 8, drop_path: float = 0.0, layer_scale: float = 1e-2
    ) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, ratio=ratio)
        drop_path = _checks.rate("drop_path", drop_path)
        layer_scale = _checks.number("layer_scale", layer_scale)
        self.ratio = ratio
        self.norm1 = BatchNorm2d(dim)
        self.attn = _Mixing(dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.c_nets = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False))
        self.norm2: nn.Module | None = BatchNorm2d(dim)
        self.mlp = _ConvFFN(dim, ratio * dim)
        self.layer_scale_2: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    @classmethod
    def from_torch(cls, module: Any) -> "ParallelPoolingMixer":
        """This layer on the parameters and statistics of CMNeXt's `MSPABlock`, the same objects.

        The structure of the module is checked, not its `forward`; it is left as it is. Move it to
        another device or dtype before, because a move replaces statistics. Raises TypeError that
        says what is missing or different.
        """
        (spelling,) = _foreign.MIXER
        _foreign.spelling_of(module, cls.__name__, _foreign.MIXER)
        scales = [module._parameters.get(name) for name in _SCALES]
        if None in scales:
            raise TypeError(f"module lacks {' or '.join(_SCALES)}")
        ratio = getattr(module.mlp.fc1, "out_channels", 0) // len(scales[0])
        if ratio < 1:
            raise TypeError(f"mlp.fc1 must be a wider nn.Conv2d; got {module.mlp.fc1}")
        _foreign.demand(cls.__name__, _foreign.has_gelu(module.mlp))
        _foreign.demand_no_dropout(module.mlp, "drop", "dropout")
        rate = _foreign.find(_foreign.child(module, "drop_path"), "drop_prob", "p", "rate") or 0.0
        with torch.device("meta"):
            layer = cls(len(scales[0]), ratio, float(rate))
        for name, scale in zip(_SCALES, scales, strict=True):
            if scale.shape != (len(scales[0]),):
                raise TypeError(f"{name} must have shape [dim]; got {list(scale.shape)}")
            setattr(layer, name, scale)
        adopt(layer, module, spelling)
        return layer

    def forward(
        self,
        x: Tensor,
        height: int | None = None,
        width: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Tokens `[R, L, dim]` with height and width, or a map `[R, dim, H, W]` -> the same.

        rows `[R]` bool enter the batch statistics, None for all. Raises TypeError or ValueError
        naming the argument.
        """
        tokens, height, width = as_tokens("x", x, height, width)
        check_channels("x", tokens, len(self.layer_scale_1))
        if is_plain(self.attn):
            check_belongs("x", tokens, self.attn.conv0)
        if rows is not None:
            _checks.check_tensor("rows", rows, (torch.bool,), "[R]")
            _checks.check_shape("rows", rows, tuple(tokens.shape[:1]), "[R]")
            _checks.check_same_device(x=tokens, rows=rows)
        return like(self._mix(tokens, height, width, rows), x, height, width)

    def _mix(self, x: Tensor, height: int, width: int, rows: Tensor | None) -> Tensor:
        u = batch_norm_tokens(self.norm1, x, height, width, rows)
        # layer_scale_1 * (u + gate * u), with one product on the features
        scale = torch.addcmul(self.layer_scale_1, self.attn(u, height, width), self.layer_scale_1)
        if is_plain(self.drop_path) and not self.drop_path.training:
            x = torch.addcmul(x, u, scale)
        else:
            x = x + self.drop_path(u * scale)
        gate = self.c_nets(x.mean(dim=1, keepdim=True)).sigmoid()
        if self.norm2 is None:
            y = self.mlp(x, height, width)
        else:
            y = batch_norm_tokens(self.norm2, x, height, width, rows)
            y = self.layer_scale_2 * self.mlp(y, height, width)
        return torch.addcmul(self.drop_path(y), gate, x)

    @torch.no_grad()
    def fold_(self) -> "ParallelPoolingMixer":
        """For inference: multiply `norm2` into `mlp.fc1` and `layer_scale_2` into `mlp.fc2`.

        Exactly the same function of its inputs with two passes less over the features. `norm1`
        stays, because what it returns is also what the gate multiplies. Cannot be undone, and
        training raises RuntimeError afterwards, as this does where one of them has hooks, a
        parametrisation or an adapter. Returns the module.
        """
        if self.norm2 is None:
            return self
        self.check_foldable()
        scale, shift = scale_and_shift(self.norm2)
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        # New parameters: those of a mixer from `from_torch` are somebody else's, too.
        fc1.bias = nn.Parameter(fc1.bias + fc1.weight.flatten(1) @ shift)
        fc1.weight = nn.Parameter(fc1.weight * scale[:, None, None])
        fc2.bias = nn.Parameter(fc2.bias * self.layer_scale_2)
        fc2.weight = nn.Parameter(fc2.weight * self.layer_scale_2[:, None, None, None])
        self.norm2 = None
        self.layer_scale_2 = None
        return self.eval()

    def check_foldable(self) -> None:
        """RuntimeError if `fold_` would refuse."""
        if self.norm2 is not None:
            demand_plain(self, "norm2", "mlp", "mlp.fc1", "mlp.fc2")

    def train(self, mode: bool = True) -> "ParallelPoolingMixer":
        """As `nn.Module.train`; RuntimeError for a mixer folded for inference."""
        if mode and self.norm2 is None:
            raise RuntimeError("this mixer was folded for inference; train another copy of it")
        return super().train(mode)

    def extra_repr(self) -> str:
        backend = backend_repr("pooling_mixer", self, (0,))
        return f"dim={len(self.layer_scale_1)}, ratio={self.ratio}, {backend}"

"""All-MLP decode head of SegFormer, folded."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops import _checks
from equiseg_fast.ops._layout import pointwise_conv, to_map

from . import _foreign
from ._forms import as_tokens, check_belongs, check_form
from ._layer import Layer
from ._plain import demand_plain, is_plain, keeps_size, plain, plain_parameters
from ._sharing import adopt
from .norm import BatchNorm2d, batch_norm_map


@plain
class _Projection(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@plain
class _Fuse(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm_map(self.bn, self.conv(x))


class SegmentationHead(Layer):
    """Four stages to one map of logits at the resolution of the first.

    in_channels: channels of the four stages; dim: decoder width; num_classes; dropout: rate of
    the channel dropout before the classifier. Parameter names are SegFormer's.

    The published head projects every stage to `dim`, upsamples, concatenates and fuses with a 1x1
    convolution. Upsampling commutes with 1x1 convolutions and keeps constants, so the projection
    and the stage's slice of the fusing convolution are multiplied first and applied at the stage's
    own resolution: the same function (`reference.segmentation_head`) at 5 to 8 % of the work.
    `fold=False` computes it as published, and so does a head with hooks, parametrisations or
    adapters on what is multiplied.
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
        _check_four("in_channels", in_channels, Integral)
        for channels in in_channels:
            _checks.check_sizes(in_channels=channels)
        _checks.check_sizes(dim=dim, num_classes=num_classes)
        dropout = _checks.rate("dropout", dropout)
        _checks.check_flags(fold=fold)
        self.in_channels = tuple(in_channels)
        self.dim = dim
        self.num_classes = num_classes
        self.fold = fold
        self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4 = (
            _Projection(channels, dim) for channels in in_channels
        )
        self.linear_fuse: _Fuse | None = _Fuse(4 * dim, dim)
        self.dropout: nn.Module = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(dim, num_classes, 1)

    @classmethod
    def from_torch(cls, module: Any, fold: bool = True) -> "SegmentationHead":
        """This head on the parameters and statistics of somebody else's, the same objects.

        module: `SegFormerHead` of SegFormer's authors or CMNeXt, or `SegformerDecodeHead` of
        transformers (4 and 5), with four stages; its dropout is kept as it is, per channel or per
        value. fold: as for the class. The structure of the module is checked, not its `forward`; it
        is left as it is. Move it to another device or dtype before, because a move replaces
        statistics. Raises TypeError that says what is missing or different.
        """
        spelling = _foreign.spelling_of(module, cls.__name__, _foreign.HEAD)
        parts = {o: _foreign.child(module, str(t)) for o, t in spelling.children.items()}
        stages = [parts[f"linear_c{s}.proj"] for s in (1, 2, 3, 4)]
        dropout = _foreign.child(module, "dropout")
        if not isinstance(dropout, nn.Dropout | nn.Dropout2d | None):
            raise TypeError(f"dropout must be an nn.Dropout or nn.Dropout2d; got {dropout}")
        with torch.device("meta"):
            layer = cls(
                [getattr(p, "in_features", 1) for p in stages],
                getattr(stages[0], "out_features", 1),
                getattr(parts["linear_pred"], "out_channels", 1),
                fold=fold,
            )
        layer.dropout = nn.Identity() if dropout is None else type(dropout)(dropout.p)
        adopt(layer, module, spelling)
        return layer

    def forward(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Four stages -> logits `[B, K, H_1, W_1]`.

        features: tokens `[B, H_s W_s, C_s]` with sizes `(H_s, W_s)`, or maps `[B, C_s, H_s, W_s]`
        without. Raises TypeError or ValueError naming the argument.
        """
        features, sizes = self._tokens(features, sizes)
        multiply = self.fold and self._is_plain()
        fused = self._folded(features, sizes) if multiply else self._published(features, sizes)
        # Whoever looks at what the norm returns must not find it changed.
        last = self.linear_fuse
        ours = last is None or (is_plain(last) and is_plain(last.bn))
        return self.linear_pred(self.dropout(F.relu(fused, inplace=ours)))

    def _tokens(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        _check_four("features", features, object)
        if sizes is not None:
            _check_four("sizes", sizes, object)
        tokens, found = [], []
        stages = zip(features, self.in_channels, self._stages(), strict=True)
        for s, (x, channels, stage) in enumerate(stages):
            name = f"features[{s}]"
            if sizes is None and not check_form(name, x):
                raise TypeError(f"sizes must be given for tokens {name} [B, L, C]; got None")
            height, width = (None, None) if sizes is None else _size(s, sizes[s])
            x, height, width = as_tokens(name, x, height, width)
            batch = features[0].shape[0]  # of `len` the compiler makes a constant
            if x.shape[0] != batch:
                raise ValueError(
                    f"{name} must have the batch size of features[0], {batch}; got {x.shape[0]}"
                )
            if x.shape[-1] != channels:
                raise ValueError(f"{name} must have {channels} channels; got {x.shape[-1]}")
            if is_plain(stage):
                check_belongs(name, x, stage.proj)
            tokens.append(x)
            found.append((height, width))
        return tokens, found

    @torch.no_grad()
    def fold_(self) -> "SegmentationHead":
        """For inference: multiply the fusing convolution and its norm into the four projections.

        The same function with one pass less over the widest features. Cannot be undone, and
        training raises RuntimeError afterwards, as this does where one of them has hooks, a
        parametrisation or an adapter. Returns the module.
        """
        if self.linear_fuse is None:
            return self
        self.check_foldable()
        norm = self.linear_fuse.bn
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weights, bias = self._composed()
        for projection, weight in zip(self._projections(), weights, strict=True):
            projection.weight = nn.Parameter(scale[:, None] * weight)
            projection.register_parameter("bias", None)
        shift = norm.bias + scale * (bias - norm.running_mean)
        self._projections()[0].bias = nn.Parameter(shift)
        self.linear_fuse = None
        self.fold = True
        return self.eval()

    def check_foldable(self) -> None:
        """RuntimeError if `fold_` would refuse."""
        if self.linear_fuse is not None:
            stages = (f"linear_c{s}{path}" for path in ("", ".proj") for s in (1, 2, 3, 4))
            demand_plain(self, *stages, "linear_fuse", "linear_fuse.conv", "linear_fuse.bn")

    def train(self, mode: bool = True) -> "SegmentationHead":
        """As `nn.Module.train`; RuntimeError for a head folded for inference."""
        if mode and self.linear_fuse is None:
            raise RuntimeError("this head was folded for inference; train another copy of it")
        return super().train(mode)

    def _stages(self) -> tuple[_Projection, ...]:
        return self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4

    def _projections(self) -> list[nn.Linear]:
        return [stage.proj for stage in self._stages()]

    def _is_plain(self) -> bool:
        """Whether products of weights may stand for calls of the projections and what fuses."""
        if not is_plain(*self._stages()):
            return False
        fuse = self.linear_fuse
        if fuse is None:
            return is_plain(*self._projections())
        if not is_plain(fuse) or not is_plain(fuse.conv):
            return False
        fits = keeps_size(fuse.conv, 1) and fuse.conv.bias is None
        return fits and plain_parameters(*self._projections()) is not None

    def _composed(self) -> tuple[list[Tensor], Tensor]:
        """Weights `[dim, C_s]` of the four stages behind the fusing convolution, bias `[dim]`."""
        projections = self._projections()
        if self.linear_fuse is None:
            return [p.weight for p in projections], projections[0].bias
        # The concatenation is in the order stage 4, 3, 2, 1.
        slices = self.linear_fuse.conv.weight.flatten(1).chunk(4, dim=1)[::-1]
        weights = [f @ p.weight for f, p in zip(slices, projections, strict=True)]
        biases = [f @ p.bias for f, p in zip(slices, projections, strict=True)]
        return weights, biases[0] + biases[1] + biases[2] + biases[3]

    def _folded(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        weights, bias = self._composed()
        maps = (to_map(x, *size) for x, size in zip(features, sizes, strict=True))
        fused = pointwise_conv(next(maps), weights[0], bias)
        for x, weight in zip(maps, weights[1:], strict=True):
            fused += _upsample(pointwise_conv(x, weight, None), sizes[0])
        return fused if self.linear_fuse is None else batch_norm_map(self.linear_fuse.bn, fused)

    def _published(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        maps = [
            _upsample(to_map(stage(x), *size), sizes[0])
            for x, size, stage in zip(features, sizes, self._stages(), strict=True)
        ]
        if self.linear_fuse is None:
            return maps[0] + maps[1] + maps[2] + maps[3]
        return self.linear_fuse(torch.cat(maps[::-1], dim=1))

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_classes={self.num_classes}"
        return f"in_channels={list(self.in_channels)}, {sizes}, fold={self.fold}"


def _check_four(name: str, values: Any, kind: type) -> None:
    _checks.check_sequence(name, values, kind, "four, one for each stage")
    if len(values) != 4:
        raise ValueError(f"{name} must have four stages; got {len(values)}")


def _size(s: int, size: Any) -> tuple[int, int]:
    """Height and width of stage s."""
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"sizes[{s}] must be (height, width); got {size!r}")
    for number in size:
        _checks.check_sizes(**{f"sizes[{s}]": number})
    return size[0], size[1]


def _upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

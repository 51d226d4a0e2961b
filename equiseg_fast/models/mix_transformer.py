"""Mix Transformer, the encoder of SegFormer (arXiv 2105.15203)."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.nn import DropPath, EfficientSelfAttention, MixFFN, PatchEmbed, init_module
from equiseg_fast.nn._forms import check_belongs
from equiseg_fast.nn._init import normal_
from equiseg_fast.nn._layer import Layer
from equiseg_fast.nn._plain import plain_parameters
from equiseg_fast.ops import _checks, add_layer_norm
from equiseg_fast.ops._layout import to_map, to_tokens

from .config import HEADS, SR_RATIOS, VARIANTS, check_variant, drop_path_rates


def _add_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    parameters = plain_parameters(norm)
    if parameters is None:
        total = x + update
        return total, norm(total)
    weight, bias = parameters
    return add_layer_norm(x, update, weight, bias, norm.eps)


def _different(in_channels: int | Sequence[int]) -> tuple[int, ...]:
    """The different numbers of channels, 3 first, because published weights have 3."""
    numbers = in_channels if isinstance(in_channels, Sequence) else [in_channels]
    if numbers is in_channels:
        _checks.check_sequence("in_channels", numbers, Integral, "integers")
    if not numbers:
        raise ValueError(f"in_channels must be at least one number; got {in_channels!r}")
    for number in numbers:
        _checks.check_sizes(in_channels=number)
    return tuple(sorted({int(x) for x in numbers}, key=lambda c: (c != 3, c)))


def _check_stage(stage: int) -> None:
    _checks.check_integer("stage", stage)
    if not 0 <= stage <= 3:
        raise ValueError(f"stage must be 0, 1, 2 or 3; got {stage}")


class SensorEmbed(PatchEmbed):
    """Patch embedding of images with different numbers of channels: a convolution for each number,
    one LayerNorm.

    channels: the numbers; `proj` is the convolution of the first, `others` has those of the rest.
    """

    def __init__(self, channels: Sequence[int], dim: int, kernel: int, stride: int, eps: float):
        super().__init__(channels[0], dim, kernel, stride, eps)
        self.others = nn.ModuleDict(
            {str(c): nn.Conv2d(c, dim, kernel, stride, kernel // 2) for c in channels[1:]}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Map `[R, C_in, H, W]`, C_in one of the numbers -> as `PatchEmbed`."""
        _checks.check_tensor("x", x, _checks.FLOATING, "[R, C_in, H, W]")
        name = str(int(x.shape[1]))
        if name not in self.others:
            return super().forward(x)
        check_belongs("x", x, self.others[name])
        y = self.others[name](x)
        return self.norm(to_tokens(y)), y.shape[2], y.shape[3]


class TransformerBlock(Layer):
    """Pre-norm efficient self-attention, then Mix-FFN, both residual."""

    def __init__(
        self, dim: int, heads: int, sr_ratio: int, drop_path: float, eps_embed: float, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = EfficientSelfAttention(dim, heads, sr_ratio, eps=eps_embed)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MixFFN(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        update: Tensor | None = None,
        *,
        defer: bool = False,
    ) -> Any:
        """`[R, L, dim]` -> `[R, L, dim]`, L = height * width.

        update `[R, L, dim]` is added to x first. With `defer` the last update of the block is not
        added but returned beside x, `(x, update)`: whoever has the LayerNorm that follows adds and
        normalises in one pass.
        """
        if update is None:
            y = self.norm1(x)
        else:
            x, y = _add_norm(x, update, self.norm1)
        update = self.drop_path(self.attn(y, height, width))
        x, y = _add_norm(x, update, self.norm2)
        update = self.drop_path(self.mlp(y, height, width))
        return (x, update) if defer else x + update


class MixTransformer(Layer):
    """Four stages of patch embedding, transformer blocks and LayerNorm, at strides 4, 8, 16, 32.

    variant: "b0" to "b5", or "nano"; in_channels of the images, several numbers if there are images
        of several kinds, each of which then has a first convolution of its own; drop_path of the
        last block, growing from 0; ln_eps_embed: LayerNorm eps behind convolutions; ln_eps_block:
        in blocks and at stage ends.

    Parameter names are those of the published checkpoints (`patch_embed1`, `block1`, `norm1`, ..).
    Beside `patch_embed1.proj`, which is for 3 channels if there are such images, further first
    convolutions are `patch_embed1.others.1` and so on, by their channels.
    """

    def __init__(
        self,
        variant: str = "b0",
        *,
        in_channels: int | Sequence[int] = 3,
        drop_path: float = 0.1,
        ln_eps_embed: float = 1e-5,
        ln_eps_block: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dims, depths = VARIANTS[check_variant(variant)]
        self.in_channels = _different(in_channels)
        drop_path = _checks.rate("drop_path", drop_path)
        ln_eps_embed = _checks.positive("ln_eps_embed", ln_eps_embed)
        ln_eps_block = _checks.positive("ln_eps_block", ln_eps_block)
        rates = drop_path_rates(drop_path, depths)
        for s in range(4):
            dim = self.dims[s]
            embed: PatchEmbed
            if s == 0 and len(self.in_channels) > 1:
                embed = SensorEmbed(self.in_channels, dim, 7, 4, ln_eps_embed)
            else:
                kernel, stride = (3, 2) if s else (7, 4)
                previous = self.dims[s - 1] if s else self.in_channels[0]
                embed = PatchEmbed(previous, dim, kernel, stride, eps=ln_eps_embed)
            blocks = nn.ModuleList(
                TransformerBlock(dim, HEADS[s], SR_RATIOS[s], rate, ln_eps_embed, ln_eps_block)
                for rate in rates[s]
            )
            setattr(self, f"patch_embed{s + 1}", embed)
            setattr(self, f"block{s + 1}", blocks)
            setattr(self, f"norm{s + 1}", nn.LayerNorm(dim, eps=ln_eps_block))
        self.apply(init_module)
        # Where a sensor saw nothing its image is zero, and with a bias of zero so would be the
        # token: LayerNorm after LayerNorm would multiply its gradient by 1 / sqrt(eps), to 1e7.
        for name, bias in self.patch_embed1.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                normal_(bias, 0.02)

    def embed(self, stage: int, x: Tensor) -> tuple[Tensor, int, int]:
        """Stage 0..3: map `[R, C, H, W]` -> tokens `[R, L, dim]` and their (height, width)."""
        _check_stage(stage)
        return getattr(self, f"patch_embed{stage + 1}")(x)

    def encode(self, stage: int, x: Tensor, height: int, width: int) -> Tensor:
        """Stage 0..3: blocks and final LayerNorm, tokens `[R, L, dim]` -> `[R, L, dim]`."""
        _check_stage(stage)
        _checks.check_tensor("x", x, _checks.FLOATING, "[R, L, dim]")
        _checks.check_tokens("x", x, height, width)
        if x.shape[-1] != self.dims[stage]:
            raise ValueError(
                f"x must have the {self.dims[stage]} channels of stage {stage}; got {x.shape[-1]}"
            )
        check_belongs("x", x, getattr(self, f"norm{stage + 1}"))
        update = None
        for block in getattr(self, f"block{stage + 1}"):
            x, update = block(x, height, width, update, defer=True)
        return _add_norm(x, update, getattr(self, f"norm{stage + 1}"))[1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images `[R, C, H, W]` -> four maps `[R, dim_s, H_s, W_s]` in channels-last memory."""
        _checks.check_tensor("x", x, _checks.FLOATING, "[R, C, H, W]")
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in range(4):
            tokens, height, width = self.embed(stage, x)
            x = to_map(self.encode(stage, tokens, height, width), height, width)
            maps.append(x)
        return maps

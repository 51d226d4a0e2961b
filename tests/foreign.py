"""Layers in the spellings of others, as small as they can be, for tests of what takes them over.

Written after SegFormer (arXiv 2105.15203), CMNeXt (arXiv 2303.01480), PVTv2 (arXiv 2106.13797), and
the names of children in transformers 4, MMSegmentation and timm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention4(nn.Module):
    """SegFormer's attention as transformers 4 has it."""

    def __init__(self, dim: int = 16, heads: int = 2, sr_ratio: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dropout = nn.Dropout(p)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.layer_norm = nn.LayerNorm(dim)

    def forward(
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> Any:
        heads = (self.num_attention_heads, -1)
        q, source = self.query(hidden_states).unflatten(-1, heads), hidden_states
        if self.sr_ratio > 1:
            source = self.sr(source.mT.unflatten(-1, (height, width)))
            source = self.layer_norm(source.flatten(2).mT)
        k, v = (x(source).unflatten(-1, heads) for x in (self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = self.dropout(scores.softmax(dim=-1))
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return (out, weights) if output_attentions else (out,)


class Convolution(nn.Module):
    """The depthwise convolution of Mix-FFN, on tokens."""

    def __init__(self, dim: int, **fields: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"kernel_size": 3, "padding": 1, "groups": dim}
        self.dwconv = nn.Conv2d(dim, dim, **{**settings, **fields})

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.dwconv(x.mT.unflatten(-1, (height, width))).flatten(2).mT


class MixFFN4(nn.Module):
    """Mix-FFN as transformers 4 has it."""

    def __init__(self, act: Any = F.gelu, p: float = 0.0, **fields: Any) -> None:
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.dwconv = Convolution(24, **fields)
        self.intermediate_act_fn = act
        self.dropout = nn.Dropout(p)

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        x = self.dwconv(self.dense1(hidden_states), height, width)
        x = self.dense2(self.dropout(self.intermediate_act_fn(x)))
        return self.dropout(x)


class AttentionMiT(nn.Module):
    """Attention as CMNeXt has it."""

    def __init__(self, dim: int = 16, head: int = 2, sr_ratio: int = 2) -> None:
        super().__init__()
        self.head, self.sr_ratio, self.scale = head, sr_ratio, (dim // head) ** -0.5
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def split(self, kv: Tensor) -> tuple[Tensor, ...]:
        return kv.unflatten(-1, (2, self.head, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        q = self.q(x).unflatten(-1, (self.head, -1)).transpose(1, 2)
        if self.sr_ratio > 1:
            x = self.norm(self.sr(x.mT.unflatten(-1, (H, W))).flatten(2).mT)
        k, v = self.split(self.kv(x))
        weights = (q @ k.mT * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class MLPMiT(nn.Module):
    """Mix-FFN as CMNeXt has it: the activation is written out."""

    approximate = "none"

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.dwconv = Convolution(24)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        y = self.dwconv(self.fc1(x), H, W)
        return self.fc2(F.gelu(y, approximate=self.approximate))


class ConvMM(nn.Conv2d):
    """A convolution as MMCV has it: a class of its own that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class DropPath(nn.Module):
    """Stochastic depth as MMCV has it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        kept = torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device) >= self.drop_prob
        return x * kept / (1 - self.drop_prob)


class AttentionMM(nn.Module):
    """Attention as MMSegmentation has it: around `nn.MultiheadAttention`, with the residual."""

    def __init__(
        self, sr_ratio: int = 2, p: float = 0.0, bias: bool = True, path: float = 0.0, **fields: Any
    ) -> None:
        super().__init__()
        self.embed_dims, self.sr_ratio, self.batch_first = 16, sr_ratio, True
        self.attn = nn.MultiheadAttention(16, 2, p, bias=bias, **fields)
        self.proj_drop, self.dropout_layer = nn.Dropout(0.1), DropPath(path)
        if sr_ratio > 1:
            self.sr, self.norm = ConvMM(16, 16, sr_ratio, sr_ratio), nn.LayerNorm(16)

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None
    ) -> Tensor:
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(x.mT.unflatten(-1, hw_shape)).flatten(2).mT)
        q, kv = x.transpose(0, 1), source.transpose(0, 1)
        out = self.attn(query=q, key=kv, value=kv)[0].transpose(0, 1)
        return (x if identity is None else identity) + self.dropout_layer(self.proj_drop(out))


class MixFFNMM(nn.Module):
    """Mix-FFN as MMSegmentation has it: 1x1 convolutions on maps, with the residual."""

    def __init__(
        self, act: Any = nn.GELU, p: float = 0.0, path: float = 0.0, kernel: int = 3
    ) -> None:
        super().__init__()
        self.embed_dims = 16
        self.activate, drop = act(), nn.Dropout(p)
        self.layers = nn.Sequential(
            ConvMM(16, 24, 1), ConvMM(24, 24, kernel, padding=kernel // 2, groups=24),
            self.activate, drop, ConvMM(24, 16, 1), drop,
        )  # fmt: skip
        self.dropout_layer = DropPath(path)

    def forward(
        self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None
    ) -> Tensor:
        out = self.layers(x.mT.unflatten(-1, hw_shape)).flatten(2).mT
        return (x if identity is None else identity) + self.dropout_layer(out)


class AttentionPVT(nn.Module):
    """Attention as timm's PVTv2 has it."""

    def __init__(self, sr_ratio: int = 2, linear: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, 8**-0.5
        self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.attn_drop, self.proj_drop = nn.Dropout(p), nn.Dropout(0.1)
        self.pool = nn.AdaptiveAvgPool2d(7) if linear else None
        self.sr = nn.Conv2d(16, 16, sr_ratio, sr_ratio) if sr_ratio > 1 or linear else None
        self.norm = nn.LayerNorm(16) if self.sr is not None else None
        self.act = nn.GELU() if linear else None

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        q, source = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2), x
        if self.sr is not None and self.norm is not None:
            maps = source.mT.unflatten(-1, feat_size)
            maps = maps if self.pool is None else self.pool(maps)
            source = self.norm(self.sr(maps).flatten(2).mT)
            source = source if self.act is None else self.act(source)
        k, v = self.kv(source).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class MLPPVT(nn.Module):
    """Mix-FFN as timm's PVTv2 has it: the convolution itself is `dwconv`."""

    def __init__(self, p: float = 0.0, extra_relu: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.relu = nn.ReLU() if extra_relu else nn.Identity()
        self.dwconv, self.act = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.GELU()
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        x = self.relu(self.fc1(x).mT.unflatten(-1, feat_size))
        x = self.act(self.dwconv(x).flatten(2).mT)
        return self.drop(self.fc2(self.drop(x)))


class SegformerAttention4(nn.Module):
    """The whole attention of transformers 4: its `self`, and the projection behind."""

    def __init__(self, sr_ratio: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.self = Attention4(sr_ratio=sr_ratio)
        self.output = nn.Module()
        self.output.dense, self.output.dropout = nn.Linear(16, 16), nn.Dropout(p)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.output.dense(self.self(x, height, width)[0])


class PredictorConv(nn.Module):
    """CMNeXt's score nets, and the gating of its query hub: maps to maps."""

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__()
        self.score_nets = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim), nn.Conv2d(dim, 1, 1))
            for _ in range(modalities)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """`[M, B, C, H, W]` -> `[M, B, C, H, W]`, gated."""
        pairs = zip(maps, self.score_nets, strict=True)
        return torch.stack([net(x).sigmoid() * x + x for x, net in pairs])


class MSPABlock(nn.Module):
    """CMNeXt's parallel pooling mixer, on maps."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        hidden = ratio * dim
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim, momentum=0.2)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.conv0 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.attn.conv4 = nn.Conv2d(dim, dim, 1)
        self.c_nets = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False))
        self.mlp.fc1, self.mlp.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.mlp.dwconv = nn.Module()
        self.mlp.dwconv.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.layer_scale_1, self.layer_scale_2 = (
            nn.Parameter(torch.full((dim,), 1e-2)) for _ in range(2)
        )
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        a = self.attn.conv0(u)
        a = a + sum(F.avg_pool2d(a, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11))
        y = self.attn.conv4(a).sigmoid() * u + u
        x = x + self.layer_scale_1[:, None, None] * y
        gate = self.c_nets(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]
        y = self.mlp.dwconv.dwconv(self.mlp.fc1(self.norm2(x)))
        return gate * x + self.layer_scale_2[:, None, None] * self.mlp.fc2(F.gelu(y))


class DecodeHead(nn.Module):
    """The head of SegFormer's authors (`own`), or of transformers 4."""

    def __init__(self, channels: list[int], dim: int, classes: int, own: bool) -> None:
        super().__init__()
        stages = []
        for s, c in enumerate(channels):
            stages.append(nn.Module())
            stages[s].proj = nn.Linear(c, dim)
        fuse, norm = nn.Conv2d(4 * dim, dim, 1, bias=False), nn.BatchNorm2d(dim, eps=1e-3)
        self.own = own
        if own:
            self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4 = stages
            self.linear_fuse = nn.Module()
            self.linear_fuse.conv, self.linear_fuse.bn = fuse, norm
            self.dropout = nn.Dropout2d(0.1)
            self.linear_pred = nn.Conv2d(dim, classes, 1)
            self.conv_seg = nn.Conv2d(dim, classes, 1)  # never used
        else:
            self.linear_c = nn.ModuleList(stages)
            self.linear_fuse, self.batch_norm = fuse, norm
            self.dropout = nn.Dropout(0.2)
            self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        names = ("linear_c1", "linear_c2", "linear_c3", "linear_c4")
        stages = [getattr(self, n) for n in names] if self.own else self.linear_c
        maps = []
        for x, stage in zip(features, stages, strict=True):
            y = stage.proj(x.flatten(2).mT).mT.unflatten(-1, x.shape[-2:])
            maps.append(F.interpolate(y, features[0].shape[-2:], mode="bilinear"))
        x = torch.cat(maps[::-1], dim=1)
        if self.own:
            x = self.linear_fuse.bn(self.linear_fuse.conv(x))
        else:
            x = self.batch_norm(self.linear_fuse(x))
        return (self.linear_pred if self.own else self.classifier)(self.dropout(x.relu()))

"""Layers in the spellings of others, as small as they can be, for tests of what takes them over.

Written after SegFormer (arXiv 2105.15203), CMNeXt (arXiv 2303.01480), and
transformers 4.
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

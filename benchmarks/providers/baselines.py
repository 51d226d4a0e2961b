"""Operations in eager PyTorch as public multimodal models are written: what ratios start from.

The habits are those of SegFormer, CMNeXt and their descendants: one modality at a time in Python
loops, softmax attention with the whole score matrix in memory, tokens and NCHW maps converted into
each other around every convolution, score nets evaluated again for every primary modality, a
channel norm written by hand, the decode head unfolded, and losses that loop over images and classes
and ask the device whether a class is there. Where a public model gets a view for free (SegFormer's
`transpose` + `view` in front of the depthwise convolution) so does this one.

The operations take and return what `equiseg_fast.ops` takes and returns, so conversions to NCHW are
part of those that public models write in NCHW. Layers and model share the parameters of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce, wraps
from math import log
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast import reference

if TYPE_CHECKING:  # `against` calls the operations of revisions that may have no such layers
    from equiseg_fast import models
    from equiseg_fast import nn as layers

ScoreNet = tuple[Tensor, Tensor, Tensor, Tensor]

upsample_cross_entropy = reference.upsample_cross_entropy
"""Full-resolution logits, then cross-entropy: public code writes it as the formula has it."""


def wide(x: Tensor) -> Tensor:
    return x.to(reference.statistics_dtype(x))


_memory_format = torch.contiguous_format


def channels_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of this module with its maps in channels-last memory, where tokens are a view.

    Weights stay as they are; cuDNN converts those of dense convolutions at every call.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _memory_format
        _memory_format = torch.channels_last
        try:
            return function(*args, **kwargs)
        finally:
            _memory_format = torch.contiguous_format

    return run


def in_memory_format(x: Tensor) -> Tensor:
    """A map `[B, C, H, W]` in the memory format on trial: contiguous but under `channels_last`."""
    return x.contiguous(memory_format=_memory_format)


def to_nchw(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, L, C]` -> `[B, C, height, width]`, by default a copy, as at a stage's end."""
    x = x.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
    return in_memory_format(x)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with the score matrix `[B, H, Lq, Lk]`; arguments as `ops.attention`."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """SegFormer's `DWConv` and the activation behind it, as `ops.depthwise_conv_gelu`."""
    batch, _, channels = x.shape
    y = x.transpose(1, 2).view(batch, channels, height, width)
    y = F.conv2d(y, weight, bias, padding=1, groups=channels)
    return F.gelu(to_tokens(y))


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A residual connection and the norm of what comes next, as `ops.add_layer_norm`."""
    total = x + update
    y = total
    if x.device.type == "cpu":
        # Half-precision gradients of the parameters would be added up in half precision, and wrong.
        y, weight, bias = wide(total), wide(weight), wide(bias)
    return total, F.layer_norm(y, weight.shape, weight, bias, eps).to(x.dtype)


def _scored(x: Tensor, net: ScoreNet) -> Tensor:
    """CMNeXt's self-gating of one modality: x `[B, C, H, W]` -> the same."""
    dw_weight, dw_bias, pw_weight, pw_bias = net
    y = F.conv2d(x, dw_weight[:, None], dw_bias, padding=1, groups=x.shape[1])
    y = F.conv2d(y, pw_weight[None, :, None, None], pw_bias[None])
    return y.sigmoid() * x + x


def hub_of(primary: int, maps: Sequence[Tensor], nets: Sequence[ScoreNet]) -> Tensor:
    """Score every other modality and take the maximum pair by pair, in NCHW."""
    others = [_scored(x, nets[m]) for m, x in enumerate(maps) if m != primary]
    return reduce(torch.max, others)


def score_nets(*parameters: Tensor) -> list[ScoreNet]:
    return list(zip(*(p.unbind() for p in parameters), strict=True))


def query_hub(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """One hub per primary, the others scored again each time; arguments as `ops.query_hub`."""
    maps = [to_nchw(tokens, height, width) for tokens in x]
    nets = score_nets(dw_weight, dw_bias, pw_weight, pw_bias)
    return torch.stack([to_tokens(hub_of(i, maps, nets)) for i in range(len(maps))])


def pooled(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(u, weight, bias, padding=3, groups=u.shape[1])
    pools = [F.avg_pool2d(y, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11)]
    return sum(pools, start=y)


def pooling_mixer(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Convolution and three pools in NCHW, added up; arguments as `ops.pooling_mixer`."""
    return to_tokens(pooled(to_nchw(x, height, width), weight, bias))


def guided_gate(x: Tensor, logits: Tensor, rho: float = 0.5) -> tuple[Tensor, Tensor]:
    """Softmax, then one modality after the other; arguments as `ops.guided_gate`."""
    weights = logits.softmax(dim=0)
    modalities = len(x)
    branches = []
    fused = torch.zeros_like(x[0], dtype=weights.dtype)
    for tokens, weight in zip(x, weights, strict=True):
        g = weight.unsqueeze(1)
        branches.append((tokens * (1 + rho * (modalities * g - 1))).to(x.dtype))
        fused = fused + g * tokens
    return torch.stack(branches), fused.to(x.dtype)


def _small_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Nearest resizing the usual way, through a float image: `[B, H, W]` -> `[B, h * w]`."""
    small = F.interpolate(labels[:, None].float(), size=(height, width), mode="nearest")
    return small[:, 0].long().flatten(1)


def class_prototypes(
    x: Tensor, labels: Tensor, num_classes: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Boolean indexing per modality, image and class; arguments as `ops.class_prototypes`."""
    small = _small_labels(labels, height, width)
    rows = [
        image[mask].mean(dim=0) if mask.sum() > 0 else image.new_zeros(image.shape[-1])
        for tokens in wide(x)
        for image, marks in zip(tokens, small, strict=True)
        for mask in (marks == c for c in range(num_classes))
    ]
    counts = [(marks == c).sum() for marks in small for c in range(num_classes)]
    prototypes = torch.stack(rows).view(*x.shape[:2], num_classes, -1)
    return prototypes, torch.stack(counts).view(-1, num_classes)


def ohem(loss: Tensor, labels: Tensor, thresh: float, ignore_index: int) -> Tensor:
    """Online hard example mining with boolean indexing, which waits for the device twice."""
    flat = loss.flatten()
    least = int((labels != ignore_index).sum()) // 16
    hard = flat[flat > -log(thresh)]
    if hard.numel() < least:
        hard = flat.topk(least).values
    return hard.mean()


def mix_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """SegFormer's Mix-FFN; arguments as `ops.mix_ffn`."""
    hidden = F.linear(x, fc1_weight, fc1_bias)
    hidden = depthwise_conv_gelu(hidden, dw_weight, dw_bias, height, width)
    return F.linear(hidden, fc2_weight, fc2_bias)


def prototype_loss(
    features: Sequence[Tensor], small: Tensor, order: Sequence[int], num_classes: int, tau: float
) -> Tensor:
    """Self-distillation of one stage: M features `[B, L, C]`, labels `[B, L]` -> scalar."""
    teachers = order[: max(1, len(order) // 2)]
    students = [m for m in order if m not in teachers]
    total = wide(features[0].new_zeros(()))
    for b, marks in enumerate(small):
        masks = [marks == c for c in range(num_classes)]
        masks = [mask for mask in masks if mask.sum() > 0]
        if len(masks) < 2 or not students:
            continue
        means = {
            m: torch.stack([wide(features[m][b])[mask].mean(dim=0) for mask in masks])
            for m in order
        }
        with torch.no_grad():
            target = torch.stack([means[m] for m in teachers]).mean(dim=0) / tau
            target = target.softmax(dim=0)
        loss = 0.0
        for m in students:
            student = (means[m] / tau).log_softmax(dim=0)
            loss = loss + F.kl_div(student, target, reduction="none").sum(dim=0).mean()
        total = total + loss / len(students)
    return tau**2 * total / len(small)


# ---- layers and the model ------------------------------------------------------------------------


def _attention_layer(
    layer: layers.CrossModalAttention, x: Tensor, source: Tensor, height: int, width: int
) -> Tensor:
    """SegFormer's efficient attention, x and source `[B, L, C]`."""
    batch, _, channels = x.shape
    q = layer.q(x).reshape(batch, -1, layer.heads, channels // layer.heads)
    if layer.sr_ratio > 1:
        source = source.permute(0, 2, 1).reshape(batch, channels, height, width)
        source = layer.sr(source).reshape(batch, channels, -1).permute(0, 2, 1)
        source = layer.norm(source)
    kv = layer.kv(source).reshape(batch, -1, 2, layer.heads, channels // layer.heads)
    y = attention(q, kv[:, :, 0], kv[:, :, 1])
    return layer.proj(y.reshape(x.shape))


def _mix_ffn(mlp: layers.MixFFN, x: Tensor, height: int, width: int) -> Tensor:
    conv, first, last = mlp.dwconv.dwconv, mlp.fc1, mlp.fc2
    return mix_ffn(
        x, first.weight, first.bias, conv.weight, conv.bias, last.weight, last.bias, height, width
    )


def _pooling_mixer_block(block: layers.ParallelPoolingMixer, x: Tensor) -> Tensor:
    """CMNeXt's parallel pooling mixer in NCHW, x `[B, C, H, W]`."""
    u = nn.BatchNorm2d.forward(block.norm1, x)
    shortcut = u.clone()
    gate = block.attn.conv4(pooled(u, block.attn.conv0.weight, block.attn.conv0.bias)).sigmoid()
    y = gate * shortcut + shortcut
    x = x + block.layer_scale_1[:, None, None] * y

    mean = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
    channel_gate = block.c_nets(mean).transpose(-1, -2).unsqueeze(-1).sigmoid()
    hidden = block.mlp.fc1(nn.BatchNorm2d.forward(block.norm2, x))
    hidden = F.gelu(block.mlp.dwconv.dwconv(hidden))
    y = block.layer_scale_2[:, None, None] * block.mlp.fc2(hidden)
    return x * channel_gate.expand_as(x) + y


def _channel_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """CMNeXt's channel-first LayerNorm, by hand."""
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(var + norm.eps)
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


def encode_stage(encoder: models.MixTransformer, s: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Stage s on a map `[B, C, H, W]`: embedded `[B, C, h, w]` and encoded `[B, h w, C]`."""
    embed = getattr(encoder, f"patch_embed{s + 1}")
    x = embed.proj(x)
    height, width = x.shape[-2:]
    x = embed.norm(to_tokens(x))
    embedded = to_nchw(x, height, width)
    for block in getattr(encoder, f"block{s + 1}"):
        y = block.norm1(x)
        x = x + _attention_layer(block.attn, y, y, height, width)
        x = x + _mix_ffn(block.mlp, block.norm2(x), height, width)
    return embedded, getattr(encoder, f"norm{s + 1}")(x)


def encode(encoder: models.MixTransformer, images: Tensor) -> Tensor:
    """Mix Transformer: images `[B, 3, H, W]` -> features of the last stage `[B, C, h, w]`."""
    x = in_memory_format(images)
    for s in range(4):
        embedded, tokens = encode_stage(encoder, s, x)
        x = to_nchw(tokens, *embedded.shape[-2:])
    return x


def cross_modal_block(
    block: layers.CrossModalBlock, embedded: Sequence[Tensor], encoded: Sequence[Tensor]
) -> list[Tensor]:
    """M embedded maps `[B, C, h, w]` and encoded tokens `[B, L, C]` -> M features `[B, L, C]`."""
    hub, size = block.query_hub, embedded[0].shape[-2:]
    nets = score_nets(hub.dw_weight, hub.dw_bias, hub.pw_weight, hub.pw_bias)
    # All hubs in one batch, because in training they share the statistics of BatchNorm.
    mixed = torch.cat([hub_of(i, embedded, nets) for i in range(len(embedded))])
    for mixer in block.mixer:
        mixed = _pooling_mixer_block(mixer, mixed)
    mixed = _channel_norm(block.mixer_norm, mixed)
    sources = mixed.chunk(len(encoded))
    return [
        x + _attention_layer(block.attn, x, to_tokens(source), *size)
        for x, source in zip(encoded, sources, strict=True)
    ]


def balance(gate: layers.SelfGuidedGate, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """M features `[B, L, C]` -> branches `[M, B, L, C]` and the fused map `[B, L, C]`."""
    own = [wide(x).mean(dim=1) for x in tokens]
    logits = []
    for m, mean in enumerate(own):
        others = [x for n, x in enumerate(own) if n != m]
        context = torch.stack(others).sum(dim=0) / len(others)
        hidden = F.gelu(gate.fc1(torch.cat([mean, context], dim=-1)))
        logits.append(gate.fc2(hidden) / gate.tau)
    return guided_gate(torch.stack(list(tokens)), wide(torch.stack(logits)), gate.rho)


def _padded(x: Tensor, value: float) -> Tensor:
    """Images or labels with rows and columns added until both are multiples of 32."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 32, 0, -height % 32), value=value)


class EagerBaseline:
    """The same network on the same parameters, one modality after the other.

    model: an EQUISeg with a shared encoder, gated fusion and no random layers (`drop_path`,
    `head_dropout` and `modality_dropout` 0); all modalities are present. Images of any size, padded
    and cropped as by the model.
    """

    def __init__(self, model: models.EQUISeg) -> None:
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """`[M, B, 3, H, W]` -> logits `[B, num_classes, H, W]`."""
        height, width = images.shape[-2:]
        images = _padded(images, 0.0)
        _, fused = self._stages(images)
        size = tuple(images.shape[-2:])
        logits = F.interpolate(self._head(fused), size=size, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def loss(self, images: Tensor, labels: Tensor, order: Sequence[int]) -> Tensor:
        """Segmentation plus self-guided loss, a scalar; arguments as `EQUISeg.loss`, but that
        Python code takes the order of the teachers as numbers."""
        config = self.model.config
        images, labels = _padded(images, 0.0), _padded(labels, config.ignore_index)
        features, fused = self._stages(images)
        ignore = config.ignore_index
        per_pixel = upsample_cross_entropy(self._head(fused), labels, ignore_index=ignore)
        total = ohem(per_pixel, labels, config.ohem_thresh, ignore)
        for s in config.sgm_stages if len(images) > 1 else ():
            small = _small_labels(labels, *fused[s - 1].shape[-2:])
            classes, tau = config.num_classes, config.sgm_tau
            stage = prototype_loss(features[s - 1], small, order, classes, tau)
            total = total + config.sgm_weight * stage / len(config.sgm_stages)
        return total

    def _stages(self, images: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Per stage M features `[B, L, C]` before the gate, and the fused map `[B, C, H, W]`."""
        maps = [in_memory_format(x) for x in images]
        features, fused = [], []
        for s in range(4):
            pairs = [encode_stage(self.model.encoder, s, x) for x in maps]
            embedded, encoded = (list(part) for part in zip(*pairs, strict=True))
            height, width = embedded[0].shape[-2:]
            tokens, branches, merged = encoded, encoded, encoded[0]
            if len(maps) > 1:
                tokens = cross_modal_block(self.model.fusion[s], embedded, encoded)
                branches, merged = balance(self.model.gates[s], tokens)
            features.append(tokens)
            fused.append(to_nchw(merged, height, width))
            maps = [to_nchw(x, height, width) for x in branches]
        return features, fused

    def _head(self, fused: list[Tensor]) -> Tensor:
        """SegFormer's head as published: project, upsample, concatenate, fuse, classify."""
        head = self.model.head
        size = tuple(fused[0].shape[-2:])
        parts = (head.linear_c1, head.linear_c2, head.linear_c3, head.linear_c4)
        maps = []
        for x, part in zip(fused, parts, strict=True):
            y = part.proj(to_tokens(x)).permute(0, 2, 1).reshape(len(x), -1, *x.shape[-2:])
            maps.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        y = head.linear_fuse.conv(torch.cat(maps[::-1], dim=1))
        y = head.dropout(F.relu(head.linear_fuse.bn(y)))
        return head.linear_pred(y)

"""EQUISeg and its parts in eager PyTorch as public models are written, on our parameters.

In the style of `baselines`, which says what that is. `EagerBaseline` shares the
parameters of an `EQUISeg` and computes the same function, in training too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers.baselines import (
    attention,
    guided_gate,
    hub_of,
    in_memory_format,
    mix_ffn,
    ohem,
    pooled,
    prototype_loss,
    score_nets,
    to_nchw,
    to_tokens,
    upsample_cross_entropy,
    wide,
)
from equiseg_fast.models import EQUISeg, MixTransformer
from equiseg_fast.nn import (
    CrossModalAttention,
    CrossModalBlock,
    MixFFN,
    ParallelPoolingMixer,
    SelfGuidedGate,
)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _attention_layer(
    layer: CrossModalAttention, x: Tensor, source: Tensor, height: int, width: int
) -> Tensor:
    """SegFormer's efficient attention, x and source `[B, L, C]`."""
    batch, _, channels = x.shape
    q = _linear(layer.q, x).reshape(batch, -1, layer.heads, channels // layer.heads)
    if layer.sr_ratio > 1:
        source = source.permute(0, 2, 1).reshape(batch, channels, height, width)
        source = layer.sr(source).reshape(batch, channels, -1).permute(0, 2, 1)
        source = layer.norm(source)
    kv = _linear(layer.kv, source).reshape(batch, -1, 2, layer.heads, channels // layer.heads)
    y = attention(q, kv[:, :, 0], kv[:, :, 1])
    return _linear(layer.proj, y.reshape(x.shape))


def _mix_ffn(mlp: MixFFN, x: Tensor, height: int, width: int) -> Tensor:
    conv, first, last = mlp.dwconv.dwconv, mlp.fc1, mlp.fc2
    return mix_ffn(
        x, first.weight, first.bias, conv.weight, conv.bias, last.weight, last.bias, height, width
    )


def _pooling_mixer_block(block: ParallelPoolingMixer, x: Tensor) -> Tensor:
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


def encode_stage(encoder: MixTransformer, s: int, x: Tensor) -> tuple[Tensor, Tensor]:
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


def encode(encoder: MixTransformer, images: Tensor) -> Tensor:
    """Mix Transformer: images `[B, 3, H, W]` -> features of the last stage `[B, C, h, w]`."""
    x = in_memory_format(images)
    for s in range(4):
        embedded, tokens = encode_stage(encoder, s, x)
        x = to_nchw(tokens, *embedded.shape[-2:])
    return x


def cross_modal_block(
    block: CrossModalBlock,
    embedded: Sequence[Tensor],
    encoded: Sequence[Tensor],
    height: int,
    width: int,
) -> list[Tensor]:
    """M embedded maps `[B, C, h, w]` and encoded tokens `[B, L, C]` -> M features `[B, L, C]`."""
    hub = block.query_hub
    nets = score_nets(hub.dw_weight, hub.dw_bias, hub.pw_weight, hub.pw_bias)
    # All hubs in one batch, because in training they share the statistics of BatchNorm.
    mixed = torch.cat([hub_of(i, embedded, nets) for i in range(len(embedded))])
    for mixer in block.mixer:
        mixed = _pooling_mixer_block(mixer, mixed)
    mixed = _channel_norm(block.mixer_norm, mixed)
    sources = mixed.chunk(len(encoded))
    return [
        x + _attention_layer(block.attn, x, to_tokens(source), height, width)
        for x, source in zip(encoded, sources, strict=True)
    ]


def balance(gate: SelfGuidedGate, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
    `head_dropout` and `modality_dropout` 0); all modalities are present. Raises ValueError for any
    other configuration. Images of any size, padded and cropped as by the model.
    """

    def __init__(self, model: EQUISeg) -> None:
        config = model.config
        wanted = {
            "share_encoder": True, "gate": True, "fuse": "gate", "aux_source": "embed",
            "drop_path": 0.0, "head_dropout": 0.0, "modality_dropout": 0.0,
        }  # fmt: skip
        for name, value in wanted.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name} must be {value!r}; got {getattr(config, name)!r}")
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """`[M, B, 3, H, W]` -> logits `[B, num_classes, H, W]`."""
        height, width = images.shape[-2:]
        images = _padded(images, 0.0)
        _, fused = self._stages(images)
        size = tuple(images.shape[-2:])
        logits = F.interpolate(self._head(fused), size=size, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def loss(self, images: Tensor, labels: Tensor, *, order: Sequence[int] | None = None) -> Tensor:
        """Segmentation plus self-guided loss, a scalar; arguments as `EQUISeg.loss`, but that
        Python code takes the order of the teachers as numbers."""
        config = self.model.config
        images, labels = _padded(images, 0.0), _padded(labels, config.ignore_index)
        features, fused = self._stages(images)
        per_pixel = upsample_cross_entropy(self._head(fused), labels, config.ignore_index)
        total = ohem(per_pixel, labels, config.ohem_thresh, config.ignore_index)
        order = torch.randperm(len(images)).tolist() if order is None else order
        for s in config.sgm_stages if len(images) > 1 else ():
            size = tuple(fused[s - 1].shape[-2:])
            tokens = features[s - 1]
            stage = prototype_loss(tokens, labels, *size, order, config.num_classes, config.sgm_tau)
            total = total + config.sgm_weight * stage / len(config.sgm_stages)
        return total

    def _stages(self, images: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Per stage M features `[B, L, C]` before the gate, and the fused map `[B, C, H, W]`."""
        maps = [in_memory_format(x) for x in images]
        features, fused = [], []
        for s in range(4):
            embedded, encoded = [], []
            for x in maps:
                pair = encode_stage(self.model.encoder, s, x)
                embedded.append(pair[0])
                encoded.append(pair[1])
            height, width = embedded[0].shape[-2:]
            tokens, branches, merged = encoded, encoded, encoded[0]
            if len(maps) > 1:
                tokens = cross_modal_block(self.model.fusion[s], embedded, encoded, height, width)
                branches, merged = balance(self.model.gates[s], tokens)
            features.append(tokens)
            fused.append(to_nchw(merged, height, width))
            maps = [to_nchw(x, height, width) for x in branches]
        return features, fused

    def _head(self, fused: list[Tensor]) -> Tensor:
        """SegFormer's head as published: project, upsample, concatenate, fuse, classify."""
        head = self.model.head
        size = tuple(fused[0].shape[-2:])
        layers = (head.linear_c1, head.linear_c2, head.linear_c3, head.linear_c4)
        maps = []
        for x, layer in zip(fused, layers, strict=True):
            y = layer.proj(to_tokens(x)).permute(0, 2, 1).reshape(len(x), -1, *x.shape[-2:])
            maps.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        y = head.linear_fuse.conv(torch.cat(maps[::-1], dim=1))
        y = head.dropout(F.relu(head.linear_fuse.bn(y)))
        return head.linear_pred(y)

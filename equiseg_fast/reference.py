"""The mathematics of EQUISeg in plain, differentiable PyTorch: the oracle of every test.

Features are tokens, channels last: `[B, L, C]` with `L = height * width` in row-major order, or
modality-major `[M, B, L, C]`. Every function runs on any device and in any floating dtype
(float64 included), supports double backward, and computes in the dtype it is given except where
a statistic is named fp32. A modality that is absent (`present` False) is never read: its values,
NaN included, change neither outputs nor gradients.

Sources: EQUISeg (arXiv 2509.24505); SegFormer (arXiv 2105.15203) for attention, Mix-FFN and the
decode head; CMNeXt (arXiv 2303.01480) for the query hub and the pooling mixer.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=height, w=width)


def _to_tokens(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def _only_present(x: Tensor, present: Tensor | None) -> Tensor:
    """Zero the absent modalities of x `[M, B, L, C]`, so that nothing they hold is ever used."""
    return x if present is None else x.masked_fill(~present[:, :, None, None], 0.0)


def _all_present(x: Tensor, present: Tensor | None) -> Tensor:
    """present, or an all-true `[M, B]` mask."""
    if present is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return present


# ---- attention and Mix-FFN (SegFormer) ----------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Any:
    """Softmax attention, `softmax(scale * q k^T) v`.

    q `[B, Lq, H, D]`, k and v `[B, Lk, H, D]` -> `[B, Lq, H, D]`, and with `return_lse` the
    natural logarithm of the softmax denominator, `[B, H, Lq]` in fp32. `scale` is 1/sqrt(D).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    if return_lse:
        return out, scores.to(statistics_dtype(q)).logsumexp(dim=-1)
    return out


def spatial_reduction(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int
) -> Tensor:
    """Convolution with kernel = stride = r on tokens: x `[B, L, C]`, weight `[C', C, r, r]`."""
    return _to_tokens(F.conv2d(_to_map(x, height, width), weight, bias, stride=weight.shape[-1]))


def depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """3x3 depthwise convolution (zero padding 1), bias and exact GELU on tokens.

    x `[B, L, C]`, weight `[C, 1, 3, 3]`, bias `[C]` -> `[B, L, C]`.
    """
    y = F.conv2d(_to_map(x, height, width), weight, bias, padding=1, groups=x.shape[-1])
    return _to_tokens(F.gelu(y))


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Residual addition, then LayerNorm over channels with statistics in fp32.

    x, update `[..., C]`, weight, bias `[C]` -> total `x + update` and its normalisation, `[..., C]`
    both.
    """
    total = x + update
    wide = total.to(statistics_dtype(total))
    var, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    return total, ((wide - mean) * (var + eps).rsqrt() * weight + bias).to(x.dtype)


# ---- query hub and pooling mixer (CMNeXt) -------------------------------------------------------


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
    """Mix-FFN of SegFormer; shapes as in `ops.mix_ffn`."""
    hidden = F.linear(x, fc1_weight, fc1_bias)
    hidden = depthwise_conv_gelu(hidden, dw_weight, dw_bias, height, width)
    return F.linear(hidden, fc2_weight, fc2_bias)


def hub_scores(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Per-pixel score `sigmoid(pw(dw(x)))` of every modality: `[M, B, L, 1]`.

    Each modality has its own score net: a depthwise 3x3 convolution (`dw_weight` `[M, C, 3, 3]`,
    `dw_bias` `[M, C]`, zero padding 1), then a 1x1 convolution to one channel (`pw_weight`
    `[M, C]`, `pw_bias` `[M]`).
    """
    modalities, _, _, channels = x.shape
    maps = rearrange(x, "m b (h w) c -> b (m c) h w", h=height, w=width)
    y = F.conv2d(
        maps,
        rearrange(dw_weight, "m c i j -> (m c) 1 i j"),
        rearrange(dw_bias, "m c -> (m c)"),
        padding=1,
        groups=modalities * channels,
    )
    y = rearrange(y, "b (m c) h w -> m b (h w) c", m=modalities)
    logits = torch.einsum("mblc,mc->mbl", y, pw_weight) + pw_bias[:, None, None]
    return logits.sigmoid()[..., None]


def query_hub(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    height: int,
    width: int,
    *,
    present: Tensor | None = None,
) -> Tensor:
    """For every primary modality the maximum over the *other* present ones, after self-gating.

    x `[M, B, L, C]`, score nets as in `hub_scores`, present `[M, B]` bool -> `[M, B, L, C]`:
    `t_m = (1 + score_m) x_m` and `hub_i = max over present m != i of t_m`, zero where there is no
    other. One pass serves all primaries: the hub of i is the largest t unless i itself holds it,
    and then the second largest. The gradient of a tie goes to the lowest modality index.
    """
    modalities = x.shape[0]
    x = _only_present(x, present)
    present = _all_present(x, present)
    t = x + x * hub_scores(x, dw_weight, dw_bias, pw_weight, pw_bias, height, width)
    t = t.masked_fill(~present[:, :, None, None], float("-inf"))

    winner = t.argmax(dim=0, keepdim=True)
    rest = t.scatter(0, winner, float("-inf"))
    runner_up = rest.argmax(dim=0, keepdim=True)
    index = torch.arange(modalities, device=x.device).view(-1, 1, 1, 1)
    hub = torch.where(index == winner, rest.gather(0, runner_up), t.gather(0, winner))
    return hub.masked_fill(~has_others(present)[:, :, None, None], 0.0)


def has_others(present: Tensor) -> Tensor:
    """Whether a modality other than this one is present: `[M, B]` bool -> `[M, B]` bool."""
    return present.sum(dim=0) - present.long() > 0


def pooling_mixer(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Depthwise 7x7 plus its 3x3, 7x7 and 11x11 average pools, summed, on tokens.

    x `[B, L, C]`, weight `[C, 1, 7, 7]`, bias `[C]` -> `[B, L, C]`. The convolution pads with
    zeros; the pools divide by the number of pixels inside the image.
    """
    y = F.conv2d(_to_map(x, height, width), weight, bias, padding=3, groups=x.shape[-1])
    pools = (F.avg_pool2d(y, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11))
    return _to_tokens(sum(pools, start=y))


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None = None
) -> Tensor:
    """Batch normalisation of tokens `[R, L, C]` with the statistics of the given rows only.

    rows `[R]` bool selects what enters mean and (biased) variance; all rows are normalised.
    """
    stats = x.to(statistics_dtype(x))
    w = torch.ones_like(stats[:, :1, :1]) if rows is None else rows.to(stats.dtype)[:, None, None]
    count = w.sum().clamp(min=1) * x.shape[1]
    mean = (stats * w).sum((0, 1)) / count
    var = ((stats - mean).square() * w).sum((0, 1)) / count
    return ((stats - mean) * (var + eps).rsqrt()).to(x.dtype) * weight + bias


def pooling_mixer_block(
    x: Tensor,
    p: Mapping[str, Tensor],
    height: int,
    width: int,
    *,
    batch_statistics: bool = False,
    rows: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The parallel pooling mixer (PPX) of CMNeXt on tokens: x `[R, L, C]` -> `[R, L, C]`.

    `p` holds the tensors of one block under CMNeXt's names: `norm1/2.{weight, bias, running_mean,
    running_var}`, `attn.conv0.*` (7x7 depthwise), `attn.conv4.*` (1x1), `c_nets.0.weight`,
    `layer_scale_1/2`, `mlp.{fc1, dwconv.dwconv, fc2}.*`. With `batch_statistics` the norms use the
    batch (only `rows` `[R]` bool of it), else the running statistics.
    """

    def norm(y: Tensor, name: str) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        if batch_statistics:
            return batch_norm(y, weight, bias, eps, rows)
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        return (y - mean) * (var + eps).rsqrt() * weight + bias

    def pointwise(y: Tensor, name: str) -> Tensor:
        return F.linear(y, p[f"{name}.weight"].flatten(1), p[f"{name}.bias"])

    u = norm(x, "norm1")
    a = pooling_mixer(u, p["attn.conv0.weight"], p["attn.conv0.bias"], height, width)
    x = x + p["layer_scale_1"] * (pointwise(a, "attn.conv4").sigmoid() * u + u)

    pooled = reduce(x, "r l c -> r 1 c", "mean")
    gate = F.conv1d(pooled, p["c_nets.0.weight"], padding=1).sigmoid()
    dw_weight, dw_bias = p["mlp.dwconv.dwconv.weight"], p["mlp.dwconv.dwconv.bias"]
    hidden = pointwise(norm(x, "norm2"), "mlp.fc1")
    hidden = depthwise_conv_gelu(hidden, dw_weight, dw_bias, height, width)
    return gate * x + p["layer_scale_2"] * pointwise(hidden, "mlp.fc2")


# ---- self-guided module: gate -------------------------------------------------------------------


def gate_descriptors(x: Tensor, *, present: Tensor | None = None) -> Tensor:
    """What the gate of each modality sees: `[M, B, L, C]` -> `[M, B, 2C]` in fp32.

    The mean of the modality over the image, and the mean of that over the *other* present
    modalities (zero where there is none).
    """
    x = _only_present(x, present)
    present = _all_present(x, present)
    own = x.to(statistics_dtype(x)).mean(dim=2)
    others = (present.sum(dim=0) - present.long()).clamp(min=1).unsqueeze(-1)
    return torch.cat([own, (own.sum(dim=0) - own) / others], dim=-1)


def gate_logits(
    descriptors: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tau: float = 1.0
) -> Tensor:
    """Two-layer perceptron of the gate: `[M, B, 2C]` -> logits `[M, B, C]`, divided by `tau`."""
    return F.linear(F.gelu(F.linear(descriptors, w1, b1)), w2, b2) / tau


def gate_weights(logits: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Contribution of each modality per channel: softmax over the present ones, `[M, B, C]`."""
    if present is not None:
        logits = logits.masked_fill(~present[:, :, None], float("-inf"))
    return logits.softmax(dim=0)


def guided_gate(
    x: Tensor, logits: Tensor, *, present: Tensor | None = None, rho: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Reweight the branches and fuse them.

    x `[M, B, L, C]`, logits `[M, B, C]` fp32, present `[M, B]` bool -> branches `[M, B, L, C]`
    and fused `[B, L, C]`. With `g = softmax over present modalities` and K of them present:
    `branch_m = x_m (1 + rho (K g_m - 1))` (zero where absent), `fused = sum_m g_m x_m`.
    """
    x = _only_present(x, present)
    g = gate_weights(logits, present=present)[:, :, None, :]
    number = _all_present(x, present).sum(dim=0)[:, None, None]
    branches = (x * (1 + rho * (number * g - 1))).to(x.dtype)
    return branches, (x * g).sum(dim=0).to(x.dtype)


# ---- self-guided module: prototypes -------------------------------------------------------------


def class_prototypes(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    height: int,
    width: int,
    *,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Mean feature of every class, per image and modality.

    x `[M, B, L, C]`, labels `[B, s*height, s*width]` integer for a whole s >= 1 (the pixel
    `(s i, s j)` labels token `(i, j)`) -> prototypes `[M, B, K, C]` fp32, zero for absent
    classes, and counts `[B, K]` int64.
    """
    stride = labels.shape[-1] // width
    small = rearrange(labels[:, ::stride, ::stride], "b h w -> b (h w)").long()
    classes = torch.arange(num_classes, device=labels.device)
    member = (small[..., None] == classes) & (small != ignore_index)[..., None]
    counts = member.sum(dim=1)
    dtype = statistics_dtype(x)
    sums = torch.einsum("blk,mblc->mbkc", member.to(dtype), x.to(dtype))
    return sums / counts.clamp(min=1)[..., None], counts


def split_teachers(present: Tensor, order: Tensor) -> Tensor:
    """Which modalities teach: present `[M, B]` bool, order `[M]` a permutation -> `[M, B]` bool.

    Per image the first `max(1, K // 2)` of its K present modalities, in the given order.
    """
    ranked = present[order]
    teachers = (present.sum(dim=0) // 2).clamp(min=1)
    first = ranked & (ranked.long().cumsum(dim=0) <= teachers)
    return torch.zeros_like(present).index_copy(0, order, first)


def prototype_kl(
    prototypes: Tensor,
    counts: Tensor,
    teacher: Tensor,
    *,
    present: Tensor | None = None,
    tau: float = 1.0,
) -> Tensor:
    """Self-distillation between prototypes, teacher first: the SGM loss of one stage.

    prototypes `[M, B, K, C]`, counts `[B, K]`, teacher `[M, B]` bool -> scalar. For every image
    the class distribution of the mean teacher prototype (softmax over the classes in the image,
    one per channel, no gradient) is the target of every student:
    `tau^2 mean_b mean_students mean_channels KL(teacher || student)`. Images with fewer than two
    classes or two modalities count as zero.
    """
    present = _all_present(prototypes, present)
    has_class = counts > 0
    valid = (has_class.sum(dim=-1) >= 2) & (present.sum(dim=0) >= 2)
    use = (has_class & valid[:, None])[..., None]
    student = (present & ~teacher & valid)[..., None]
    prototypes = _only_present(prototypes, present)

    def log_distribution(p: Tensor) -> Tensor:
        # In an image without classes nothing is masked, so that the softmax stays finite.
        absent = (~has_class & valid[:, None])[..., None]
        return (p / tau).masked_fill(absent, float("-inf")).log_softmax(dim=-2)

    weight = (teacher & present).to(prototypes.dtype)[:, :, None, None]
    target = (prototypes * weight).sum(dim=0) / weight.sum(dim=0).clamp(min=1)
    log_target = log_distribution(target.detach())
    log_student = log_distribution(prototypes)
    difference = torch.where(use, log_target - log_student, 0.0)
    divergence = (log_target.exp() * difference).sum(dim=-2).mean(dim=-1, keepdim=True)
    per_image = (divergence * student).sum(dim=0) / student.sum(dim=0).clamp(min=1)
    return tau**2 * per_image.sum() / max(per_image.shape[0], 1)


# ---- decode head and segmentation loss ----------------------------------------------------------


def segmentation_head(
    features: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    p: Mapping[str, Tensor],
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The all-MLP head of SegFormer as published, at inference.

    features: four tokens `[B, H_s W_s, C_s]` with sizes `(H_s, W_s)` -> logits
    `[B, num_classes, H_1, W_1]`. `p` holds SegFormer's names: `linear_c{1..4}.proj.*`,
    `linear_fuse.conv.weight`, `linear_fuse.bn.*`, `linear_pred.*`.
    """
    maps = []
    for s in (4, 3, 2, 1):
        weight, bias = p[f"linear_c{s}.proj.weight"], p[f"linear_c{s}.proj.bias"]
        y = _to_map(F.linear(features[s - 1], weight, bias), *sizes[s - 1])
        maps.append(F.interpolate(y, size=sizes[0], mode="bilinear", align_corners=False))
    y = F.conv2d(torch.cat(maps, dim=1), p["linear_fuse.conv.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (p[f"linear_fuse.bn.{name}"] for name in names)
    y = F.batch_norm(y, mean, var, weight, bias, eps=eps)
    return F.conv2d(F.relu(y), p["linear_pred.weight"], p["linear_pred.bias"])


def upsample_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Cross-entropy per pixel of bilinearly upsampled logits.

    logits `[B, K, h, w]`, labels `[B, H, W]` integer -> `[B, H, W]` fp32, 0 where ignored.
    Upsampling is bilinear with `align_corners=False`, in fp32.
    """
    full = F.interpolate(
        logits.to(statistics_dtype(logits)),
        size=labels.shape[-2:],
        mode="bilinear",
        align_corners=False,
    )
    return F.cross_entropy(full, labels.long(), ignore_index=ignore_index, reduction="none")


def ohem(loss: Tensor, valid: Tensor, *, thresh: float = 0.7, min_kept_ratio: int = 16) -> Tensor:
    """Online hard example mining: the mean of the hard pixels.

    loss and valid (bool) `[...]` of one shape -> scalar. Hard are the valid pixels whose loss
    exceeds `-log(thresh)`, or is NaN; if those are fewer than `#valid // min_kept_ratio`, that many
    with the largest loss. Without any selected pixel the result is 0. Sums are in fp32 (fp64 for
    fp64). No data-dependent shapes: selection is by a mask and by rank, so nothing waits for the
    device.
    """
    flat, valid = loss.flatten(), valid.flatten()
    hard = valid & ~(flat <= -log(thresh))
    least = valid.sum() // min_kept_ratio
    ranked = flat.detach().masked_fill(~valid, float("-inf"))
    # `least` is known to the device only, but is never more than this.
    largest = ranked.topk(flat.shape[0] // min_kept_ratio).indices
    rank = torch.arange(largest.shape[0], device=loss.device)
    hardest = torch.zeros_like(valid).scatter(0, largest, rank < least)
    keep = torch.where(hard.sum() >= least, hard, hardest)
    total = torch.where(keep, flat, 0.0).sum(dtype=statistics_dtype(flat))
    return (total / keep.sum().clamp(min=1)).to(loss.dtype)


# ---- cross-modal transformer block --------------------------------------------------------------


def cross_modal_block(
    encoded: Tensor,
    hub: Tensor,
    p: Mapping[str, Tensor],
    height: int,
    width: int,
    heads: int,
    *,
    present: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Cross-attention from each encoded modality to its mixed hub, with the residual.

    encoded `[M, B, L, C]` (queries and residual), hub `[M, B, L, C]` (keys and values) ->
    `[M, B, L, C]`. `p` holds SegFormer's names: `q.*`, `kv.*` (K rows first), `proj.*` and, with
    a spatial reduction, `sr.*` and `norm.*`. A modality that is alone keeps its encoding.
    """
    modalities, channels = encoded.shape[0], encoded.shape[-1]
    encoded, hub = _only_present(encoded, present), _only_present(hub, present)
    present = _all_present(encoded, present)
    source = rearrange(hub, "m b l c -> (m b) l c")
    if "sr.weight" in p:
        source = spatial_reduction(source, p["sr.weight"], p["sr.bias"], height, width)
        source = F.layer_norm(source, (channels,), p["norm.weight"], p["norm.bias"], eps)
    q = F.linear(rearrange(encoded, "m b l c -> (m b) l c"), p["q.weight"], p["q.bias"])
    kv = F.linear(source, p["kv.weight"], p["kv.bias"])
    k, v = rearrange(kv, "n l (two h d) -> two n l h d", two=2, h=heads)
    context = attention(rearrange(q, "n l (h d) -> n l h d", h=heads), k, v)
    y = F.linear(rearrange(context, "n l h d -> n l (h d)"), p["proj.weight"], p["proj.bias"])
    y = rearrange(y, "(m b) l c -> m b l c", m=modalities)
    keep = (present & has_others(present))[:, :, None, None]
    return encoded + torch.where(keep, y, 0.0)

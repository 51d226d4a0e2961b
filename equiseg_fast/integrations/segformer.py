"""Rules for SegFormer's attention and Mix-FFN in the spellings that models have of them.

Source: SegFormer (arXiv 2105.15203), section 3.1 and equation 3; PVTv2 (arXiv 2106.13797) has the
same two.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.nn import MixFFN
from equiseg_fast.nn._foreign import (
    find,
    is_attention_mit,
    is_attention_mmseg,
    is_attention_pvt,
    is_attention_v4,
    is_attention_v5,
    is_mix_ffn,
    is_mix_ffn_mmseg,
    is_mix_ffn_pvt,
)
from equiseg_fast.nn._plain import hooked, is_plain
from equiseg_fast.nn.attention import reduce_tokens
from equiseg_fast.ops import attention, depthwise_conv_gelu, mix_ffn
from equiseg_fast.ops.mix_ffn import gains

from .modules import Report, Rule, accelerate_module

Size = tuple[int, int]

# Attention functions of `transformers` that compute the same; others may be anybody's.
_SAME_ATTENTION = (
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention",
)  # fmt: skip


def accelerate_segformer(model: nn.Module, *, verbose: bool = True) -> Report:
    """Replace the attention and the Mix-FFN in every block of a SegFormer or PVTv2.

    model: a SegFormer of `transformers` (4 and 5), of its authors and the many that descend from
        it (CMNeXt), of MMSegmentation; a PVTv2 of its authors or `timm`, without linear attention;
        or anything that contains one.
    verbose: print the report.

    Parameters are shared, the keys of the state dict stay, and `revert(model)` undoes it. Calls
    that ask for attention weights, bring a mask, or drop attention weights out run the module's own
    code, and so do those that the children that a rule goes around have hooks for (see `Rule`), and
    a Mix-FFN in fp32 on the CPU that is too small to gain; the dropout of the Mix-FFN is called
    where it is. Everything else, errors too, is as in `accelerate_module`.
    """
    rules = (*SEGFORMER_RULES[:-1], *MIT_RULES[:-1], *MMSEG_RULES, *PVT_RULES, _MIX_FFN)
    return accelerate_module(model, rules, verbose=verbose)


def _active(*dropouts: Any) -> bool:
    return any(d is not None and d.training and getattr(d, "p", 0) > 0 for d in dropouts)


def _through(last: Any, x: Tensor) -> Tensor:
    return x if last is None else last(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return attention(q, k, v, scale=scale).flatten(2)


def _sized_examples(channels: int, ratio: int) -> Iterator[tuple[Tensor, Size]]:
    # A size that the ratio divides, and one that it does not.
    for height, width in ((ratio, 2 * ratio), (ratio + 1, 2 * ratio + 1)):
        yield torch.randn(2, height * width, channels), (height, width)


def _examples(module: Any) -> Iterator[tuple[Tensor, int, int]]:
    channels = find(module, "q_proj", "query", "q", "fc1", "dense1").in_features
    ratio = find(module, "sequence_reduction_ratio", "sr_ratio") or 2
    for x, size in _sized_examples(channels, ratio):
        yield x, *size


def _matches_v5(module: Any) -> bool | str:
    verdict = is_attention_v5(module)
    if verdict is not True:
        return verdict
    config = find(module, "config")
    if getattr(config, "output_attentions", False):
        return "its config asks for attention weights (output_attentions), which never exist"
    chosen = getattr(config, "_attn_implementation", None)
    return chosen in _SAME_ATTENTION or f"its config chooses the attention {chosen!r}"


def _attention_v5(
    module: Any,
    hidden_states: Tensor,
    height: int,
    width: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    config = module.config
    weights = kwargs.get("output_attentions") or config.output_attentions
    dropout = module.training and module.attention_dropout > 0
    other = config._attn_implementation not in _SAME_ATTENTION
    if weights or dropout or other or attention_mask is not None:
        return NotImplemented
    source = hidden_states
    if module.sequence_reduction_ratio > 1:
        reduction = module.sequence_reduction
        source = reduce_tokens(reduction.sequence_reduction, source, height, width)
        source = reduction.layer_norm(source)
    q, k, v = module.q_proj(hidden_states), module.k_proj(source), module.v_proj(source)
    out = _attend(q, k, v, module.num_attention_heads, module.scaling)
    return module.o_proj(out), None


def _attention_v4(
    module: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
) -> Any:
    if output_attentions or _active(module.dropout):
        return NotImplemented
    source = hidden_states
    if module.sr_ratio > 1:
        source = module.layer_norm(reduce_tokens(module.sr, source, height, width))
    q, k, v = module.query(hidden_states), module.key(source), module.value(source)
    return (_attend(q, k, v, module.num_attention_heads),)


def _attention_mit(
    module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any
) -> Any:
    if more or others or _active(find(module, "attn_drop")):
        return NotImplemented
    return _attention(module, x, height, width, module.sr_ratio > 1)


def _attention_pvt(module: Any, x: Tensor, feat_size: Size, *more: Any, **others: Any) -> Any:
    if more or others or _active(module.attn_drop):
        return NotImplemented
    return _attention(module, x, *feat_size, module.sr is not None)


def _attention(module: Any, x: Tensor, height: int, width: int, reduced: bool) -> Tensor:
    source = module.norm(reduce_tokens(module.sr, x, height, width)) if reduced else x
    k, v = module.kv(source).chunk(2, dim=-1)
    heads, scale = find(module, "head", "num_heads"), find(module, "scale")
    out = module.proj(_attend(module.q(x), k, v, heads, scale))
    return _through(find(module, "proj_drop"), out)


def _examples_pvt(module: Any) -> Iterator[tuple[Tensor, Size]]:
    sr = find(module, "sr")
    channels = find(module, "q", "fc1").in_features
    return _sized_examples(channels, 2 if sr is None else sr.stride[0])


def _attention_mmseg(module: Any, x: Tensor, hw_shape: Size, identity: Tensor | None = None) -> Any:
    inner = module.attn
    if inner.training and inner.dropout > 0:
        return NotImplemented
    source = x
    if module.sr_ratio > 1:
        source = module.norm(reduce_tokens(module.sr, x, *hw_shape))
    sizes = (inner.embed_dim, 2 * inner.embed_dim)
    q_weight, kv_weight = inner.in_proj_weight.split(sizes)
    bias = inner.in_proj_bias
    q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
    q, (k, v) = F.linear(x, q_weight, q_bias), F.linear(source, kv_weight, kv_bias).chunk(2, -1)
    out = _attend(q, k, v, inner.num_heads)
    out = F.linear(out, inner.out_proj.weight, inner.out_proj.bias)
    return (x if identity is None else identity) + module.dropout_layer(module.proj_drop(out))


def _mix_ffn_mmseg(module: Any, x: Tensor, hw_shape: Size, identity: Tensor | None = None) -> Any:
    first, conv, _, drop, last, _ = module.layers
    if _active(drop):
        return NotImplemented
    weights = (
        first.weight.flatten(1), first.bias, conv.weight, conv.bias, last.weight.flatten(1),
        last.bias,
    )  # fmt: skip
    out = mix_ffn(x, *weights, *hw_shape)
    return (x if identity is None else identity) + module.dropout_layer(out)


def _examples_mmseg(module: Any) -> Iterator[tuple[Any, ...]]:
    for x, size in _sized_examples(module.embed_dims, find(module, "sr_ratio") or 2):
        yield x, size
        yield x, size, torch.randn(x.shape)


def _matches_ffn(module: Any) -> bool | str:
    return not isinstance(module, MixFFN) and is_mix_ffn(module)


def _mix_ffn(module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any) -> Any:
    if more or others:
        return NotImplemented
    return _ffn(module, module.dwconv.dwconv, x, height, width)


def _mix_ffn_pvt(module: Any, x: Tensor, feat_size: Size) -> Any:
    return _ffn(module, module.dwconv, x, *feat_size)


def _ffn(module: Any, conv: Any, x: Tensor, height: int, width: int) -> Any:
    if not gains(x, conv.weight):
        return NotImplemented
    first, last = find(module, "fc1", "dense1"), find(module, "fc2", "dense2")
    dropout = find(module, "dropout", "drop")
    passes = dropout is None or (
        type(dropout) is nn.Dropout and not _active(dropout) and not hooked(dropout)
    )
    if passes and is_plain(first, last) and None not in (first.bias, last.bias):
        weights = (first.weight, first.bias, conv.weight, conv.bias, last.weight, last.bias)
        return mix_ffn(x, *weights, height, width)
    y = depthwise_conv_gelu(first(x), conv.weight, conv.bias, height, width)
    return _through(dropout, last(_through(dropout, y)))


_MIX_FFN = Rule(
    "Mix-FFN",
    _matches_ffn,
    _mix_ffn,
    _examples,
    calls=("fc1", "fc2", "dense1", "dense2", "dropout", "drop"),
)

# `transformers` from 5, and up to 4
SEGFORMER_RULES = (
    Rule(
        "attention (q_proj, k_proj, v_proj, o_proj)",
        _matches_v5,
        _attention_v5,
        _examples,
        calls=("q_proj", "k_proj", "v_proj", "o_proj", "sequence_reduction.layer_norm"),
    ),
    Rule(
        "attention (query, key, value)",
        is_attention_v4,
        _attention_v4,
        _examples,
        calls=("query", "key", "value", "layer_norm"),
    ),
    _MIX_FFN,
)
# the spelling of SegFormer's authors, which CMNeXt and most code for research share
MIT_RULES = (
    Rule(
        "attention (q, kv, proj)",
        is_attention_mit,
        _attention_mit,
        _examples,
        calls=("q", "kv", "proj", "proj_drop", "norm"),
    ),
    _MIX_FFN,
)
# MMSegmentation, whose modules add the residual themselves
MMSEG_RULES = (
    Rule(
        "attention (nn.MultiheadAttention over reduced keys)",
        is_attention_mmseg,
        _attention_mmseg,
        _examples_mmseg,
        calls=("norm", "proj_drop", "dropout_layer"),
    ),
    Rule(
        "Mix-FFN (1x1 convolutions)",
        is_mix_ffn_mmseg,
        _mix_ffn_mmseg,
        _examples_mmseg,
        calls=("dropout_layer",),
    ),
)
# PVTv2 of `timm`; that of its authors is in MIT_RULES
PVT_RULES = (
    Rule(
        "attention (q, kv, proj; feat_size)",
        is_attention_pvt,
        _attention_pvt,
        _examples_pvt,
        calls=("q", "kv", "proj", "proj_drop", "norm"),
    ),
    Rule(
        "Mix-FFN (feat_size)",
        is_mix_ffn_pvt,
        _mix_ffn_pvt,
        _examples_pvt,
        calls=("fc1", "fc2", "drop"),
    ),
)

"""Rules for SegFormer's attention and Mix-FFN in the three spellings that models have of them.

Source: SegFormer (arXiv 2105.15203), section 3.1 and equation 3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.nn import MixFFN
from equiseg_fast.nn._foreign import (
    activation,
    find,
    is_attention_mit,
    is_attention_v4,
    is_attention_v5,
    is_mix_ffn,
)
from equiseg_fast.nn.attention import reduce_tokens
from equiseg_fast.ops import attention, depthwise_conv_gelu, mix_ffn
from equiseg_fast.ops.mix_ffn import gains

from .modules import Report, Rule, accelerate_module, hooked


def accelerate_segformer(model: nn.Module, *, verbose: bool = True) -> Report:
    """Replace the attention and the Mix-FFN in every block of a SegFormer of `transformers`.

    model: `SegformerModel`, `SegformerForImageClassification`, `SegformerForSemanticSegmentation`
        or anything that contains one; the layouts of transformers 4 and 5.
    verbose: print the report.

    Parameters are shared, the keys of the state dict stay, and `revert(model)` undoes it. Calls
    that ask for attention weights, bring a mask, or drop attention weights out run the module's own
    code, and so does a Mix-FFN in fp32 on the CPU that is too small to gain; the dropout of the
    Mix-FFN is called where it is. Everything else, errors too, is as in `accelerate_module`.
    """
    return accelerate_module(model, SEGFORMER_RULES, verbose=verbose)


def _active(*dropouts: Any) -> bool:
    return any(d is not None and d.training and getattr(d, "p", 0) > 0 for d in dropouts)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return attention(q, k, v, scale=scale).flatten(2)


def _examples(module: Any) -> Iterator[tuple[Tensor, int, int]]:
    channels = find(module, "q_proj", "query", "q", "fc1", "dense1").in_features
    ratio = find(module, "sequence_reduction_ratio", "sr_ratio") or 2
    # A size that the ratio divides, and one that it does not.
    for height, width in ((ratio, 2 * ratio), (ratio + 1, 2 * ratio + 1)):
        yield torch.randn(2, height * width, channels), height, width


def _attention_v5(
    module: Any,
    hidden_states: Tensor,
    height: int,
    width: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    weights = kwargs.get("output_attentions") or module.config.output_attentions
    dropout = module.training and module.attention_dropout > 0
    if weights or dropout or attention_mask is not None:
        return NotImplemented
    source = hidden_states
    if module.sequence_reduction_ratio > 1:
        reduction = module.sequence_reduction
        conv = reduction.sequence_reduction
        if hooked(reduction, conv):
            return NotImplemented
        source = reduction.layer_norm(reduce_tokens(conv, source, height, width))
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
        if hooked(module.sr):
            return NotImplemented
        source = module.layer_norm(reduce_tokens(module.sr, source, height, width))
    q, k, v = module.query(hidden_states), module.key(source), module.value(source)
    return (_attend(q, k, v, module.num_attention_heads),)


def _attention_mit(
    module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any
) -> Any:
    if more or others or _active(find(module, "attn_drop"), find(module, "proj_drop")):
        return NotImplemented
    source = x
    if module.sr_ratio > 1:
        if hooked(module.sr):
            return NotImplemented
        source = module.norm(reduce_tokens(module.sr, x, height, width))
    k, v = module.kv(source).chunk(2, dim=-1)
    heads, scale = find(module, "head", "num_heads"), find(module, "scale")
    return module.proj(_attend(module.q(x), k, v, heads, scale))


def _matches_ffn(module: Any) -> bool | str:
    return not isinstance(module, MixFFN) and is_mix_ffn(module)


def _mix_ffn(module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any) -> Any:
    holder = module.dwconv
    conv = holder.dwconv
    if not gains(x, conv.weight):
        return NotImplemented
    if more or others or hooked(holder, conv, activation(module)):
        return NotImplemented
    first, last = find(module, "fc1", "dense1"), find(module, "fc2", "dense2")
    dropout = find(module, "dropout", "drop")
    linear = type(first) is type(last) is nn.Linear and None not in (first.bias, last.bias)
    passes = dropout is None or (isinstance(dropout, nn.Dropout) and not _active(dropout))
    if linear and passes and not hooked(first, last, dropout):
        weights = (first.weight, first.bias, conv.weight, conv.bias, last.weight, last.bias)
        return mix_ffn(x, *weights, height, width)
    y = depthwise_conv_gelu(first(x), conv.weight, conv.bias, height, width)
    if dropout is None:
        return last(y)
    return dropout(last(dropout(y)))


_MIX_FFN = Rule("Mix-FFN", _matches_ffn, _mix_ffn, _examples)

# `transformers` from 5, and up to 4
SEGFORMER_RULES = (
    Rule("attention (q_proj, k_proj, v_proj, o_proj)", is_attention_v5, _attention_v5, _examples),
    Rule("attention (query, key, value)", is_attention_v4, _attention_v4, _examples),
    _MIX_FFN,
)
# the spelling of SegFormer's authors, which CMNeXt and most code for research share
MIT_RULES = (
    Rule("attention (q, kv, proj)", is_attention_mit, _attention_mit, _examples),
    _MIX_FFN,
)

"""Rules for SegFormer's attention and Mix-FFN in the three spellings that models have of them.

Source: SegFormer (arXiv 2105.15203), section 3.1 and equation 3.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.nn import MixFFN
from equiseg_fast.nn.attention import reduce_tokens
from equiseg_fast.ops import attention, depthwise_conv_gelu, mix_ffn

from .modules import Report, Rule, accelerate_module, hooked


def accelerate_segformer(model: nn.Module, *, verbose: bool = True) -> Report:
    """Replace the attention and the Mix-FFN in every block of a SegFormer of `transformers`.

    model: `SegformerModel`, `SegformerForImageClassification`, `SegformerForSemanticSegmentation`
        or anything that contains one; the layouts of transformers 4 and 5.
    verbose: print the report.

    Parameters are shared, the keys of the state dict stay, and `revert(model)` undoes it. Calls
    that ask for attention weights, bring a mask, or drop attention weights out run the module's own
    code; the dropout of the Mix-FFN is called where it is. Everything else, errors too, is as in
    `accelerate_module`.
    """
    return accelerate_module(model, SEGFORMER_RULES, verbose=verbose)


def _get(module: Any, *names: str) -> Any:
    """What the module has under the first of these names that it knows, else None."""
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    return None


def _active(*dropouts: Any) -> bool:
    return any(d is not None and d.training and getattr(d, "p", 0) > 0 for d in dropouts)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return attention(q, k, v, scale=scale).flatten(2)


def _check_reduction(conv: Any, ratio: int) -> bool | str:
    if ratio == 1:
        return True
    if isinstance(conv, nn.Conv2d):
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        if shape == ((ratio, ratio), (ratio, ratio), (0, 0), (1, 1), 1):
            return True
    return f"its reduction {conv} is not a convolution of kernel and stride {ratio}"


def _examples(module: Any) -> Iterator[tuple[Tensor, int, int]]:
    channels = _get(module, "q_proj", "query", "q", "fc1", "dense1").in_features
    ratio = _get(module, "sequence_reduction_ratio", "sr_ratio") or 2
    # A size that the ratio divides, and one that it does not.
    for height, width in ((ratio, 2 * ratio), (ratio + 1, 2 * ratio + 1)):
        yield torch.randn(2, height * width, channels), height, width


def _matches_v5(module: Any) -> bool | str:
    ratio = getattr(module, "sequence_reduction_ratio", None)
    if not isinstance(ratio, int) or _get(module, "q_proj") is None:
        return False
    reduction = _get(module, "sequence_reduction")
    return _check_reduction(_get(reduction, "sequence_reduction"), ratio)


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


def _matches_v4(module: Any) -> bool | str:
    ratio = getattr(module, "sr_ratio", None)
    if not isinstance(ratio, int) or _get(module, "query") is None:
        return False
    return _check_reduction(_get(module, "sr"), ratio)


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


def _matches_mit(module: Any) -> bool | str:
    ratio = getattr(module, "sr_ratio", None)
    parts = _get(module, "q"), _get(module, "kv"), _get(module, "head", "num_heads")
    if not isinstance(ratio, int) or None in parts:
        return False
    return _check_reduction(_get(module, "sr"), ratio)


def _attention_mit(
    module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any
) -> Any:
    if more or others or _active(_get(module, "attn_drop"), _get(module, "proj_drop")):
        return NotImplemented
    source = x
    if module.sr_ratio > 1:
        if hooked(module.sr):
            return NotImplemented
        source = module.norm(reduce_tokens(module.sr, x, height, width))
    k, v = module.kv(source).chunk(2, dim=-1)
    heads, scale = _get(module, "head", "num_heads"), _get(module, "scale")
    return module.proj(_attend(module.q(x), k, v, heads, scale))


def _matches_ffn(module: Any) -> bool | str:
    first, last = _get(module, "fc1", "dense1"), _get(module, "fc2", "dense2")
    conv = _get(_get(module, "dwconv"), "dwconv")
    if isinstance(module, MixFFN) or None in (first, last) or not isinstance(conv, nn.Conv2d):
        return False
    hidden = conv.out_channels
    if getattr(first, "out_features", 0) != hidden or getattr(last, "in_features", 0) != hidden:
        return f"{first} and {last} are not linear layers around {hidden} channels"
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    zeros = conv.padding_mode == "zeros"
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), hidden) or not zeros or conv.bias is None:
        return f"{conv} is not a depthwise 3x3 convolution with padding 1 and bias"
    if not _is_gelu(_activation(module)):
        return f"its activation {_activation(module)} is not the exact GELU"
    return True


def _activation(module: Any) -> Any:
    """None if it is written out in the module's `forward`."""
    return _get(module, "activation_fn", "intermediate_act_fn", "act")


def _is_gelu(activation: Any) -> bool:
    if activation is None:
        return True
    if isinstance(activation, nn.Module):
        if any(True for _ in activation.parameters()):
            return False
        activation = activation.forward  # not its hooks
    x = torch.linspace(-4, 4, 99, dtype=torch.float64, device="cpu")
    return torch.allclose(activation(x), F.gelu(x))


def _mix_ffn(module: Any, x: Tensor, height: int, width: int, *more: Any, **others: Any) -> Any:
    holder = module.dwconv
    conv = holder.dwconv
    if more or others or hooked(holder, conv, _activation(module)):
        return NotImplemented
    first, last = _get(module, "fc1", "dense1"), _get(module, "fc2", "dense2")
    dropout = _get(module, "dropout", "drop")
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
    Rule("attention (q_proj, k_proj, v_proj, o_proj)", _matches_v5, _attention_v5, _examples),
    Rule("attention (query, key, value)", _matches_v4, _attention_v4, _examples),
    _MIX_FFN,
)
# the spelling of SegFormer's authors, which CMNeXt and most code for research share
MIT_RULES = (
    Rule("attention (q, kv, proj)", _matches_mit, _attention_mit, _examples),
    _MIX_FFN,
)

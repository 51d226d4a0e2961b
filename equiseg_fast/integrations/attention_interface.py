"""Our attention as an attention implementation of `transformers`."""

from typing import Any

from torch import Tensor

from equiseg_fast.ops import attention
from equiseg_fast.ops._checks import (
    FLOATING,
    check_flags,
    check_same,
    check_shape,
    check_strings,
    check_tensor,
    number,
)

# What other attention functions of transformers serve and this one does not.
_UNSERVED = ("position_bias", "sliding_window", "softcap", "s_aux", "cache")


def register_attention(name: str = "equiseg_fast") -> None:
    """Make `model.set_attn_implementation(name)` of `transformers` choose our attention.

    For models that ask the `AttentionInterface`, e.g. SegFormer, ViT and BERT from transformers 5
    (SegFormer of transformers 4 does not: `accelerate_segformer` serves it). Masks are made as for
    "sdpa", so that a padded batch is refused instead of attended to. A second call changes nothing.

    Raises ImportError if transformers is missing or too old to have the interface (4.53).
    """
    check_strings(name=name)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"register_attention needs transformers with AttentionInterface (>= 4.53): {error}"
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`equiseg_fast.ops.attention` as `transformers` calls an attention function.

    query `[B, H, Lq, D]`, key and value `[B, H, Lk, D]`, any strides -> `[B, Lq, H, D]` in their
    dtype, and None: weights never exist. scaling: factor of the scores, 1/sqrt(D) by default.

    Raises ValueError with all the reasons for a call that it cannot serve: a mask, dropout,
    causality over more than one query, attention weights, grouped heads, position bias, sliding
    window, soft cap, sinks, a paged cache. To choose this function was explicit, so nothing falls
    back.
    """
    for label, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(label, x, FLOATING, "[B, H, L, D]")
    dropout = number("dropout", dropout)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # as in transformers
    else:
        check_flags(is_causal=is_causal)
    reasons = [f"{name} was passed" for name in _UNSERVED if kwargs.get(name) is not None]
    if attention_mask is not None:
        reasons.append("attention_mask was passed")
    if dropout:
        reasons.append(f"dropout of attention weights is {dropout}")
    if is_causal and query.shape[2] > 1:
        reasons.append("the attention is causal (is_causal)")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions asks for weights, which never exist")
    if key.shape[1] != query.shape[1]:
        reasons.append(f"{query.shape[1]} query heads share {key.shape[1]} key heads")
    if reasons:
        raise ValueError(
            f"equiseg_fast cannot serve the attention of {type(module).__name__}: "
            + "; ".join(reasons)
            + ". Choose another with set_attn_implementation, e.g. 'sdpa' or 'eager'"
        )
    check_same(query=query, key=key, value=value)
    batch, heads, _, dim = query.shape
    check_shape("key", key, (batch, heads, key.shape[2], dim), "[B, H, Lk, D]")
    check_shape("value", value, tuple(key.shape), "[B, H, Lk, D] (that of key)")
    if scaling is not None:
        scaling = number("scaling", scaling)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, scale=scaling), None

"""The middle of Mix-FFN: 3x3 depthwise convolution, bias and GELU on tokens."""

import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._layout import to_map, to_tokens
from ._registry import autocast


def depthwise_conv_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """3x3 depthwise convolution (zero padding 1) + bias + exact GELU, without a transpose.

    x: `[B, L, C]` tokens with L = height * width in row-major order, floating.
    weight: `[C, 1, 3, 3]`; bias: `[C]`; both in the dtype and on the device of x.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns `[B, L, C]`. Under autocast all inputs are cast to its dtype. Raises TypeError or
    ValueError naming the argument. Source: Mix-FFN of SegFormer (arXiv 2105.15203), equation 3.
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[B, L, C]")
    _checks.check_tokens("x", x, height, width)
    x, weight, bias = autocast(x, weight, bias)
    _checks.check_shape("weight", weight, (x.shape[-1], 1, 3, 3), "[C, 1, 3, 3]")
    _checks.check_shape("bias", bias, (x.shape[-1],), "[C]")
    _checks.check_same(x=x, weight=weight, bias=bias)
    chosen = _backend.resolve("depthwise_conv_gelu", backend, x.device, _reasons(x))
    if chosen == "reference":
        return reference.depthwise_conv_gelu(x, weight, bias, height, width)
    y = F.conv2d(to_map(x, height, width), weight, bias, padding=1, groups=x.shape[-1])
    return to_tokens(F.gelu(y))


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(x), _backend.NO_KERNEL]


_backend.register_reasons("depthwise_conv_gelu", _reasons)

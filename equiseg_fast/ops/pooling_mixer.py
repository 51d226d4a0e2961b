"""The token mixing of the parallel pooling mixer: 7x7 depthwise convolution plus three pools."""

import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._layout import to_map, to_tokens
from ._registry import autocast


def pooling_mixer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Depthwise 7x7 plus its 3x3, 7x7 and 11x11 average pools, summed, on tokens.

    x: `[B, L, C]` tokens with L = height * width, floating.
    weight: `[C, 1, 7, 7]`; bias: `[C]`; both in the dtype and on the device of x.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns `[B, L, C]`. The convolution pads with zeros (3 on each side); a pool divides by the
    number of pixels it finds inside the image. Under autocast all inputs are cast to its dtype.
    Raises TypeError or ValueError naming the argument. Source: CMNeXt (arXiv 2303.01480),
    section 3.3.
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[B, L, C]")
    _checks.check_tokens("x", x, height, width)
    x, weight, bias = autocast(x, weight, bias)
    _checks.check_shape("weight", weight, (x.shape[-1], 1, 7, 7), "[C, 1, 7, 7]")
    _checks.check_shape("bias", bias, (x.shape[-1],), "[C]")
    _checks.check_same(x=x, weight=weight, bias=bias)
    chosen = _backend.resolve("pooling_mixer", backend, x.device, _reasons(x))
    if chosen == "reference":
        return reference.pooling_mixer(x, weight, bias, height, width)
    y = F.conv2d(to_map(x, height, width), weight, bias, padding=3, groups=x.shape[-1])
    pools = (F.avg_pool2d(y, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11))
    return to_tokens(sum(pools, start=y))


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(x), _backend.NO_KERNEL]


_backend.register_reasons("pooling_mixer", _reasons)

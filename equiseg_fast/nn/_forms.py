"""Two forms of features for every layer: tokens, or a map.

One rule: features without a spatial layout of their own are tokens, `[B, L, C]`, and come with
`height` and `width`, L = height * width; one dimension more is a map, `[B, C, H, W]`, which knows
its size and takes neither. Modality-major features have M in front of either. A layer returns the
form that it was given.

A map in channels-last memory (that of NHWC) is the same memory as its tokens, and costs nothing.
Any other map is copied once on the way in; what comes back is in channels-last memory.
"""

import torch
from torch import Tensor, nn

from equiseg_fast.ops import _checks
from equiseg_fast.ops._layout import to_map, to_tokens
from equiseg_fast.ops._registry import autocast_is_on

from ._plain import is_plain


def as_tokens(
    name: str, x: Tensor, height: int | None, width: int | None, lead: str = "B"
) -> tuple[Tensor, int, int]:
    """Features `[lead, L, C]` or `[lead, C, H, W]` as tokens `[lead, L, C]`, with height and width.

    name: of the argument, for errors; lead: the leading dimensions, "B" or "M, B". Raises TypeError
    for what is no floating tensor and for sizes that are missing or too many, ValueError for a
    shape of neither form.
    """
    if check_form(name, x, lead):
        if height is not None or width is not None:
            raise TypeError(
                f"height and width must be left out for a map {name} [{lead}, C, H, W], "
                f"which has its own; got height={height}, width={width}"
            )
        return map_to_tokens(x), x.shape[-2], x.shape[-1]
    if height is None or width is None:
        raise TypeError(
            f"height and width must be given for tokens {name} [{lead}, L, C]; "
            f"got height={height}, width={width}"
        )
    _checks.check_tokens(name, x, height, width)
    return x, height, width


def check_form(name: str, x: Tensor, lead: str = "B") -> bool:
    """Whether x is a map; raises TypeError or ValueError if it is neither map nor tokens."""
    tokens, as_map = f"[{lead}, L, C]", f"[{lead}, C, H, W]"
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor, tokens {tokens} or a map {as_map}; got {type(x).__name__}"
        )
    rank = tokens.count(",") + 1
    if x.dim() not in (rank, rank + 1):
        raise ValueError(
            f"{name} must have shape {tokens} (tokens) or {as_map} (a map); got {list(x.shape)}"
        )
    is_map = x.dim() > rank
    _checks.check_tensor(name, x, _checks.FLOATING, as_map if is_map else tokens)
    if min(x.shape[-3 if is_map else -2 :]) < 1:
        raise ValueError(
            f"{name} must have at least one position and channel; got shape {list(x.shape)}"
        )
    return is_map


def check_same_form(name: str, x: Tensor, other_name: str, other: Tensor, lead: str = "B") -> None:
    """Both are tokens, or both are maps, of one shape."""
    check_form(other_name, other, lead)
    check_form(name, x, lead)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}; got {list(x.shape)}"
        )


def map_to_tokens(x: Tensor) -> Tensor:
    """`to_tokens`, and a copy in their memory of what is a view of any other."""
    tokens = to_tokens(x)
    return tokens if tokens.stride(-1) == 1 or tokens.shape[-1] == 1 else tokens.contiguous()


def like(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Tokens y in the form of the features x, of the same leading dimensions."""
    return y if x.dim() == y.dim() else to_map(y, height, width)


def check_channels(name: str, x: Tensor, dim: int) -> None:
    """Tokens x have the channels of the layer."""
    if x.shape[-1] != dim:
        raise ValueError(f"{name} must have dim = {dim} channels; got {x.shape[-1]}")


def check_belongs(name: str, x: Tensor, child: nn.Module) -> None:
    """Features have the dtype of the layer, which is that of this child, unless autocast makes it
    so, and its device. A child that is not plain says itself what it takes."""
    weight = child._parameters.get("weight")
    if weight is None:
        return
    if not will_have(x, weight.dtype) and is_plain(child):
        raise TypeError(f"{name} must have the dtype of the layer, {weight.dtype}; got {x.dtype}")
    if x.device != weight.device and is_plain(child):
        raise ValueError(f"{name} must be on the layer's device {weight.device}; got {x.device}")


def will_have(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x has the dtype, or autocast, which leaves fp64 alone, casts what does not."""
    if x.dtype == dtype:
        return True
    return torch.float64 not in (x.dtype, dtype) and autocast_is_on(x)

"""Tokens and channels-last maps are the same memory; these views say so."""

from torch import Tensor


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, L, C]` -> map `[B, C, height, width]` in channels-last memory, without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Map `[B, C, H, W]` -> tokens `[B, H * W, C]`; no copy if its memory is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)

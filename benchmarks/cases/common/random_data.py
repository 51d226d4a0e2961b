"""Random inputs, drawn where they are used: the host would need seconds for what a GPU draws in
microseconds. The same seed gives the same values on one kind of device, not across kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """A generator of its own on that device; None on "meta", where nothing is drawn."""
    device = torch.device(device)
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def random_normal(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Contiguous normal random numbers, drawn in fp32 and rounded once; scale: their deviation."""
    values = torch.randn(tuple(shape), generator=generator(device, seed), device=device)
    return values.mul_(scale).to(dtype)

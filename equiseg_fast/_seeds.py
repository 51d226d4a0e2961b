"""Random numbers that follow from names and numbers, and from nothing that was drawn before."""

import hashlib
from collections.abc import Sequence

import torch


def seed_of(key: Sequence[object]) -> int:
    """A seed of its own for every list or tuple of plain values: 1 and 2 share no stream of draws,
    as they might if they were seeds themselves."""
    # The generator of the CPU looks at 32 bits.
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator_of(key: Sequence[object]) -> torch.Generator:
    """A generator of the CPU with `seed_of` the key."""
    return torch.Generator().manual_seed(seed_of(key))

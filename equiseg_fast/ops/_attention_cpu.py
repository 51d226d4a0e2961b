"""Attention in fp32 on the CPU, over blocks of queries whose scores stay in the caches.

Its matrix products are 1x1 convolutions with the keys or values as weights, the heads their groups:
where `convolutions_lead`, they are up to twice as fast as the products inside
`scaled_dot_product_attention`, and heads need no transpose. Elsewhere they are not: on Sapphire
Rapids blocks took 1.4 to 1.8 times as long at 512 pixels. Saves the inputs alone.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from ._checks import has_values
from ._layout import conv_weight_gradient, convolutions_lead, pointwise_conv, to_map, to_tokens
from ._registry import differentiable, without_autocast

_SCORE_BYTES = 4 * 2**20
"""Size of the scores of one block; the backward holds two such tensors."""

_MIN_QUERIES = 1024
"""With smaller blocks `scaled_dot_product_attention` is as fast."""

_MIN_SCORES = 2**20
"""With fewer scores in an image, over all heads, `scaled_dot_product_attention` is as fast."""

_WIDTH = 8
"""Of the map that a block of queries makes; the convolutions are slow on very narrow ones."""

_LANES = 16
"""Channels per group have to be a multiple, or the convolutions are slow."""


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether this is the fastest way for q `[B, Lq, H, D]` and k `[B, Lk, H, D]`."""
    if q.dtype != torch.float32 or torch.compiler.is_compiling() or not convolutions_lead():
        return False
    _, queries, heads, dim = q.shape
    if queries % _WIDTH or dim % _LANES or queries * heads * k.shape[1] < _MIN_SCORES:
        return False
    if min(queries, _block(heads, k.shape[1])) < _MIN_QUERIES:
        return False
    return has_values(q) and has_values(k)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax(scale * q k^T) v`, shapes as in `attention`, for what `suits`."""
    return _BLOCKED(q, k, v, scale)


def _padded(keys: int) -> int:
    return -(-keys // _LANES) * _LANES


def _block(heads: int, keys: int) -> int:
    """Queries of a block at most."""
    return _SCORE_BYTES // (4 * heads * _padded(keys)) // _WIDTH * _WIDTH


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Queries to work on together: shares of one size, and the rest."""
    queries, heads = q.shape[1:3]
    count = -(-queries // _block(heads, k.shape[1]))
    size = -(-queries // (count * _WIDTH)) * _WIDTH
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def _map(x: Tensor) -> Tensor:
    """A block `[n, H, D]` -> map `[1, H * D, n / 8, 8]` in channels-last memory."""
    tokens = x.flatten(1)[None].contiguous()
    return to_map(tokens, tokens.shape[1] // _WIDTH, _WIDTH)


def _rows(x: Tensor, heads: int) -> Tensor:
    """Map `[1, H * D, h, w]` -> `[h * w, H, D]`."""
    return to_tokens(x)[0].unflatten(1, (heads, -1))


class _Weights:
    """Keys or values of one image, `[Lk, H, D]`, as weights of convolutions."""

    def __init__(self, x: Tensor) -> None:
        self.keys, self.heads, _ = x.shape
        self.padding = _padded(self.keys) - self.keys
        self.by_head = F.pad(x, (0, 0, 0, 0, 0, self.padding)).transpose(0, 1)

    @cached_property
    def to_keys(self) -> Tensor:
        """`[H * keys, D]`: products with every key."""
        return self.by_head.flatten(0, 1).contiguous()

    @cached_property
    def from_keys(self) -> Tensor:
        """`[H * D, keys]`: sums over the keys."""
        return self.by_head.transpose(1, 2).flatten(0, 1).contiguous()

    @cached_property
    def mask(self) -> Tensor | None:
        """A bias `[H * keys]` that leaves out what is padding."""
        if not self.padding:
            return None
        bias = self.by_head.new_zeros((self.heads, self.keys + self.padding))
        bias[:, self.keys :] = -torch.inf
        return bias.flatten()

    def gradient(self, to_keys: Tensor) -> Tensor:
        """The gradient `[Lk, H, D]` from that of `to_keys`."""
        return to_keys.unflatten(0, (self.heads, -1)).transpose(0, 1)[: self.keys]


def _probabilities(q: Tensor, keys: _Weights) -> Tensor:
    """Map of a block of queries -> map `[1, H * keys, h, w]`."""
    scores = _rows(pointwise_conv(q, keys.to_keys, keys.mask, groups=keys.heads), keys.heads)
    # In place: every row is read before it is written.
    return _map(torch.softmax(scores, -1, out=scores))


def _forward_block(q: Tensor, keys: _Weights, values: _Weights) -> Tensor:
    """A block of queries `[n, H, D]` -> what they attend to."""
    p = _probabilities(_map(q), keys)
    return _rows(pointwise_conv(p, values.from_keys, None, groups=keys.heads), keys.heads)


def _backward_block(
    grad_out: Tensor, q: Tensor, keys: _Weights, values: _Weights, sums: tuple[Tensor, Tensor]
) -> Tensor:
    """dq of a block `[n, H, D]`; sums: the gradients of both `to_keys`, which it adds to."""
    heads = keys.heads
    queries, grad = _map(q), _map(grad_out)
    p = _probabilities(queries, keys)
    dp = _rows(pointwise_conv(grad, values.to_keys, None, groups=heads), heads)
    backward = torch.ops.aten._softmax_backward_data.out
    ds = _map(backward(dp, _rows(p, heads), -1, dp.dtype, grad_input=dp))
    d_keys, d_values = sums
    d_keys += conv_weight_gradient(ds, queries, keys.to_keys)
    d_values += conv_weight_gradient(p, grad, values.to_keys)
    return _rows(pointwise_conv(ds, keys.from_keys, None, groups=heads), heads)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with without_autocast("cpu"):
        for image in range(q.shape[0]):
            keys, values = _Weights(k[image] * scale), _Weights(v[image])
            for block in _blocks(q, k):
                out[image, block] = _forward_block(q[image, block], keys, values)
    return out


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, *_: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    with without_autocast("cpu"):
        for image in range(q.shape[0]):
            keys, values = _Weights(k[image] * scale), _Weights(v[image])
            sums = torch.zeros_like(keys.to_keys), torch.zeros_like(values.to_keys)
            for block in _blocks(q, k):
                dq[image, block] = _backward_block(
                    grad_out[image, block], q[image, block], keys, values, sums
                )
            dk[image] = keys.gradient(sums[0]) * scale
            dv[image] = values.gradient(sums[1])
    return dq, dk, dv


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return reference.attention(q, k, v, scale=scale)


_BLOCKED = differentiable(
    _forward, _backward, _reference, name="BlockedAttention", tensors=3, loops=True
)

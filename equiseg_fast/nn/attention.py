"""Attention with spatially reduced keys and values: within a modality and across modalities."""

from torch import Tensor, nn

from equiseg_fast.ops import attention
from equiseg_fast.ops._layout import linear, to_map, to_tokens

from .common import Linear


def reduce_tokens(conv: nn.Conv2d, x: Tensor, height: int, width: int) -> Tensor:
    """A convolution whose kernel is its stride r, on tokens: `[R, L, C]` -> `[R, L', C']`, where
    L' = (height // r) * (width // r)."""
    r = conv.stride[0]
    if height % r or width % r:
        return to_tokens(conv(to_map(x, height, width)))
    # One matrix product over patches, which beats every strided convolution measured.
    patches = x.unflatten(1, (height // r, r, width // r, r)).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return linear(patches.flatten(3).flatten(1, 2), weight, conv.bias)


class CrossModalAttention(nn.Module):
    """Queries from one sequence, keys and values from another of the same size.

    dim: channels; heads: number of heads (divides dim); sr_ratio: the keys are reduced by a
    convolution of this kernel and stride, then LayerNorm (1: neither exists); eps of that norm.
    Parameter names are SegFormer's: `q`, `kv` (K rows first, then V), `proj`, `sr`, `norm`.
    """

    def __init__(self, dim: int, heads: int, sr_ratio: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads = {heads}; got {dim}")
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, source: Tensor, height: int, width: int) -> Tensor:
        """x, source `[R, L, dim]`, L = height * width -> `[R, L, dim]`."""
        if self.sr_ratio > 1:
            source = self.norm(reduce_tokens(self.sr, source, height, width))
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, sr_ratio={self.sr_ratio}"


class EfficientSelfAttention(CrossModalAttention):
    """Efficient self-attention of SegFormer (arXiv 2105.15203), section 3.1."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        """`[R, L, dim]` -> `[R, L, dim]`, L = height * width."""
        return super().forward(x, x, height, width)

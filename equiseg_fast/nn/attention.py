"""Attention with spatially reduced keys and values: within a modality and across modalities."""

from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.ops import attention
from equiseg_fast.ops._checks import check_sizes, positive
from equiseg_fast.ops._layout import linear, to_map, to_tokens

from . import _foreign
from ._forms import as_tokens, check_belongs, check_channels, check_same_form, like
from ._layer import Layer
from ._plain import is_plain, reduces
from ._sharing import adopt
from .common import apply_linear, backend_repr


def reduce_tokens(conv: nn.Conv2d, x: Tensor, height: int, width: int) -> Tensor:
    """A convolution whose kernel is its stride r, on tokens: `[R, L, C]` -> `[R, L', C']`, where
    L' = (height // r) * (width // r)."""
    r = conv.stride[0] if is_plain(conv) and reduces(conv) else 0
    if not r or height % r or width % r:
        return to_tokens(conv(to_map(x, height, width)))
    # One matrix product over patches, which beats every strided convolution measured.
    patches = x.unflatten(1, (height // r, r, width // r, r)).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return linear(patches.flatten(3).flatten(1, 2), weight, conv.bias)


class CrossModalAttention(Layer):
    """Queries from one sequence, keys and values from another of the same size.

    dim: channels; heads: number of heads (divides dim); sr_ratio: the keys are reduced by a
    convolution of this kernel and stride, then LayerNorm (1: neither exists); eps of that norm.
    Parameter names are SegFormer's: `q`, `kv` (K rows first, then V), `proj`, `sr`, `norm`.
    """

    def __init__(self, dim: int, heads: int, sr_ratio: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads, sr_ratio=sr_ratio)
        eps = positive("eps", eps)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads = {heads}; got {dim}")
        self.dim = dim
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(
        self, x: Tensor, source: Tensor, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """x, source: tokens `[R, L, dim]` with height and width, or maps `[R, dim, H, W]`.

        Returns what x is. Raises TypeError or ValueError naming the argument.
        """
        check_same_form("source", source, "x", x)
        tokens, rows, columns = as_tokens("x", x, height, width)
        source, _, _ = as_tokens("source", source, height, width)
        check_belongs("source", source, self.kv)
        return like(self._attend(tokens, source, rows, columns), x, rows, columns)

    def _attend(self, x: Tensor, source: Tensor, height: int, width: int) -> Tensor:
        check_channels("x", x, self.dim)
        check_belongs("x", x, self.q)
        if self.sr_ratio > 1:
            if min(height, width) < self.sr_ratio:
                raise ValueError(
                    f"height and width must be at least sr_ratio = {self.sr_ratio}; "
                    f"got {height}, {width}"
                )
            source = self.norm(reduce_tokens(self.sr, source, height, width))
        q = apply_linear(self.q, x).unflatten(-1, (self.heads, -1))
        k, v = apply_linear(self.kv, source).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return apply_linear(self.proj, attention(q, k, v).flatten(2))

    def extra_repr(self) -> str:
        shape = (0, 1, self.heads, self.dim // self.heads)
        sizes = f"dim={self.dim}, heads={self.heads}, sr_ratio={self.sr_ratio}"
        return f"{sizes}, {backend_repr('attention', self, shape, shape, shape)}"


class EfficientSelfAttention(CrossModalAttention):
    """Efficient self-attention of SegFormer (arXiv 2105.15203), section 3.1."""

    @classmethod
    def from_torch(cls, module: Any) -> "EfficientSelfAttention":
        """This layer on the parameters of somebody else's, which stay the same objects.

        module: the attention of SegFormer's authors, CMNeXt and their kin (`q`, `kv`, `proj`, `sr`,
        `norm`), or of transformers: `SegformerAttention` (4 and 5), or 4's
        `SegformerEfficientSelfAttention`, which ends without a projection. Where keys and values
        are two layers, `kv` joins them whenever it is called; the state dict has one `kv` anyway,
        a copy: writing into that does not reach the parameters, `load_state_dict` does.

        Its structure is checked, not its `forward` (`integrations.accelerate_module` does that);
        it is left as it is. Raises TypeError that says what is missing or different: dropout above
        0, another scale, parameters that this layer has no place for.
        """
        spelling = _foreign.spelling_of(module, cls.__name__, _foreign.ATTENTION)
        inner = _foreign.child(module, "self") or module
        heads = _foreign.find(inner, "num_heads", "head", "num_attention_heads")
        ratio = _foreign.find(inner, "sr_ratio", "sequence_reduction_ratio")
        for name, number in (("number of heads", heads), ("ratio of the reduction", ratio)):
            if not isinstance(number, int):
                raise TypeError(f"module must tell the {name} as an int; got {number}")
        _foreign.demand_no_dropout(inner, "attn_drop", "proj_drop", "dropout", "attention_dropout")
        _foreign.demand_no_dropout(_foreign.child(module, "output"), "dropout")
        conv = _foreign.child(module, str(spelling.children["sr"]))
        _foreign.demand(cls.__name__, _foreign.is_reduction(conv, ratio))
        q = _foreign.child(module, str(spelling.children["q"]))
        if not isinstance(q, nn.Linear):
            raise TypeError(f"{spelling.children['q']} must be an nn.Linear; got {q}")
        dim = q.in_features
        if dim % heads:
            raise TypeError(f"module must split its channels evenly; got {dim} in {heads} heads")
        scale = _foreign.find(inner, "scale", "scaling")
        if scale is not None and abs(scale - (dim // heads) ** -0.5) > 1e-6:
            raise TypeError(f"module must scale by 1/sqrt(head dim); its scale is {scale}")
        with torch.device("meta"):
            layer = cls(dim, heads, ratio)
        if "proj" not in spelling.children:
            layer.proj = nn.Identity()  # type: ignore[assignment]
        adopt(layer, module, spelling, without_bias=("q", "kv", "proj", "sr"))
        return layer

    def forward(  # type: ignore[override]
        self, x: Tensor, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Tokens `[R, L, dim]` with height and width, or a map `[R, dim, H, W]` -> the same."""
        tokens, height, width = as_tokens("x", x, height, width)
        return like(self._attend(tokens, tokens, height, width), x, height, width)

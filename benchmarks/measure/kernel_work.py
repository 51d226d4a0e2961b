"""The kernels that CUDA makes of one call, and what each has to do.

Of a kernel of ours: every tensor it is given once, and the issue slots that its machine code needs
per element. Of a stock operator: its inputs and outputs, the FLOPs of `torch.utils.flop_counter`,
and the kernels that ATen is known to launch for it. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Kernel:
    """One launch. kind: as in `predictions.ASSUMPTIONS`, how well it does. bytes: read or
    written. matrix: FLOPs of products of half-precision inputs; vector: of fp32 ones. exps:
    exponentials. slots: machine instructions of all lanes. programs: CTAs, 0 where they are enough
    or not known."""

    name: str
    kind: str
    bytes: float
    matrix: float = 0.0
    vector: float = 0.0
    exps: float = 0.0
    slots: float = 0.0
    programs: int = 0


def moved(tensors: Iterable[Tensor]) -> int:
    """Bytes of what the tensors address, expanded dimensions once; a view that comes twice too."""
    seen = {}
    for x in tensors:
        place = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape))
        sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
        seen[place] = prod(sizes) * x.element_size()
    return sum(seen.values())


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


# Machine instructions per element of the largest tensor (of the loss: per pixel and class),
# compiled for sm_90 and read in the hot loop. A pair is that of the forward and that of its
# transpose or gradient, by constexpr. What is not here waits for memory only.
SLOTS: dict[str, float | tuple[str, float, float]] = {
    "depthwise_conv": ("FORWARD", 28.4, 19.5),
    "depthwise_bwd": 51.0,
    "pooling_mixer_conv": ("TRANSPOSED", 74.0, 84.5),
    "pooling_mixer_pool": ("TRANSPOSED", 85.8, 74.8),
    "pooling_mixer_dweight": 93.5,
    "query_hub_fwd": 52.0,
    "class_sums": 9.1,
    "add_layer_norm_fwd": 28.5,
    "add_layer_norm_bwd": 23.0,
    "upsample_cross_entropy_fwd": 20.0,
    "upsample_cross_entropy_bwd": 26.0,
}
# Products of two matrices, each of as many multiply-adds as there are scores times D.
PRODUCTS = {"attention_fwd": 2, "attention_bwd_dkdv": 4, "attention_bwd_dq": 3}


def ours(name: str, grid: Sequence[int], args: Sequence[Any], options: Mapping[str, Any]) -> Kernel:
    """A kernel of ours; args and options: as `launch` gets them."""
    given = [x for x in args if isinstance(x, Tensor)]
    size = moved(x for x in given if x.numel())
    if name in PRODUCTS:
        batch, n_q, heads, dim = given[0].shape
        scores = batch * heads * n_q * given[1].shape[1]
        way = "forward" if name == "attention_fwd" else "backward"
        return Kernel(
            name, f"attention {way} {_width(dim)}", size, exps=scores, programs=prod(grid),
            **_arithmetic(given[0], 2 * PRODUCTS[name] * dim * scores),
        )  # fmt: skip
    slots = SLOTS.get(name, 0.0)
    if isinstance(slots, tuple):
        constexpr, on, off = slots
        slots = on if options[constexpr] else off
    elements = max((x.numel() for x in given), default=0)
    if name.startswith("upsample_cross_entropy"):
        logits, labels = given[:2]
        elements = labels.numel() * logits.shape[-1]
    return Kernel(name, "ours", size, slots=slots * elements)


def _arithmetic(x: Tensor, flops: float) -> dict[str, float]:
    return {"matrix" if x.element_size() == 2 else "vector": flops}


def _width(dim: int) -> str:
    """Two widths of heads stand for all."""
    return "D=32" if dim <= 32 else "D=64"


Kernels = Iterable[Kernel]

_NO_KERNEL = {
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "_reshape_alias", "_unsafe_view", "empty_permuted",
}  # fmt: skip
_OVERWRITING = {"copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_"}
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "prod", "var_mean", "argmax", "any", "all",
    "count_nonzero", "logsumexp", "cumsum", "linalg_vector_norm", "norm",
}  # fmt: skip
_KINDS = dict.fromkeys(_REDUCTIONS, "reduction") | {
    "upsample_bilinear2d": "interpolation",
    "upsample_bilinear2d_backward": "bilinear backward",
    "native_layer_norm": "LayerNorm forward",
}
_TAP_SLOTS = 3.25
"""Machine instructions per tap of stock stencils."""
_SORT_KERNELS = 12
_FLASH_ROWS = 128
"""Queries (forward) or keys (backward) of one program of FlashAttention on Hopper."""


def launches_kernel(func: Any) -> bool:
    """Whether a stock operator is more than a view or an allocation."""
    return not func.is_view and func.overloadpacket.__name__ not in _NO_KERNEL


def stock(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> tuple[Kernel, ...]:
    """The kernels of a stock operator that was called with these arguments."""
    name = func.overloadpacket.__name__
    count = flop_registry.get(func.overloadpacket)
    flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
    if name in _EXPANDED:
        return tuple(_EXPANDED[name](name, args, out, flops))
    read = tensors_in((args[1:] if name in _OVERWRITING else args, kwargs))
    size = moved(read) + moved(tensors_in(out))
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = args[-2:]
        # A sum over many more elements than a side of the result has is that of a weight gradient.
        long = left.shape[-1] > 8 * max(left.shape[-2], right.shape[-1])
        kind = "weight-gradient GEMM" if long else "GEMM"
        return (Kernel(name, kind, size, **_arithmetic(left, flops)),)
    kind = _KINDS.get(name, "pointwise")
    if name in ("clone", "copy_", "_to_copy") and _order(read[-1]) != _order(tensors_in(out)[0]):
        kind = "transposing copy"
    return (Kernel(name, kind, size),)


def _order(x: Tensor) -> list[int]:
    """Of dimensions in memory."""
    return sorted((i for i, n in enumerate(x.shape) if n > 1), key=lambda i: -x.stride(i))


def _convolution(name: str, args: Sequence[Any], out: Any, flops: float) -> Kernels:
    """Backward, flops are those of all gradients of `out` together; those of x and the weight need
    the same."""
    backward = name.endswith("backward")
    grad, x, weight, bias = args[:4] if backward else (out, *args[:3])
    dense = args[9 if backward else 8] == 1
    taps = weight.shape[2:].numel()
    kind = "stencil" if not dense else "GEMM" if taps == 1 else "convolution"
    slots = 0.0 if dense else _TAP_SLOTS * taps * grad.numel()
    products = [(name, kind, (x, weight, out))]
    if backward:
        long = "weight-gradient GEMM" if kind == "GEMM" else kind
        products = [(f"{name} dx", kind, (grad, weight, out[0]))] if out[0] is not None else []
        if out[1] is not None:
            products.append((f"{name} dweight", long, (grad, x, out[1])))
    for part, own, tensors in products:
        work = _arithmetic(x, flops * dense / len(products))
        yield Kernel(part, own, moved(tensors), slots=slots, **work)
    if backward and out[2] is not None:
        yield Kernel(f"{name} dbias", "reduction", moved((grad, out[2])))
    elif not backward and bias is not None and dense:
        yield Kernel("add_", "pointwise", 2 * moved([out]))


def _pool(name: str, args: Sequence[Any], out: Any, _: float) -> Kernels:
    window = args[2] if name.endswith("backward") else args[1]
    slots = _TAP_SLOTS * prod(window) * out.numel()
    yield Kernel(name, "stencil", moved(tensors_in((args, out))), slots=slots)


def _layer_norm_backward(name: str, args: Sequence[Any], out: Any, _: float) -> Kernels:
    """Gradients of the input, then those of the parameters, which read both inputs again."""
    yield Kernel(f"{name} dx", "LayerNorm backward", moved((*args[:2], out[0])))
    if any(y is not None for y in out[1:]):
        yield Kernel(f"{name} dweight", "LayerNorm backward", moved(args[:2]))


def _batch_norm(name: str, args: Sequence[Any], out: Any, _: float) -> Kernels:
    """Statistics of the batch, or sums of a gradient, are a pass of their own."""
    backward = name.endswith("backward")
    given = args[:2] if backward else args[:1]
    if backward or next((x for x in args if isinstance(x, bool)), False):
        yield Kernel(f"{name} sums", "BatchNorm", moved(given))
    if out[0] is not None:
        yield Kernel(name, "BatchNorm", moved((*given, out[0])))


def _sort(name: str, args: Sequence[Any], out: Any, _: float) -> Kernels:
    return [Kernel(name, "pointwise", moved(args[:1]))] * _SORT_KERNELS


def _flash(name: str, args: Sequence[Any], out: Any, _: float) -> Kernels:
    """Backward, one program per block of keys adds up gradients of queries in fp32, which are cast
    last."""
    backward = name.endswith("backward")
    q, k, v = args[1:4] if backward else args[:3]
    size = moved((q, k, v, *out[:2]))
    kind, products, blocked = f"SDPA forward {_width(q.shape[-1])}", 2, q
    if backward:
        yield Kernel(f"{name} delta", "pointwise", moved((args[0], args[4])))
        size = moved((args[0], q, k, v, *out[1:])) + 4 * q.numel()
        kind, products, blocked = "SDPA backward", 5, k
    scores = q.shape[:-1].numel() * k.shape[-2]
    yield Kernel(
        name, kind, size, matrix=2 * products * q.shape[-1] * scores, exps=scores,
        programs=-(-blocked.shape[-2] // _FLASH_ROWS) * q.shape[:2].numel(),
    )  # fmt: skip
    if backward:
        yield Kernel(f"{name} cast", "pointwise", 4 * q.numel() + moved(out[:1]))


_EXPANDED: dict[str, Callable[[str, Sequence[Any], Any, float], Kernels]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution,
    "avg_pool2d": _pool,
    "avg_pool2d_backward": _pool,
    "native_layer_norm_backward": _layer_norm_backward,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_batch_norm_backward": _batch_norm,
    "topk": _sort,
    "sort": _sort,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash,
}

"""Softmax attention for tall queries and short, spatially reduced keys."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _attention_cpu, _backend, _checks
from ._layout import separate
from ._math import statistics_dtype
from ._registry import (
    autocast,
    differentiable,
    empty_gradients,
    needs_grad,
    reference_gradients,
    register,
    without_autocast,
)

MAX_HEAD_DIM = 128
_QUERIES, _KEYS = "[B, Lq, H, D]", "[B, Lk, H, D]"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, `softmax(scale * q k^T) v`, without the score matrix in memory.

    Not a drop-in for `torch.nn.functional.scaled_dot_product_attention`: that takes `[B, H, L, D]`,
    this `[B, L, H, D]`, as projections leave it (`x.transpose(1, 2)` leads from one to the other),
    and there is no mask, no dropout, no causality and no sharing of keys between heads.

    q: `[B, Lq, H, D]` queries. Modalities, images and primaries all go into B: one launch.
    k, v: `[B, Lk, H, D]` keys and values, Lk >= 1. All three share one dtype (float32, float16,
        bfloat16; float64 on the torch and reference backends) and device; any strides.
    scale: factor of the scores, 1/sqrt(D) by default.
    return_lse: also return the natural logarithm of the softmax denominator, `[B, H, Lq]` fp32
        (fp64 for fp64 inputs), which is differentiable too.
    backend: "triton" (D <= 128), "torch", "reference", "auto"; None takes the current default.

    Returns `[B, Lq, H, D]` in the dtype of q. Products accumulate in fp32; fp32 inputs are
    multiplied in true fp32 unless `torch.backends.cuda.matmul.allow_tf32` is set. The backward is
    deterministic. The torch backend is `scaled_dot_product_attention`, but with many queries in
    fp32 on the CPU convolutions over blocks of them, which save the inputs alone; with gradients in
    half precision on the CPU, with return_lse, and under transforms (`torch.func`, forward mode)
    it computes in fp32. Under autocast the inputs are cast to its dtype. Raises TypeError or
    ValueError naming the argument on bad input. Source: SegFormer (arXiv 2105.15203), section 3.1.
    """
    _checks.check_flags(return_lse=return_lse)
    _checks.check_tensor("q", q, _checks.FLOATING, _QUERIES)
    _checks.check_tensor("k", k, _checks.FLOATING, _KEYS)
    _checks.check_tensor("v", v, _checks.FLOATING, _KEYS)
    q, k, v = autocast(q, k, v)
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.number("scale", scale)
    chosen = _backend.resolve("attention", backend, q.device, q, k, v)
    if chosen == "reference":
        return _reference(q, k, v, scale, return_lse)
    if chosen == "torch":
        return _torch(q, k, v, scale, return_lse)
    allow_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    out, lse = _TRITON(q, k, v, scale, allow_tf32)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.check_same(q=q, k=k, v=v)
    batch, _, heads, dim = q.shape
    keys = k.shape[1]
    if heads < 1 or dim < 1:
        raise ValueError(f"q must have at least one head and channel; got shape {list(q.shape)}")
    if keys < 1:
        raise ValueError(f"k must have at least one key; got shape {list(k.shape)}")
    expected = (batch, keys, heads, dim)
    if k.shape[2] != heads and q.shape[1] == keys < max(heads, k.shape[2]):
        raise ValueError(f"k must have shape {_KEYS} = {list(expected)}; {_transposed(q, k)}")
    _checks.check_shape("k", k, expected, _KEYS)
    _checks.check_shape("v", v, expected, "[B, Lk, H, D] (that of k)")
    if heads >= _MANY_HEADS and q.shape[1] == keys <= _FEW_TOKENS and _are_views(q, k):
        raise ValueError(f"q must have shape {_QUERIES}; {_transposed(q, k)}")


# With one length for queries and keys, `[B, H, L, D]` is a valid `[B, L, H, D]` and would compute
# something else. It is refused where nothing else makes sense: more heads than any model has, no
# more tokens than models have heads, and the memory of `[B, L, H, D]`, transposed, which is what
# the projections of a layer are where scaled_dot_product_attention takes them. Tensors of such a
# shape in memory of that order pass: attention over few frames with pixels for heads, say.
_MANY_HEADS = 256
_FEW_TOKENS = 64


def _are_views(q: Tensor, k: Tensor) -> bool:
    return q.stride(1) < q.stride(2) and k.stride(1) < k.stride(2)


def _transposed(q: Tensor, k: Tensor) -> str:
    return (
        f"got q {list(q.shape)} and k {list(k.shape)}. If these are [B, H, L, D], as "
        "scaled_dot_product_attention takes them, pass q.transpose(1, 2), and so k and v"
    )


def _reasons(q: Tensor, k: Tensor, v: Tensor, **_: object) -> _backend.Reasons:
    reasons = _backend.triton_reasons(q, k, v)
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dimension {q.shape[-1]} is larger than {MAX_HEAD_DIM}")
    return reasons


_backend.register_reasons("attention", _reasons)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The fastest composition of stock PyTorch operators for the device and dtype."""
    q, k, v = separate(q), separate(k), separate(v)
    dtype, wide = q.dtype, statistics_dtype(q)
    # On the CPU the backward of scaled_dot_product_attention gains nothing from 16-bit matrix
    # units, and scores in half precision are wrong by the rounding of their mean.
    if dtype != wide and (return_lse or (q.device.type == "cpu" and needs_grad(q, k, v))):
        with without_autocast(q.device.type):
            result = _torch(q.to(wide), k.to(wide), v.to(wide), scale, return_lse)
        if isinstance(result, tuple):
            return result[0].to(dtype), result[1]
        return result.to(dtype)
    # Transforms know no scaled_dot_product_attention.
    if return_lse or _checks.is_transformed():
        return _with_scores(q, k, v, scale, return_lse)
    if _attention_cpu.suits(q, k):
        return _attention_cpu.attend(q, k, v, scale)
    out = _sdpa(q, k, v, scale)
    # The compiler has no double backward.
    if needs_grad(q, k, v) and not torch.compiler.is_compiling():
        return _TWICE(out, q, k, v, scale)
    return out


def _with_scores(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool) -> Any:
    """By way of the score matrix."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    return (out, scores.to(statistics_dtype(q)).logsumexp(dim=-1)) if return_lse else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    parts = _query_parts(q) if needs_grad(q, k, v) else 1
    if parts > 1:
        batch, _, heads, dim = q.shape
        q = q.unflatten(1, (parts, -1)).flatten(0, 1)
        k, v = (x[:, None].expand(-1, parts, -1, -1, -1).flatten(0, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
        return out.transpose(1, 2).reshape(batch, -1, heads, dim)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _query_parts(q: Tensor) -> int:
    """Into how many parts to cut the queries so that the CPU has work for all threads.

    Its backward of scaled_dot_product_attention shares out batch rows and heads, nothing else.
    """
    batch, queries, heads, _ = q.shape
    if q.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return 1
    rows, threads = batch * heads, torch.get_num_threads()
    fewest = -(-threads // rows)
    candidates = [n for n in range(fewest, 2 * fewest + 1) if queries % n == 0]
    # Best are shares of the same size.
    return min(candidates, key=lambda n: (rows * n % threads != 0, n), default=1)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    wide = (x.to(statistics_dtype(q)) for x in (q, k, v))
    with without_autocast(q.device.type):
        out, lse = _with_scores(*wide, scale, True)
    return out.to(q.dtype).contiguous(), lse


def _torch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    allow_tf32: bool,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(q)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype)) * scale
    weights = (scores - lse[..., None]).exp()
    grad = grad_out.to(dtype)
    delta = (grad * out.to(dtype)).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad, v.to(dtype))
    grad_scores = weights * (grad_weights - delta[..., None]) * scale
    return (
        torch.einsum("bhqk,bkhd->bqhd", grad_scores, k.to(dtype)).to(q.dtype).contiguous()
        if needs_dq
        else q.new_empty(0),
        torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.to(dtype)).to(k.dtype).contiguous()
        if needs_dk
        else k.new_empty(0),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad).to(v.dtype).contiguous()
        if needs_dv
        else v.new_empty(0),
    )


def _fake_forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _dim = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=statistics_dtype(q))
    return q.new_empty(q.shape), lse


def _fake_backward(
    grad_out: object, grad_lse: object, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return empty_gradients((q, k, v), others[-3:])


def _flops_backward(*arguments: Any) -> int:
    """The scores again; the weights for their gradient, and a product for each gradient."""
    _, _, q, k, *_, dq, dk, dv = arguments
    return 2 * prod(q) * k[1] * (1 + (dq or dk) + dq + dk + dv)


_FORWARD = register(
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, float scale, bool allow_tf32) -> (Tensor out, Tensor lse)",
    kernels="attention",
    torch=_torch_forward,
    fake=_fake_forward,
    flops=lambda q, k, *_: 4 * prod(q) * k[1],
)
_BACKWARD = register(
    "attention_bwd",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, bool allow_tf32, bool needs_dq, bool needs_dk, bool needs_dv) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    kernels="attention",
    torch=_torch_backward,
    fake=_fake_backward,
    flops=_flops_backward,
)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool = False) -> Any:
    return reference.attention(q, k, v, scale=scale, return_lse=return_lse)


def _reference_of_saved(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _out, _lse, scale, _allow_tf32 = others
    return _reference(q, k, v, scale, return_lse=True)


def _saves(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    return (*inputs[:3], *output), inputs[3:]


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    return _BACKWARD(grad_out, grad_lse, *saved)


_TRITON = differentiable(
    _FORWARD, _backward, _reference_of_saved, name="Attention", tensors=3, outputs=2, saves=_saves
)


# ---- scaled_dot_product_attention, differentiable twice, which it is not itself -----------------


def _pass_on(out: Tensor, *_: Any) -> Tensor:
    return out.detach()


def _pass_back(grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """The backward that scaled_dot_product_attention recorded goes on from its result; one of which
    a graph is made leaves that out, and goes through the reference."""
    q, k, v, scale, _, *needs = saved
    if not torch.is_grad_enabled():
        return grad_out, None, None, None
    return None, *reference_gradients(_reference, (q, k, v, scale), (grad_out,), needs)


_TWICE = differentiable(
    _pass_on, _pass_back, None, name="AttentionTwice", tensors=4,
    saves=lambda inputs, _: (inputs[1:4], inputs[4:]),
)  # fmt: skip

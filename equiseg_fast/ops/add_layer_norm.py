"""Residual addition and the LayerNorm that follows it, in one pass over the features."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._math import statistics_dtype
from ._registry import (
    autocast_is_on,
    differentiable,
    empty_gradients,
    needs_grad,
    register,
    without_autocast,
)

MAX_CHANNELS = 4096


def add_layer_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`total = x + update` and `normed = layer_norm(total)` over the last dimension.

    x: `[..., C]`, the residual stream, C >= 1; update: what a branch adds to it, in its shape;
        float32, float16 or bfloat16 (float64 on the torch and reference backends); any strides.
    weight, bias: `[C]`, of the LayerNorm. eps > 0, added to the variance. All in the dtype and on
        the device of x.
    backend: "triton" (C <= 4096), "torch", "reference", "auto"; None takes the current default.

    Returns total and normed, both `[..., C]` in the dtype of x, contiguous. total is rounded once,
    normed is that of the rounded total: what an addition followed by `F.layer_norm` gives.
    Statistics are fp32 (fp64 for fp64), the variance is that of differences from the mean, so a
    large mean does no harm. Minimum traffic is x, update and both results, in the
    backward total and three gradients, 4 passes over the features each way (5 and 8 for the two
    operators on their own); 8 FLOP per element forward, 14 backward. Saves total and two numbers
    per row. The backward is deterministic, and x and update get the same gradient, computed once.

    Under autocast x keeps its dtype, as in the sum of a wide residual stream and a narrow update,
    and the other inputs are cast to it. Raises TypeError or ValueError naming the argument on bad
    input. Source: Layer Normalization (arXiv 1607.06450), in the pre-norm residual blocks of
    SegFormer (arXiv 2105.15203).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[..., C]")
    channels = x.shape[-1]
    if channels < 1:
        raise ValueError(f"x must have at least one channel; got shape {list(x.shape)}")
    _checks.check_tensor("update", update, _checks.FLOATING, "[..., C]")
    _checks.check_shape("update", update, tuple(x.shape), "of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _checks.check_tensor(name, parameter, _checks.FLOATING, "[C]")
        _checks.check_shape(name, parameter, (channels,), "[C]")
    eps = _checks.positive("eps", eps)
    update, weight, bias = _autocast(x, update, weight, bias)
    _checks.check_same(x=x, update=update, weight=weight, bias=bias)
    chosen = _backend.resolve("add_layer_norm", backend, x.device, x)
    if chosen == "reference":
        return reference.add_layer_norm(x, update, weight, bias, eps)
    if chosen == "torch":
        return _torch(x, update, weight, bias, eps)
    total, normed, _, _ = _TRITON(x, update, weight, bias, eps)
    return total, normed


def _autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Under autocast cast the others to the dtype of x; fp64 stays as it is."""
    if not autocast_is_on(x):
        return others
    return tuple(t if t.dtype == torch.float64 else t.to(x.dtype) for t in others)


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    reasons = _backend.triton_reasons(x)
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"{x.shape[-1]} channels are more than {MAX_CHANNELS}")
    return reasons


_backend.register_reasons("add_layer_norm", _reasons)


def _torch(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = (x + update).contiguous()
    if autocast_is_on(x):
        with without_autocast(x.device.type):  # which would return fp32
            return total, _layer_norm(total, weight, bias, eps)
    return total, _layer_norm(total, weight, bias, eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype, wide = x.dtype, statistics_dtype(x)
    if dtype != wide and x.device.type == "cpu" and needs_grad(x, weight, bias):
        # In half precision the gradients of the parameters would be added up in half precision,
        # in which 256 and 1 are 256.
        x, weight, bias = (t.to(wide) for t in (x, weight, bias))
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


def _torch_forward(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, normed = _torch(x, update, weight, bias, eps)
    wide = total.to(statistics_dtype(total))
    var, mean = torch.var_mean(wide, dim=-1, correction=0)
    return total, normed, mean, (var + eps).rsqrt()


def _torch_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = total.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    grad = grad_normed.to(mean.dtype)
    rstd = rstd[..., None]
    xhat = (total - mean[..., None]) * rstd
    if needs_dx:
        g = grad * weight
        second = (g * xhat).mean(-1, keepdim=True)
        dx = (g - g.mean(-1, keepdim=True) - xhat * second) * rstd
        if grad_total is not None:
            dx = dx + grad_total
        dx = dx.to(total.dtype).contiguous()
    if needs_dweight:
        dweight = (grad * xhat).reshape(-1, len(weight)).sum(0).to(weight.dtype)
    if needs_dbias:
        dbias = grad.reshape(-1, len(weight)).sum(0).to(weight.dtype)
    return dx, dweight, dbias


def _fake_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = statistics_dtype(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


def _fake_backward(
    grad_total: object,
    grad_normed: object,
    total: Tensor,
    weight: Tensor,
    mean: object,
    rstd: object,
    *needs: bool,
) -> tuple[Tensor, ...]:
    return empty_gradients((total, weight, weight), needs)


_FORWARD = register(
    "add_layer_norm_fwd",
    "(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor total, Tensor normed, Tensor mean, Tensor rstd)",
    kernels="add_layer_norm",
    torch=_torch_forward,
    fake=_fake_forward,
)
_BACKWARD = register(
    "add_layer_norm_bwd",
    "(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor weight, Tensor mean, "
    "Tensor rstd, bool needs_dx, bool needs_dweight, bool needs_dbias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    kernels="add_layer_norm",
    torch=_torch_backward,
    fake=_fake_backward,
)


def _saves(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    """total, which leads back to x and update itself, and the statistics of its rows."""
    total, _, mean, rstd = output
    return (total, *inputs[2:4], mean, rstd), inputs[4:]


def _backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    if grad_normed is None:
        return grad_total, None, None
    return _BACKWARD(grad_total, grad_normed, total, weight, mean, rstd, *needs)


def _reference(
    total: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(total, total.new_zeros(()), weight, bias, eps)


_TRITON = differentiable(
    _FORWARD, _backward, _reference, name="AddLayerNorm", tensors=4, outputs=2, summands=2,
    saves=_saves,
)  # fmt: skip

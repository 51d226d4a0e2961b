"""The token mixing of the parallel pooling mixer: 7x7 depthwise convolution plus three pools."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._layout import to_map, to_tokens
from ._math import statistics_dtype
from ._registry import (
    as_result,
    autocast,
    differentiable,
    empty_gradients,
    register,
    without_autocast,
)

_POOLS = (3, 7, 11)

_CACHED_BYTES = 2 * 2**20
"""The CPU works on images of about this size at a time: nine passes over what its caches hold."""


def pooling_mixer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Depthwise 7x7 plus its 3x3, 7x7 and 11x11 average pools, summed, on tokens.

    x: `[B, L, C]` tokens with L = height * width in row-major order, C >= 1; float32, float16 or
        bfloat16 (float64 on the torch and reference backends); any strides.
    weight: `[C, 1, 7, 7]`; bias: `[C]`; both in the dtype and on the device of x.
    backend: "triton", "torch", "reference", "auto"; None takes the current default.

    Returns `[B, L, C]` in the dtype of x. The convolution pads with zeros (3 on each side); a pool
    divides by the number of pixels it finds inside the image. Minimum traffic is x and
    the result, in the backward x and both gradients; the kernels also write and read the fp32
    convolution once. About 150 FLOP per element forward, 260 backward. Sums are fp32 (fp64 for
    fp64) with one rounding at the end; only x and weight are saved; the backward is deterministic.
    Under autocast all inputs are cast to its dtype. Raises TypeError or ValueError naming the
    argument. Source: CMNeXt (arXiv 2303.01480), section 3.3.
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[B, L, C]")
    _checks.check_tensor("weight", weight, _checks.FLOATING, "[C, 1, 7, 7]")
    _checks.check_tensor("bias", bias, _checks.FLOATING, "[C]")
    _checks.check_tokens("x", x, height, width)
    if x.shape[-1] < 1:
        raise ValueError(f"x must have at least one channel; got shape {list(x.shape)}")
    x, weight, bias = autocast(x, weight, bias)
    _checks.check_shape("weight", weight, (x.shape[-1], 1, 7, 7), "[C, 1, 7, 7]")
    _checks.check_shape("bias", bias, (x.shape[-1],), "[C]")
    _checks.check_same(x=x, weight=weight, bias=bias)
    chosen = _backend.resolve("pooling_mixer", backend, x.device, x)
    if chosen == "reference":
        return reference.pooling_mixer(x, weight, bias, height, width)
    if chosen == "torch" and x.device.type != "cpu":
        y = _convolution(to_map(x, height, width), weight, bias)
        pools = (F.avg_pool2d(y, k, 1, k // 2, count_include_pad=False) for k in _POOLS)
        return to_tokens(sum(pools, start=y))
    return (_TORCH if chosen == "torch" else _TRITON)(x, weight, bias, height, width)


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return _backend.triton_reasons(x)


_backend.register_reasons("pooling_mixer", _reasons)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=3, groups=weight.shape[0])


def _inverse_counts(y: Tensor) -> Tensor:
    """1 / the pixels of every window inside the image: `[3, 1, 1, H, W]` for the three pools."""
    half = torch.tensor([k // 2 for k in _POOLS], device=y.device)[:, None]

    def along(size: int) -> Tensor:
        i = torch.arange(size, device=y.device)
        return ((i + half).clamp(max=size - 1) - (i - half).clamp(min=0) + 1).to(y.dtype)

    counts = along(y.shape[2])[:, :, None] * along(y.shape[3])[:, None, :]
    return counts.reciprocal()[:, None, None]


def _box_sum(y: Tensor, size: int) -> Tensor:
    """Sums over windows of size x size pixels, by two depthwise convolutions with ones.

    On the CPU those are vectorised over channels, average pools are not.
    """
    channels = y.shape[1]
    across = y.new_ones((channels, 1, 1, size))
    y = F.conv2d(y, across, padding=(0, size // 2), groups=channels)
    return F.conv2d(y, across.mT, padding=(size // 2, 0), groups=channels)


def _add_pools(y: Tensor, transposed: bool = False) -> Tensor:
    """A map plus its three average pools, or plus the transposes of the pools."""
    out = y
    for size, scale in zip(_POOLS, _inverse_counts(y), strict=True):
        if transposed:
            out = out + _box_sum(y * scale, size)
        else:
            out = torch.addcmul(out, _box_sum(y, size), scale)
    return out


def _torch_forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    batch = x.shape[0]
    if batch == 0:
        return x.new_empty(x.shape)
    images = max(1, _CACHED_BYTES // (4 * x[0].numel()))
    if torch.compiler.is_compiling() or images >= batch:
        return _mix(x, weight, bias, height, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for i in range(0, batch, images):
        out[i : i + images] = _mix(x[i : i + images], weight, bias, height, width)
    return out


def _mix(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    dtype = statistics_dtype(x)
    with without_autocast(x.device.type):
        y = to_map(x.to(dtype), height, width)
        y = _add_pools(_convolution(y, weight.to(dtype), bias.to(dtype)))
    return as_result(to_tokens(y), x.dtype)


def _torch_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if x.shape[0] == 0:
        return (
            x.new_empty(x.shape) if needs_dx else dx,
            weight.new_zeros(weight.shape) if needs_dweight else dweight,
            weight.new_zeros(weight.shape[0]) if needs_dbias else dbias,
        )
    dtype, channels = statistics_dtype(x), x.shape[-1]
    with without_autocast(x.device.type):
        dy = _add_pools(to_map(grad_out.to(dtype), height, width), transposed=True)
        if needs_dx:
            flipped = weight.to(dtype).flip(2, 3)
            dx = to_tokens(_convolution(dy, flipped, None)).to(x.dtype).contiguous()
        if needs_dweight:
            # Of its three gradients the other two are faster by themselves.
            dweight = torch.ops.aten.convolution_backward(
                dy, to_map(x.to(dtype), height, width), weight.to(dtype), None,
                [1, 1], [3, 3], [1, 1], False, [0, 0], channels, [False, True, False],
            )[1].to(weight.dtype).contiguous()  # fmt: skip
        if needs_dbias:
            dbias = dy.sum((0, 2, 3)).to(weight.dtype)
    return dx, dweight, dbias


def _fake_forward(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, height: int, width: int, *needs: bool
) -> tuple[Tensor, ...]:
    return empty_gradients((x, weight, weight[:, 0, 0, 0]), needs)


_FORWARD = register(
    "pooling_mixer_fwd",
    "(Tensor x, Tensor weight, Tensor bias, SymInt height, SymInt width) -> Tensor",
    kernels="pooling_mixer",
    torch=_torch_forward,
    fake=_fake_forward,
    flops=lambda x, weight, *_: 2 * prod(x) * prod(weight[1:]),
)
_BACKWARD = register(
    "pooling_mixer_bwd",
    "(Tensor grad_out, Tensor x, Tensor weight, SymInt height, SymInt width, "
    "bool needs_dx, bool needs_dweight, bool needs_dbias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    kernels="pooling_mixer",
    torch=_torch_backward,
    fake=_fake_backward,
    flops=lambda _, x, weight, *others: 2 * prod(x) * prod(weight[1:]) * sum(others[-3:-1]),
)


def _with_gradients(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    def without_bias(grad_out: Tensor, x: Tensor, weight: Tensor, _: Tensor, *others: Any) -> Any:
        # The value of bias is not needed; the double backward asks where its gradient belongs.
        return backward(grad_out, x, weight, *others)

    return differentiable(
        forward, without_bias, reference.pooling_mixer, name="PoolingMixer", tensors=3
    )


_TRITON = _with_gradients(_FORWARD, _BACKWARD)
_TORCH = _with_gradients(_torch_forward, _torch_backward)

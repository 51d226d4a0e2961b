"""Tokens and channels-last maps are the same memory; these views say so, of memory that stock
operators can read."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ._registry import needs_grad

_WIDTH = 8
"""Of the map that `linear` makes of tokens; the convolutions are slow on very narrow ones."""

_MIN_PRODUCTS = 2**24
"""Smaller products lose more by the detour over a convolution than they gain."""

_MIN_PRODUCTS_WITH_GRADIENTS = 2**25
"""The same with gradients, whose backward takes two more detours."""


def _wide_vectors_are_for_convolutions() -> bool:
    """Whether this is an AMD processor with AVX-512.

    MKL, which multiplies matrices for PyTorch, keeps its code for AVX-512 to processors of Intel;
    oneDNN, which convolves, asks the processor. Measured (two threads, fp32, time of the matrix
    product over that of the convolution): 0.4 to 1.0 forward and 0.4 to 0.9 in a step on Sapphire
    Rapids, but for 32 to 128 channels forward (1.3); 1.1 to 2.0 and 1.0 to 1.4 from `_MIN_PRODUCTS`
    on where MKL is held to AVX2, the width of vectors an AMD EPYC gets; 0.6 to 1.0 where both are.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    with info.open() as lines:
        return "AuthenticAMD" in lines.readline() + lines.readline()


_WIDE_CONVOLUTIONS = _wide_vectors_are_for_convolutions()


def convolutions_lead() -> bool:
    """Whether 1x1 convolutions in fp32 can beat matrix products on this CPU."""
    # With a single thread PyTorch leaves 1x1 convolutions to the other library anyway.
    if not _WIDE_CONVOLUTIONS or torch.get_num_threads() == 1:
        return False
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def worth_convolving(products: int, training: bool) -> bool:
    """Whether a 1x1 convolution in fp32 with so many products beats the matrix product; training:
    with gradients."""
    least = _MIN_PRODUCTS_WITH_GRADIENTS if training else _MIN_PRODUCTS
    return products >= least and convolutions_lead()


def separate(x: Tensor) -> Tensor:
    """x, or a copy if its elements might share memory, as those of sliding windows and of expanded
    tensors do.

    Attention, convolution and GELU of the libraries below PyTorch take strides for those of a
    matrix: of others they read outside, or refuse them.
    """
    if x.is_contiguous():
        return x
    # Of any two dimensions one strides over all of the other. (The compiler cannot sort them.)
    dims = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for i, (stride, size) in enumerate(dims):
        if stride == 0:
            return x.contiguous()
        for other, n in dims[:i]:
            if stride < other * n and other < stride * size:
                return x.contiguous()
    return x


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[..., L, C]` -> map `[..., C, height, width]` in channels-last memory, without a copy
    if they are `separate`."""
    # The method of a tensor does the same, but asks for names of dimensions first.
    return torch.unflatten(separate(x), -2, (height, width)).movedim(-1, -3)


def to_tokens(x: Tensor) -> Tensor:
    """Map `[..., C, H, W]` -> tokens `[..., H * W, C]`; a view if its memory is channels-last."""
    return x.movedim(-3, -1).flatten(-3, -2)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """`F.linear` over channels: x `[B, C, H, W]`, weight `[D, C / groups]`, bias `[D]` ->
    `[B, D, H, W]`."""
    return F.conv2d(x, weight[:, :, None, None], bias, groups=groups)


def conv_weight_gradient(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of a convolution that keeps the size of the map.

    weight: `[D, C / groups, k, k]`, or `[D, C / groups]` of `pointwise_conv`; so is what returns.
    """
    taps = weight if weight.dim() == 4 else weight[:, :, None, None]
    groups = x.shape[1] // weight.shape[1]
    pad = [taps.shape[-1] // 2] * 2
    grad = torch.ops.aten.convolution_backward(
        grad_out, x, taps, None, [1, 1], pad, [1, 1], False, [0, 0], groups, [False, True, False]
    )[1]
    return grad.reshape(weight.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on tokens: x `[B, L, C]`, weight `[D, C]`, bias `[D]` -> `[B, L, D]`.

    On the CPU, where that is faster, a product in fp32 is a 1x1 convolution. Any width of the map
    will do but a very small one.
    """
    stock = not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling()
    if stock or not worth_convolving(x.numel() * weight.shape[0], needs_grad(x, weight)):
        return F.linear(x, weight, bias)
    if x.shape[1] % _WIDTH or not x.is_contiguous():
        return F.linear(x, weight, bias)
    return to_tokens(pointwise_conv(to_map(x, x.shape[1] // _WIDTH, _WIDTH), weight, bias))

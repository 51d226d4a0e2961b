"""Tokens and channels-last maps are the same memory; these views say so, of memory that stock
operators can read."""

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 8


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
    """Tokens `[B, L, C]` -> map `[B, C, height, width]` in channels-last memory, without a copy
    if they are `separate`."""
    x = separate(x)
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Map `[B, C, H, W]` -> tokens `[B, H * W, C]`; no copy if its memory is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


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

    On the CPU a 1x1 convolution in fp32 is up to twice as fast as the matrix product, forward and
    backward: it is another library's, which also adds the bias on the way. Any width of the map
    will do but a very small one.
    """
    stock = not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling()
    if stock or x.shape[1] % _WIDTH or not x.is_contiguous():
        return F.linear(x, weight, bias)
    return to_tokens(pointwise_conv(to_map(x, x.shape[1] // _WIDTH, _WIDTH), weight, bias))

"""Mix-FFN: linear, 3x3 depthwise convolution, GELU, linear, without the wide tensors in between."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._layout import (
    conv_weight_gradient,
    linear,
    pointwise_conv,
    to_map,
    to_tokens,
    worth_convolving,
)
from ._math import statistics_dtype
from ._registry import autocast, differentiable, needs_grad, without_autocast
from .depthwise_conv_gelu import run as run_depthwise

_HIDDEN_BYTES = 6 * 2**20
"""Size of the hidden features that the CPU works on at a time; they stay in its caches. Up to this
size a forward takes all of them. With bands of 3 MiB it took 1.0 to 1.3 times as long."""

_WHOLE_BYTES = 32 * 2**20 - 1
"""Up to this size the CPU keeps all of them for the backward: computing them again would cost more
(bands took 1.0 to 1.8 times as long). From 32 MiB on glibc asks the system for the memory of every
tensor anew, and page faults cost more than products (bands were 1.1 to 2 times as fast)."""

_MIN_SINGLE_BYTES = 2**19
"""From this size on a single image of others gains by a better memory format, see `gains`."""

_MIN_ROWS = 8
"""A band of an image has at least so many rows: up to two before and after are computed twice."""


def mix_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    height: int,
    width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """`fc2(gelu(conv(fc1(x))))` with a 3x3 depthwise convolution on the hidden channels.

    x: `[B, L, C]` tokens with L = height * width in row-major order; float32, float16 or bfloat16
        (float64 on the torch and reference backends); any strides.
    fc1_weight `[E, C]`, fc1_bias `[E]`, dw_weight `[E, 1, 3, 3]`, dw_bias `[E]`, fc2_weight
        `[D, E]`, fc2_bias `[D]`: all in the dtype and on the device of x.
    backend: "triton", "torch", "reference", "auto"; None takes the current default.

    Returns `[B, L, D]` in the dtype of x. On a GPU this is two matrix products of the vendor around
    `depthwise_conv_gelu`. On the CPU, if the hidden features take more than 6 MiB, or 32 MiB with
    gradients, it runs over bands of the image whose share fits into the caches, forward and
    backward; the backward computes them again, so that nothing but the inputs is saved. Under
    autocast all inputs are cast to its dtype. Raises TypeError or ValueError naming the argument.
    Source: SegFormer (arXiv 2105.15203), equation 3.
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[B, L, C]")
    _checks.check_tokens("x", x, height, width)
    x, *parameters = autocast(x, fc1_weight, fc1_bias, dw_weight, dw_bias, fc2_weight, fc2_bias)
    _check(x, *parameters)
    chosen = _backend.resolve("mix_ffn", backend, x.device, x)
    if chosen == "reference":
        return reference.mix_ffn(x, *parameters, height, width)
    # Bands would only hide from a compiler what belongs together.
    if chosen == "torch" and not torch.compiler.is_compiling():
        training = needs_grad(x, *parameters)
        if _is_large(x, parameters[0].shape[0], training) and _checks.has_values(x):
            return _BANDED(x, *parameters, height, width)
    fc1_weight, fc1_bias, dw_weight, dw_bias, fc2_weight, fc2_bias = parameters
    with without_autocast(x.device.type):
        hidden = linear(x, fc1_weight, fc1_bias)
        hidden = run_depthwise(chosen, hidden, dw_weight, dw_bias, height, width)
        return linear(hidden, fc2_weight, fc2_bias)


def _check(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> None:
    _checks.check_tensor("fc1_weight", fc1_weight, _checks.FLOATING, "[E, C]")
    _checks.check_tensor("fc2_weight", fc2_weight, _checks.FLOATING, "[D, E]")
    hidden = fc1_weight.shape[0]
    for label, size, where in (
        ("C", x.shape[-1], "x"),
        ("E", hidden, "fc1_weight"),
        ("D", fc2_weight.shape[0], "fc2_weight"),
    ):
        if size < 1:
            raise ValueError(f"{where} must have {label} >= 1; got {label} = {size}")
    _checks.check_shape("fc1_weight", fc1_weight, (hidden, x.shape[-1]), "[E, C]")
    _checks.check_shape("fc1_bias", fc1_bias, (hidden,), "[E]")
    _checks.check_shape("dw_weight", dw_weight, (hidden, 1, 3, 3), "[E, 1, 3, 3]")
    _checks.check_shape("dw_bias", dw_bias, (hidden,), "[E]")
    _checks.check_shape("fc2_weight", fc2_weight, (fc2_weight.shape[0], hidden), "[D, E]")
    _checks.check_shape("fc2_bias", fc2_bias, (fc2_weight.shape[0],), "[D]")
    _checks.check_same(
        x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, dw_weight=dw_weight, dw_bias=dw_bias,
        fc2_weight=fc2_weight, fc2_bias=fc2_bias,
    )  # fmt: skip


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return _backend.triton_reasons(x)


_backend.register_reasons("mix_ffn", _reasons)


def gains(x: Tensor, dw_weight: Tensor) -> bool:
    """Whether `mix_ffn` of x `[B, L, C]` is faster than the operators it is made of, one by one.

    If not, all it adds are checks and choices: a tenth or two of the time of small inputs. Of a
    single image the view as a map that other code makes of tokens is not in channels-last memory
    for PyTorch, and what follows up to twice as slow.
    """
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return True
    hidden, training = dw_weight.shape[0], needs_grad(x, dw_weight)
    if _is_large(x, hidden, training):
        return True
    if x.shape[0] == 1 and _hidden_bytes(x, hidden) >= _MIN_SINGLE_BYTES:
        return True
    if worth_convolving(x.numel() * hidden, training):
        return True
    return _backend.resolve("mix_ffn", None, x.device, x) != "torch"


def _hidden_bytes(x: Tensor, hidden: int) -> int:
    return x.shape[0] * x.shape[1] * hidden * x.element_size()


def _is_large(x: Tensor, hidden: int, training: bool) -> bool:
    return _hidden_bytes(x, hidden) > (_WHOLE_BYTES if training else _HIDDEN_BYTES)


def _bands(batch: int, height: int, row_bytes: int) -> Iterator[tuple[slice, range]]:
    """Images and rows to work on together: several whole images, or a band of one image."""
    rows = max(_MIN_ROWS, _HIDDEN_BYTES // row_bytes)
    images = max(1, rows // height)
    images = -(-batch // -(-batch // images)) if batch else 1
    rows = -(-height // -(-height // rows))
    for i in range(0, batch, images):
        for r in range(0, height, rows):
            yield slice(i, min(i + images, batch)), range(r, min(r + rows, height))


def _widened(rows: range, by: int, height: int) -> range:
    """The rows with up to `by` more on both sides, within the image."""
    return range(max(rows.start - by, 0), min(rows.stop + by, height))


def _rows(x: Tensor, rows: range, origin: int = 0) -> Tensor:
    """Rows of a map whose first row is row `origin` of the image."""
    return x[:, :, rows.start - origin : rows.stop - origin]


def _band(x: Tensor, images: slice, rows: range, width: int) -> Tensor:
    """Rows of some images of tokens `[B, L, C]`, as a map in channels-last memory."""
    tokens = x[images, rows.start * width : rows.stop * width]
    return to_map(tokens.contiguous(), len(rows), width)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=weight.shape[0])


def _gelu(x: Tensor) -> Tensor:
    # On what is contiguous it is up to twice as fast as on a channels-last map.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _gelu_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    grad_out, x = (t.permute(0, 2, 3, 1) for t in (grad_out, x))
    return torch.ops.aten.gelu_backward(grad_out, x).permute(0, 3, 1, 2)


def _put(out: Tensor, images: slice, rows: range, width: int, band: Tensor) -> None:
    out[images, rows.start * width : rows.stop * width] = to_tokens(band)


def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    height: int,
    width: int,
) -> Tensor:
    out = x.new_empty((*x.shape[:2], fc2_weight.shape[0]))
    row_bytes = width * fc1_weight.shape[0] * x.element_size()
    with without_autocast("cpu"):
        for images, rows in _bands(x.shape[0], height, row_bytes):
            near = _widened(rows, 1, height)
            hidden = pointwise_conv(_band(x, images, near, width), fc1_weight, fc1_bias)
            hidden = _rows(_depthwise(hidden, dw_weight, dw_bias), rows, near.start)
            hidden = _gelu(hidden)
            _put(out, images, rows, width, pointwise_conv(hidden, fc2_weight, fc2_bias))
    return out


def _backward(
    grad_out: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    height: int,
    width: int,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and the six parameters; None for those not needed."""
    parameters = (fc1_weight, fc1_bias, dw_weight, dw_bias, fc2_weight)
    # Sums over bands are added up in fp32 at least.
    wide = statistics_dtype(x)
    sums = [p.new_zeros(p.shape, dtype=wide) if n else None
            for p, n in zip(parameters, needs[1:], strict=False)]  # fmt: skip
    d_fc1, d_fc1_bias, d_dw, d_dw_bias, d_fc2 = sums
    d_fc2_bias = grad_out.sum((0, 1), dtype=wide) if needs[6] else None
    dx = x.new_empty(x.shape) if needs[0] else None
    fc1_back, fc2_back = (w.t().contiguous() for w in (fc1_weight, fc2_weight))
    flipped = dw_weight.flip(2, 3)
    row_bytes = width * fc1_weight.shape[0] * x.element_size()
    needs_dhidden = any(needs[:3])
    with without_autocast("cpu"):
        for images, rows in _bands(x.shape[0], height, row_bytes):
            # The gradient of a row comes from the rows beside it, and what those are made of from
            # the rows beside them.
            near, far = _widened(rows, 1, height), _widened(rows, 2, height)
            hidden = pointwise_conv(_band(x, images, far, width), fc1_weight, fc1_bias)
            u = _rows(_depthwise(hidden, dw_weight, dw_bias), near, far.start)
            grad = _band(grad_out, images, near, width)
            own_grad = _rows(grad, rows, near.start)
            if d_fc2 is not None:
                activated = _gelu(_rows(u, rows, near.start))
                d_fc2 += conv_weight_gradient(own_grad, activated, fc2_weight)
            du = _gelu_backward(pointwise_conv(grad, fc2_back, None), u)
            if d_dw_bias is not None:
                d_dw_bias += _rows(du, rows, near.start).sum((0, 2, 3), dtype=wide)
            if needs_dhidden:
                dhidden = _rows(_depthwise(du, flipped, None), rows, near.start)
                if d_fc1_bias is not None:
                    d_fc1_bias += dhidden.sum((0, 2, 3), dtype=wide)
                if d_fc1 is not None:
                    own = _band(x, images, rows, width)
                    d_fc1 += conv_weight_gradient(dhidden, own, fc1_weight)
                if dx is not None:
                    _put(dx, images, rows, width, pointwise_conv(dhidden, fc1_back, None))
            if d_dw is not None:
                # What the rows beside contribute belongs to other bands.
                du[:, :, : rows.start - near.start] = 0
                du[:, :, rows.stop - near.start :] = 0
                d_dw += conv_weight_gradient(du, _rows(hidden, near, far.start), dw_weight)
    grads = (d_fc1, d_fc1_bias, d_dw, d_dw_bias, d_fc2, d_fc2_bias)
    return dx, *(None if g is None else g.to(x.dtype) for g in grads)


_BANDED = differentiable(
    _forward, _backward, reference.mix_ffn, name="MixFFN", tensors=7, loops=True
)

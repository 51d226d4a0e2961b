"""The gate of the self-guided module: reweight the branches and fuse them in one pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._registry import (
    Function,
    as_result,
    by_reference,
    needs_grad,
    only_needed,
    reference_gradients,
    register,
)

MAX_MODALITIES = 8


def guided_gate(
    x: Tensor,
    logits: Tensor,
    *,
    present: Tensor | None = None,
    rho: float = 0.5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over present modalities, reweighted branches and the fused map.

    x: `[M, B, L, C]` tokens, floating, M and C >= 1, any strides. logits: `[M, B, C]` fp32 (fp64
    for fp64 x), on the device of x. present: `[M, B]` bool, None for all; an absent modality is
    never read, and its branch and gradients are zero.
    rho: strength of the reweighting, 0 leaves the branches as they are.
    backend: "triton" (M <= 8), "torch", "reference", "auto"; None takes the current default.

    Returns branches `[M, B, L, C]` and fused `[B, L, C]` in the dtype of x. With
    `g = softmax(logits over present m)` and K present modalities: `branch_m = x_m (1 + rho (K g_m
    - 1))`, `fused = sum_m g_m x_m`, in fp32 with one rounding. An image without any present
    modality has no weights: its outputs are NaN. The least to move: read x, write both outputs
    (3 FLOP per element); backward reads x and both gradients, writes one (8 FLOP). The backward is
    deterministic. Autocast changes nothing: x keeps its dtype. Raises TypeError or ValueError
    naming the argument. Source: our reading of the self-guided module of EQUISeg
    (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tensor("logits", logits, (reference.statistics_dtype(x),), "[M, B, C]")
    modalities, batch, _, channels = x.shape
    if modalities < 1 or channels < 1:
        raise ValueError(f"x must have at least one modality and channel; got {list(x.shape)}")
    _checks.check_shape("logits", logits, (modalities, batch, channels), "[M, B, C]")
    _checks.check_same_device(x=x, logits=logits)
    _checks.check_present(present, x)
    rho = _checks.number("rho", rho)
    chosen = _backend.resolve("guided_gate", backend, x.device, x)
    if chosen == "reference":
        return reference.guided_gate(x, logits, present=present, rho=rho)
    stock = chosen == "torch"
    if needs_grad(x, logits):
        return _GuidedGate.apply(x, logits, present, rho, stock)
    return (_stock_forward if stock else _FORWARD)(x, logits, present, rho)


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    reasons = _backend.triton_reasons(x)
    if x.shape[0] > MAX_MODALITIES:
        reasons.append(f"{x.shape[0]} modalities are more than {MAX_MODALITIES}")
    return reasons


_backend.register_reasons("guided_gate", _reasons)


def _weights(
    logits: Tensor, present: Tensor | None, rho: float
) -> tuple[Tensor, Tensor, Tensor | float]:
    """g, the factor of the branches, and its derivative by g; they broadcast over x."""
    g = reference.gate_weights(logits, present=present)[:, :, None]
    number = len(logits) if present is None else present.sum(dim=0)[:, None, None].to(g.dtype)
    return g, 1 + rho * (number * g - 1), rho * number


def _stock_forward(
    x: Tensor, logits: Tensor, present: Tensor | None, rho: float
) -> tuple[Tensor, Tensor]:
    """No temporary of the size of x, which costs more than the arithmetic."""
    g, factor, _ = _weights(logits, present, rho)
    if present is not None:
        x = x.masked_fill(~present[:, :, None, None], 0.0)
    branches = as_result(x * factor, x.dtype)
    fused = x[0] * g[0]
    # For the compiler, which knows better, see `as_result`.
    add_product = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
    for one, weight in zip(x[1:], g[1:], strict=True):
        fused = add_product(fused, one.to(fused.dtype), weight)
    return branches, as_result(fused, x.dtype)


def _stock_backward(
    grad_branches: Tensor | None,
    grad_fused: Tensor | None,
    x: Tensor,
    logits: Tensor,
    present: Tensor | None,
    rho: float,
    needs_dx: bool,
    needs_dlogits: bool,
) -> tuple[Tensor, Tensor]:
    g, factor, gain = _weights(logits, present, rho)
    absent = None if present is None else ~present[:, :, None, None]
    zero = g.new_zeros(())
    grad_branches = zero.expand(x.shape) if grad_branches is None else grad_branches.to(g.dtype)
    grad_fused = zero if grad_fused is None else grad_fused.to(g.dtype)
    dx, dlogits = x.new_empty(0), logits.new_empty(0)
    if needs_dx:
        dx = (grad_branches * factor).addcmul_(grad_fused, g)
        if absent is not None:
            dx = dx.masked_fill(absent, 0.0)
        dx = dx.to(x.dtype).contiguous()
    if needs_dlogits:
        dg = (grad_branches * gain).add_(grad_fused).mul_(x).sum(dim=2)
        if absent is not None:
            dg, g = dg.masked_fill(absent[:, :, 0], 0.0), g.masked_fill(absent, 0.0)
        g = g[:, :, 0]
        dlogits = (g * (dg - (g * dg).sum(dim=0))).contiguous()
    return dx, dlogits


def _fake_forward(
    x: Tensor, logits: Tensor, present: Tensor | None, rho: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:])


def _fake_backward(
    grad_branches: Tensor | None,
    grad_fused: Tensor | None,
    x: Tensor,
    logits: Tensor,
    present: Tensor | None,
    rho: float,
    needs_dx: bool,
    needs_dlogits: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        logits.new_empty(logits.shape if needs_dlogits else (0,)),
    )


_FORWARD = register(
    "guided_gate_fwd",
    "(Tensor x, Tensor logits, Tensor? present, float rho) -> (Tensor branches, Tensor fused)",
    kernels="guided_gate",
    stock=_stock_forward,
    fake=_fake_forward,
)
_BACKWARD = register(
    "guided_gate_bwd",
    "(Tensor? grad_branches, Tensor? grad_fused, Tensor x, Tensor logits, Tensor? present, "
    "float rho, bool needs_dx, bool needs_dlogits) -> (Tensor dx, Tensor dlogits)",
    kernels="guided_gate",
    stock=_stock_backward,
    fake=_fake_backward,
)


class _GuidedGate(Function):
    """Autograd over the registered operations, or (`stock`) over stock operators directly; saves
    only its inputs. Double backward through the reference."""

    @staticmethod
    def forward(
        x: Tensor, logits: Tensor, present: Tensor | None, rho: float, stock: bool
    ) -> tuple[Tensor, Tensor]:
        return (_stock_forward if stock else _FORWARD)(x, logits, present, rho)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, logits, present, ctx.rho, ctx.stock = inputs
        ctx.save_for_backward(x, logits, present)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_branches: Tensor | None, grad_fused: Tensor | None) -> Any:
        x, logits, present = ctx.saved_tensors
        if grad_branches is None and grad_fused is None:
            return None, None, None, None, None
        if by_reference(grad_branches, grad_fused):
            grads = reference_gradients(
                partial(reference.guided_gate, present=present, rho=ctx.rho),
                (x, logits),
                (grad_branches, grad_fused),
                ctx.needs_input_grad[:2],
            )
        else:
            grads = (_stock_backward if ctx.stock else _BACKWARD)(
                grad_branches, grad_fused, x, logits, present, ctx.rho, *ctx.needs_input_grad[:2]
            )
        return *only_needed(grads, ctx.needs_input_grad[:2]), None, None, None

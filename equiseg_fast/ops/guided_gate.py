"""The gate of the self-guided module: reweight the branches and fuse them in one pass."""

import torch
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._math import gate_weights, statistics_dtype
from ._registry import as_result, differentiable, empty_gradients, register

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
    modality has no weights: its outputs are NaN. Minimum traffic: read x, write both outputs
    (3 FLOP per element); backward reads x and both gradients, writes one (8 FLOP). The backward is
    deterministic. Autocast changes nothing: x keeps its dtype. Raises TypeError or ValueError
    naming the argument. Source: our reading of the self-guided module of EQUISeg
    (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tensor("logits", logits, (statistics_dtype(x),), "[M, B, C]")
    modalities, batch, _, channels = x.shape
    if modalities < 1 or channels < 1:
        raise ValueError(f"x must have at least one modality and channel; got {list(x.shape)}")
    _checks.check_shape("logits", logits, (modalities, batch, channels), "[M, B, C]")
    _checks.check_same_device(x=x, logits=logits)
    _checks.check_present(present, x)
    rho = _checks.number("rho", rho)
    chosen = _backend.resolve("guided_gate", backend, x.device, x)
    if chosen == "reference":
        return _reference(x, logits, present, rho)
    return (_TORCH if chosen == "torch" else _TRITON)(x, logits, present, rho)


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
    g = gate_weights(logits, present=present)[:, :, None]
    number = len(logits) if present is None else present.sum(dim=0)[:, None, None].to(g.dtype)
    return g, 1 + rho * (number * g - 1), rho * number


def _torch_forward(
    x: Tensor, logits: Tensor, present: Tensor | None, rho: float
) -> tuple[Tensor, Tensor]:
    """No temporary of the size of x, which costs more than the arithmetic."""
    g, factor, _ = _weights(logits, present, rho)
    if present is not None:
        x = x.masked_fill(~present[:, :, None, None], 0.0)
    branches = as_result(x * factor, x.dtype)
    fused = x[0] * g[0]
    # Out of place under torch.compile; see `as_result`.
    add_product = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
    for one, weight in zip(x[1:], g[1:], strict=True):
        fused = add_product(fused, one.to(fused.dtype), weight)
    return branches, as_result(fused, x.dtype)


def _torch_backward(
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


def _fake_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:])


def _fake_backward(
    grad_branches: object,
    grad_fused: object,
    x: Tensor,
    logits: Tensor,
    present: object,
    rho: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    return empty_gradients((x, logits), needs)


_FORWARD = register(
    "guided_gate_fwd",
    "(Tensor x, Tensor logits, Tensor? present, float rho) -> (Tensor branches, Tensor fused)",
    kernels="guided_gate",
    torch=_torch_forward,
    fake=_fake_forward,
)
_BACKWARD = register(
    "guided_gate_bwd",
    "(Tensor? grad_branches, Tensor? grad_fused, Tensor x, Tensor logits, Tensor? present, "
    "float rho, bool needs_dx, bool needs_dlogits) -> (Tensor dx, Tensor dlogits)",
    kernels="guided_gate",
    torch=_torch_backward,
    fake=_fake_backward,
)


def _reference(
    x: Tensor, logits: Tensor, present: Tensor | None, rho: float
) -> tuple[Tensor, Tensor]:
    return reference.guided_gate(x, logits, present=present, rho=rho)


_TRITON, _TORCH = (
    differentiable(*functions, _reference, name="GuidedGate", tensors=2, outputs=2, saves=3)
    for functions in ((_FORWARD, _BACKWARD), (_torch_forward, _torch_backward))
)

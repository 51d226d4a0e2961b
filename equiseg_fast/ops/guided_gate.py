"""The gate of the self-guided module: reweight the branches and fuse them in one pass."""

from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks


def guided_gate(
    x: Tensor,
    logits: Tensor,
    *,
    present: Tensor | None = None,
    rho: float = 0.5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over present modalities, reweighted branches and the fused map.

    x: `[M, B, L, C]` tokens, floating. logits: `[M, B, C]` fp32 (fp64 for fp64 x), on the device
    of x. present: `[M, B]` bool, None for all; an absent modality is never read and its branch is
    zero. rho: strength of the reweighting, 0 leaves the branches as they are.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns branches `[M, B, L, C]` and fused `[B, L, C]` in the dtype of x. With
    `g = softmax(logits over present m)` and K present modalities: `branch_m = x_m (1 + rho (K g_m
    - 1))`, `fused = sum_m g_m x_m`. Weights are fp32 also under autocast. Raises TypeError or
    ValueError naming the argument. Source: our reading of the self-guided module of EQUISeg
    (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tensor("logits", logits, (reference.statistics_dtype(x),), "[M, B, C]")
    modalities, batch, _, channels = x.shape
    _checks.check_shape("logits", logits, (modalities, batch, channels), "[M, B, C]")
    _checks.check_same_device(x=x, logits=logits)
    _checks.check_present(present, x)
    _backend.resolve("guided_gate", backend, x.device, _reasons(x))
    return reference.guided_gate(x, logits, present=present, rho=rho)


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(x), _backend.NO_KERNEL]


_backend.register_reasons("guided_gate", _reasons)

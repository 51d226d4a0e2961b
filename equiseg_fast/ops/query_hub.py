"""Self-query hub of all primaries at once: score, self-gate, leave-one-out maximum."""

from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._registry import autocast

MAX_MODALITIES = 8


def query_hub(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    height: int,
    width: int,
    *,
    present: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """For every primary modality the maximum over the *other* present ones, after self-gating.

    x: `[M, B, L, C]` tokens with L = height * width, floating, M = 1..8.
    dw_weight: `[M, C, 3, 3]`, dw_bias: `[M, C]`, pw_weight: `[M, C]`, pw_bias: `[M]`: one score
        net per modality, in the dtype and on the device of x.
    present: `[M, B]` bool, None for all; an absent modality is never read.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns `[M, B, L, C]`: `t_m = (1 + sigmoid(pw_m(dw_m(x_m)))) x_m`, then for primary i the
    elementwise maximum of `t_m` over present m != i, zero where there is none. A tie sends its
    gradient to the lowest modality. Under autocast the inputs are cast to its dtype. Raises
    TypeError or ValueError naming the argument. Source: CMNeXt (arXiv 2303.01480), section 3.2;
    un-primed sources as in EQUISeg (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tokens("x", x, height, width)
    modalities, _, _, channels = x.shape
    if not 1 <= modalities <= MAX_MODALITIES:
        raise ValueError(f"x must have 1 to {MAX_MODALITIES} modalities; got shape {list(x.shape)}")
    weights = autocast(x, dw_weight, dw_bias, pw_weight, pw_bias)
    x, dw_weight, dw_bias, pw_weight, pw_bias = weights
    _checks.check_shape("dw_weight", dw_weight, (modalities, channels, 3, 3), "[M, C, 3, 3]")
    _checks.check_shape("dw_bias", dw_bias, (modalities, channels), "[M, C]")
    _checks.check_shape("pw_weight", pw_weight, (modalities, channels), "[M, C]")
    _checks.check_shape("pw_bias", pw_bias, (modalities,), "[M]")
    _checks.check_same(
        x=x, dw_weight=dw_weight, dw_bias=dw_bias, pw_weight=pw_weight, pw_bias=pw_bias
    )
    _checks.check_present(present, x)
    _backend.resolve("query_hub", backend, x.device, _reasons(x))
    return reference.query_hub(*weights, height, width, present=present)


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(x), _backend.NO_KERNEL]


_backend.register_reasons("query_hub", _reasons)

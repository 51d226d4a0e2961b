"""Self-query hub of all primaries at once: score, self-gate, leave-one-out maximum."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks
from ._math import all_present, has_others, statistics_dtype
from ._registry import (
    as_result,
    autocast,
    differentiable,
    empty_gradients,
    register,
    without_autocast,
)

MAX_MODALITIES = 8
_NOBODY = 15
"""Stands for no modality in the winners, `winner + 16 * runner-up`."""


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

    x: `[M, B, L, C]` tokens with L = height * width, M = 1..8, any strides; float32, float16 or
        bfloat16 (float64 on the torch and reference backends).
    dw_weight: `[M, C, 3, 3]`, dw_bias: `[M, C]`, pw_weight: `[M, C]`, pw_bias: `[M]`: one score
        net per modality, in the dtype and on the device of x.
    present: `[M, B]` bool, None for all; an absent modality is never read.
    backend: "triton", "torch", "reference", "auto"; None takes the current default.

    Returns `[M, B, L, C]` in the dtype of x: `t_m = (1 + sigmoid(pw_m(dw_m(x_m)))) x_m`, then for
    primary i the elementwise maximum of `t_m` over present m != i, zero where there is none. Scores
    and comparisons are fp32 (fp64 for fp64). A tie sends its gradient to the lowest modality; the
    backward is deterministic. Minimum traffic is x and the result, in the backward also
    the two gradients; about 25 FLOP per element forward, 65 backward. Under autocast the inputs are
    cast to its dtype. Raises TypeError or ValueError naming the argument on bad input. Source:
    CMNeXt (arXiv 2303.01480), section 3.2; un-primed sources as in EQUISeg (arXiv 2509.24505).
    """
    _checks.check_tensor("x", x, _checks.FLOATING, "[M, B, L, C]")
    _checks.check_tokens("x", x, height, width)
    modalities, _, _, channels = x.shape
    if not 1 <= modalities <= MAX_MODALITIES:
        raise ValueError(f"x must have 1 to {MAX_MODALITIES} modalities; got shape {list(x.shape)}")
    if channels < 1:
        raise ValueError(f"x must have at least one channel; got shape {list(x.shape)}")
    nets = autocast(x, dw_weight, dw_bias, pw_weight, pw_bias)
    x, dw_weight, dw_bias, pw_weight, pw_bias = nets
    _checks.check_shape("dw_weight", dw_weight, (modalities, channels, 3, 3), "[M, C, 3, 3]")
    _checks.check_shape("dw_bias", dw_bias, (modalities, channels), "[M, C]")
    _checks.check_shape("pw_weight", pw_weight, (modalities, channels), "[M, C]")
    _checks.check_shape("pw_bias", pw_bias, (modalities,), "[M]")
    _checks.check_same(
        x=x, dw_weight=dw_weight, dw_bias=dw_bias, pw_weight=pw_weight, pw_bias=pw_bias
    )
    _checks.check_present(present, x)
    chosen = _backend.resolve("query_hub", backend, x.device, x)
    if chosen == "reference":
        return reference.query_hub(*nets, height, width, present=present)
    return (_TORCH if chosen == "torch" else _TRITON)(*nets, present, height, width)[0]


def _reasons(x: Tensor, *_: object, **__: object) -> _backend.Reasons:
    reasons = _backend.triton_reasons(x)
    if x.shape[2] >= 2**31:
        reasons.append(f"{x.shape[2]} tokens exceed 32 bits")
    return reasons


_backend.register_reasons("query_hub", _reasons)


def _merge(
    dw_weight: Tensor, dw_bias: Tensor, pw_weight: Tensor, pw_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The score nets as one 3x3 convolution to one channel: weight `[M, 9, C]`, bias `[M]`.

    A depthwise convolution followed by a 1x1 convolution is linear. In fp32: products of a narrow
    and a wide tensor are wide.
    """
    factor = pw_weight.to(statistics_dtype(pw_weight))
    taps = dw_weight.flatten(2).transpose(1, 2) * factor[:, None]
    return taps.contiguous(), (dw_bias * factor).sum(1) + pw_bias


def _split(
    dweight: Tensor, dbias: Tensor, dw_weight: Tensor, dw_bias: Tensor, pw_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the four parameters of the score nets from those of the merged two."""
    dtype, factor = pw_weight.dtype, pw_weight.to(dweight.dtype)
    column = dbias[:, None]
    d_dw = (dweight * factor[:, None]).transpose(1, 2).unflatten(2, (3, 3))
    d_pw = (dweight * dw_weight.flatten(2).transpose(1, 2)).sum(1).addcmul_(column, dw_bias)
    return d_dw.to(dtype), (column * factor).to(dtype), d_pw.to(dtype), dbias.to(dtype)


# ---- stock PyTorch operators --------------------------------------------------------------------


def _masked(x: Tensor, keep: Tensor | None, value: float) -> Tensor:
    """x `[M, B, L, C]` with `value` where keep `[M, B]` is false."""
    return x if keep is None else x.masked_fill(~keep[:, :, None, None], value)


def _rows(x: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Memory for `number` maps like those of x `[M, B, L, C]`, contiguous whatever x is."""
    return torch.empty_permuted((number, *x.shape[1:]), (0, 1, 2, 3), dtype=dtype, device=x.device)


def _others(x: Tensor, present: Tensor | None) -> Tensor | None:
    """Which primaries have anything to choose from, `[M, B]`; None if all have."""
    if present is None and x.shape[0] > 1:
        return None
    return has_others(all_present(x) if present is None else present)


def _overlap(shift: int, size: int) -> slice:
    """Where an axis still has values after looking `shift` further."""
    return slice(max(0, -shift), size - max(0, shift))


def _scores(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Scores `[M, B, L]` of x `[M, B, L, C]`."""
    # One product for all taps; what is then shifted and added is one number per token.
    taps = torch.matmul(weight[:, None], x.transpose(-1, -2)).unflatten(-1, (height, width))
    z = taps[:, :, 4] + bias.view(-1, 1, 1, 1)
    for i in range(9):
        dy, dx = i // 3 - 1, i % 3 - 1
        if i != 4 and abs(dy) < height and abs(dx) < width:
            source = taps[:, :, i, _overlap(-dy, height), _overlap(-dx, width)]
            z[:, :, _overlap(dy, height), _overlap(dx, width)] += source
    return z.flatten(2).sigmoid_()


def _gate(x: Tensor, score: Tensor, present: Tensor | None) -> Tensor:
    """Gated modalities `[M, B, L, C]`, minus infinity where absent."""
    t = _masked(x, present, 0.0).to(score.dtype) * (1 + score[..., None])
    return _masked(t, present, float("-inf"))


def _gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    present: Tensor | None,
    score: Tensor,
    height: int,
    width: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias from the gradients of the gated modalities, M times `[B, L, C]`."""
    modalities, batch, _, channels = x.shape
    wide = _masked(x, present, 0.0).to(weight.dtype)
    dots = [torch.linalg.vecdot(g, x_m) for g, x_m in zip(grads, wide, strict=True)]
    dz = torch.stack(dots) * (score * (1 - score))
    # The token at distance d from a score saw it through the tap at distance -d.
    around = F.pad(dz.unflatten(-1, (height, width)), (1, 1, 1, 1))
    shifted = [around[:, :, i : i + height, j : j + width] for i in (2, 1, 0) for j in (2, 1, 0)]
    taps = torch.stack(shifted, dim=2).reshape(-1, 9, dz.shape[-1])
    dx, dweight, dbias = (weight.new_empty(0) for _ in range(3))
    if needs_dx:
        dx = _rows(wide, modalities, wide.dtype)
        for g, s, out in zip(grads, score, dx, strict=True):
            torch.mul(g, 1 + s[..., None], out=out)
        spread = weight[:, None].expand(-1, batch, -1, -1).reshape(-1, 9, channels)
        dx.flatten(0, 1).baddbmm_(taps.transpose(1, 2), spread)
        dx = _masked(dx, present, 0.0)
    if needs_dw:
        dweight = torch.bmm(taps, wide.flatten(0, 1)).unflatten(0, (modalities, batch)).sum(1)
        dbias = dz.sum((1, 2))
    return dx.to(x.dtype), dweight, dbias


def _tournament(modalities: int) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """How to take, for each of M values, the maximum of all others in 3 (M - 2) comparisons.

    Returns pairs and outcomes: node M + j is the maximum of the two nodes of pair j (nodes below M
    are the values), and outcome i is the node without value i. The first node of a pair holds lower
    values than the second, so that a tie can be given to the lowest.
    """
    pairs: list[tuple[int, int]] = []

    def join(a: int, b: int) -> int:
        pairs.append((a, b))
        return modalities + len(pairs) - 1

    last = modalities - 1
    if last == 0:
        return (), (0,)
    below, above = {0: 0}, {last: last}
    for i in range(1, last):
        below[i] = join(below[i - 1], i)
        above[last - i] = join(last - i, above[last - i + 1])
    inner = [join(below[i - 1], above[i + 1]) for i in range(1, last)]
    return tuple(pairs), (above[1], *inner, below[last - 1])


_TOURNAMENTS = {m: _tournament(m) for m in range(1, MAX_MODALITIES + 1)}


def _tournament_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    present: Tensor | None,
    height: int,
    width: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hubs, scores, and nothing: the backward plays the tournament again."""
    with without_autocast(x.device.type):
        score = _scores(_masked(x, present, 0.0).to(weight.dtype), weight, bias, height, width)
        score = _masked(score[..., None], present, 0.0)[..., 0]
    pairs, outcomes = _TOURNAMENTS[x.shape[0]]
    nodes = list(_gate(x, score, present))
    out = _rows(x, len(nodes), weight.dtype)
    rows = dict(zip(outcomes, out, strict=True))
    if torch.compiler.is_compiling():  # exported programs must not write into memory of their own
        rows = {}
    for a, b in pairs:
        if len(nodes) in rows:
            nodes.append(torch.maximum(nodes[a], nodes[b], out=rows[len(nodes)]))
        else:
            nodes.append(torch.maximum(nodes[a], nodes[b]))
    for node, row in rows.items():
        if node < x.shape[0]:
            row.copy_(nodes[node])
    if not rows:
        out = torch.stack([nodes[node] for node in outcomes])
    out = _masked(out, _others(x, present), 0.0)
    return as_result(out, x.dtype), score, x.new_zeros(0, dtype=torch.uint8)


def _tournament_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    present: Tensor | None,
    score: Tensor,
    winner: Tensor,
    height: int,
    width: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tournament backwards: every pair hands its gradient to the one that won."""
    modalities = x.shape[0]
    pairs, outcomes = _TOURNAMENTS[modalities]
    players = {node for pair in pairs for node in pair}
    nodes = dict(enumerate(_gate(x, score, present))) if pairs else {}
    for node, (a, b) in enumerate(pairs, start=modalities):
        if node in players:
            nodes[node] = torch.maximum(nodes[a], nodes[b])
    grad_out = _masked(grad_out, _others(x, present), 0.0).to(weight.dtype)
    grads = dict(zip(outcomes, grad_out, strict=True))
    for node in reversed(range(modalities, modalities + len(pairs))):
        a, b = pairs[node - modalities]
        g = grads.pop(node)
        # On random masks a product with 0 and 1 is many times faster than torch.where.
        first = torch.ge(nodes[a], nodes[b]).to(g.dtype).mul_(g)
        second = g - first
        grads[a] = first.add_(grads[a]) if a in grads else first
        grads[b] = second.add_(grads[b]) if b in grads else second
    with without_autocast(x.device.type):
        return _gradients(
            [grads[m] for m in range(modalities)], x, weight, present, score, height, width,
            needs_dx, needs_dw,
        )  # fmt: skip


# ---- registered operations ----------------------------------------------------------------------


def _torch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    present: Tensor | None,
    height: int,
    width: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, score, _ = _tournament_forward(x, weight, bias, present, height, width, False)
    if not save:
        return out.contiguous(), score.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    t = _gate(x, score, present)
    best, winner = t.max(dim=0)
    second, runner_up = t.scatter(0, winner[None], float("-inf")).max(dim=0)
    winner = winner.masked_fill(best.isneginf(), _NOBODY)
    runner_up = runner_up.masked_fill(second.isneginf(), _NOBODY)
    return out.contiguous(), score, (winner + 16 * runner_up).to(torch.uint8).contiguous()


def _torch_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    present: Tensor | None,
    score: Tensor,
    winner: Tensor,
    height: int,
    width: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    first, second = winner & 15, winner >> 4
    own = index == first
    grad_out = grad_out.to(weight.dtype)
    for_second = torch.where(own, grad_out, 0.0).sum(0)
    for_first = torch.where(own, 0.0, grad_out).sum(0)
    grads = torch.where(own, for_first, torch.where(index == second, for_second, 0.0))
    return _gradients(list(grads), x, weight, present, score, height, width, needs_dx, needs_dw)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: object, present: object, height: int, width: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:3] if save else (0,), dtype=weight.dtype),
        x.new_empty(x.shape[1:] if save else (0,), dtype=torch.uint8),
    )


def _fake_backward(grad_out: object, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, needs_dx, needs_dw = others
    return empty_gradients((x, weight, weight[:, 0, 0]), (needs_dx, needs_dw, needs_dw))


_FORWARD = register(
    "query_hub_fwd",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? present, SymInt height, SymInt width, "
    "bool save) -> (Tensor out, Tensor score, Tensor winner)",
    kernels="query_hub",
    torch=_torch_forward,
    fake=_fake_forward,
    # One 3 x 3 convolution to one channel: both convolutions of a score net are done as one.
    flops=lambda x, *_: 2 * 9 * prod(x),
)
_BACKWARD = register(
    "query_hub_bwd",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? present, Tensor score, Tensor winner, "
    "SymInt height, SymInt width, bool needs_dx, bool needs_dw) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    kernels="query_hub",
    torch=_torch_backward,
    fake=_fake_backward,
    flops=lambda _, x, *others: 2 * 9 * prod(x) * sum(others[-2:]),
)


def _reference(*saved: Any) -> Tensor:
    *inputs, present, _score, _winner, _weight, height, width = saved
    return reference.query_hub(*inputs, height, width, present=present)


def _saves(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    return (*inputs[:6], *output[1:]), inputs[6:]


def _with_score_nets(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """The merging of the score nets and the rest of the operation, with gradients."""

    def merged(x: Tensor, *others: Any, save: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *nets, present, height, width = others
        weight, bias = _merge(*nets)
        return *forward(x, weight, bias, present, height, width, save), weight

    def split(grad_out: Tensor, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        *nets, _pw_bias, present, score, winner, weight, height, width = others[:-5]
        needs_dx, needs_dw = others[-5], any(others[-4:])
        dx, dweight, dbias = backward(
            grad_out, x, weight, present, score, winner, height, width, needs_dx, needs_dw
        )
        return dx, *(_split(dweight, dbias, *nets) if needs_dw else (None,) * 4)

    return differentiable(
        merged, split, _reference, name="QueryHub", tensors=5, saves=_saves,
        without_gradients=partial(merged, save=False),
    )  # fmt: skip


_TRITON = _with_score_nets(_FORWARD, _BACKWARD)
# The registered operation remembers who won the maximum; the tournament finds out again.
_TORCH = _with_score_nets(_tournament_forward, _tournament_backward)

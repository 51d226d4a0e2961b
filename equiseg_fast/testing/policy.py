"""The tolerance policy and its one comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equiseg_fast.ops._checks import (
    check_choice,
    check_dense,
    check_flags,
    check_integer,
    check_sequence,
    check_sizes,
    check_strings,
    number,
)

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
HALF = (torch.float16, torch.bfloat16)
FULL = (torch.float32, torch.float64)
KINDS = ("forward", "gradient", "parameter", "statistic", "exact")


@dataclass(frozen=True)
class Tolerance:
    """One row of the policy: when it applies, and what it allows.

    With `y` the error of the yardstick, `o` the oracle and `T` the longest sequential chain of the
    kernel, the error `e` of the tested result has to satisfy

        rms(e)  <= rms * rms(y)   + (rms_eps * eps  + chain_eps * eps32 * sqrt(T))     * rms(o)
        amax(e) <= amax * amax(y) + (amax_eps * eps + 3 * chain_eps * eps32 * sqrt(T)) * amax(o)

    where a factor of `None` asserts nothing. The yardstick "oracle" takes `o` itself for `y`;
    "equal" asks for equal values. `contraction` is the shortest sum a result may come from for the
    row to apply (0: only results that come from no such sum).
    """

    tier: str
    kinds: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    yardstick: str
    rms: float | None = None
    rms_eps: float = 0.0
    amax: float | None = None
    amax_eps: float = 0.0
    chain_eps: float = 0.0
    numel: tuple[int, float] = (0, math.inf)
    contraction: int | None = None
    tf32: bool = False

    def applies(
        self, kind: str, dtype: torch.dtype, numel: int, contraction: int | None, tf32: bool
    ) -> bool:
        if kind not in self.kinds or dtype not in self.dtypes or tf32 != self.tf32:
            return False
        if not self.numel[0] <= numel < self.numel[1]:
            return False
        if self.contraction is None:
            return True
        if self.contraction == 0:
            return contraction is None
        return contraction is not None and contraction >= self.contraction


LARGE, SMALL, ANY = (4096, math.inf), (256, math.inf), HALF + FULL
FWD, GRAD, PARAM, STAT = ("forward",), ("gradient",), ("parameter",), ("statistic",)

# Eager in half precision errs without bound where it rounds what later cancels, as scores with a
# common offset (a mean of 3 in queries and keys: 40 floors forward): tier H says what nobody may
# reach. Gradients of sums of fewer than 8 terms cancel by themselves. Tier A starts at 4096
# elements and sums of 64 terms: below, cancellation puts a correct kernel anywhere between 1 and 30
# floors. An operation without a sum of rounded products rounds once, at its store, and sits on the
# floor. Tier B adds a whole eps in fp32, where a quarter gave false alarms on single rows. Errors
# of sums walk at random: their RMS grows by 0.11 to 0.16 eps sqrt(chain), where tier D allows 0.2,
# and the worst of hundreds of sums lies up to 0.5 away, where it allows 0.6.
# fmt: off
POLICY: tuple[Tolerance, ...] = (
    Tolerance("A floor", FWD,  HALF, "floor", rms=1.15, numel=LARGE, contraction=0),
    Tolerance("A floor", FWD,  HALF, "floor", rms=1.5,  numel=LARGE, contraction=64),
    Tolerance("A floor", GRAD + PARAM, HALF, "floor", rms=2.0, numel=LARGE, contraction=0),
    Tolerance("A floor", GRAD + PARAM, HALF, "floor", rms=2.0, numel=LARGE, contraction=64),
    Tolerance("H bound", FWD,  HALF, "floor", rms=4.0,  numel=SMALL, contraction=0),
    Tolerance("H bound", FWD,  HALF, "floor", rms=4.0,  numel=SMALL, contraction=1),
    Tolerance("H bound", GRAD + PARAM, HALF, "floor", rms=16.0, numel=SMALL, contraction=0),
    Tolerance("H bound", GRAD + PARAM, HALF, "floor", rms=16.0, numel=SMALL, contraction=8),
    Tolerance("B eager", FWD,  HALF, "eager", 1.5, 0.25, 2.0, 1.0, numel=SMALL),
    Tolerance("B eager", FWD,  FULL, "eager", 1.5, 1.0,  2.0, 1.0, numel=SMALL),
    Tolerance("B eager", GRAD, HALF, "eager", 2.0, 0.25, 3.0, 1.0, numel=SMALL),
    Tolerance("B eager", GRAD, FULL, "eager", 2.0, 1.0,  4.0, 1.0, numel=SMALL),
    Tolerance("C tiny",  FWD + GRAD + STAT, ANY, "eager", None, 0.0, 4.0, 2.0, numel=(0, 256)),
    Tolerance("D sums",  PARAM, HALF, "eager", 2.0, 0.25, 3.0, 1.0, chain_eps=0.2, numel=SMALL),
    Tolerance("D sums",  PARAM, FULL, "eager", 2.0, 1.0,  4.0, 1.0, chain_eps=0.2, numel=SMALL),
    Tolerance("D tiny",  PARAM, ANY, "eager", None, 0.0, 4.0, 2.0, chain_eps=0.2, numel=(0, 256)),
    Tolerance("E tf32",  FWD + STAT,   FULL, "oracle", rms=2.0**-10, tf32=True),
    Tolerance("E tf32",  GRAD + PARAM, FULL, "oracle", rms=2.0**-9, tf32=True),
    Tolerance("F exact", ("exact",), ANY, "equal"),
    Tolerance("G statistics", STAT, FULL, "eager", 1.5, 1.0, 2.0, 1.0, numel=SMALL),
)
# fmt: on
TIERS = tuple(dict.fromkeys(row.tier for row in POLICY))


@dataclass(frozen=True)
class Override:
    """A constant of the policy that one operation replaces, and why. Made by `override`."""

    op: str
    tier: str
    kind: str | None
    reason: str
    constants: tuple[tuple[str, Any], ...]


_OVERRIDES: dict[tuple[str, str, str | None], Override] = {}


def override(
    op: str, tier: str, *, reason: str, kind: str | None = None, **constants: float
) -> Override:
    """Replaces constants (`rms`, `rms_eps`, `amax`, `amax_eps`, `chain_eps`) of one tier for one
    operation (and one kind of result only, if given), and records that for `overrides` to list.

    Raises:
        ValueError: unknown tier, kind or constant, no written reason, or a second, different
            override of the same.
    """
    allowed = ("rms", "rms_eps", "amax", "amax_eps", "chain_eps")
    check_strings(op=op, reason=reason)
    check_choice("tier", tier, TIERS)
    if kind is not None:
        check_choice("kind", kind, KINDS)
    if not constants or not set(constants) <= set(allowed):
        raise ValueError(f"constants must be some of {allowed}, got {tuple(constants)}")
    for name, constant in constants.items():
        if number(name, constant) < 0:
            raise ValueError(f"{name} must be at least 0; got {constant}")
    made = Override(op, tier, kind, reason, tuple(sorted(constants.items())))
    known = _OVERRIDES.setdefault((op, tier, kind), made)
    if known != made:
        raise ValueError(f"{op} already overrides {tier}: {known}")
    return made


def overrides() -> tuple[Override, ...]:
    """Every override made so far in this process."""
    return tuple(_OVERRIDES.values())


@dataclass(frozen=True)
class Check:
    """One comparison: `metric` is "rms" or "amax", the three errors are absolute."""

    tier: str
    metric: str
    measured: float
    yardstick: float
    allowed: float

    @property
    def ratio(self) -> float:
        """The measured error in units of the yardstick (infinite if that is 0)."""
        return _ratio(self.measured, self.yardstick)

    @property
    def allowed_ratio(self) -> float:
        return _ratio(self.allowed, self.yardstick)

    @property
    def ok(self) -> bool:
        return self.measured <= self.allowed


@dataclass(frozen=True)
class Parity:
    """What `assert_parity` measured: `rms` is relative to the oracle, `checks` are all passed."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rms: float
    checks: tuple[Check, ...]

    @property
    def budget_used(self) -> float:
        """The largest share of an allowance that was used: 1 is the limit."""
        return max((_ratio(check.measured, check.allowed) for check in self.checks), default=0.0)


def assert_parity(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    *,
    name: str = "out",
    kind: str = "forward",
    tf32: bool = False,
    chain: int = 1,
    contraction: int | None = None,
    overrides: Sequence[Override] = (),
) -> Parity:
    """Asserts that `actual` is as good as its dtype allows, by every row of `POLICY` that applies.

    Args:
        actual: the result under test, any shape and dtype.
        oracle: the same in float64, from the inputs as `actual` saw them (already rounded).
        eager: the same by plain PyTorch operators in the dtype of `actual`. Where it overflows it
            is no yardstick and is left out.
        name: what to call it in messages.
        kind: "forward"; "gradient"; "parameter" for sums over tokens (weight gradients,
            prototypes); "statistic" for fp32 results such as a logsumexp; "exact" for copies,
            winners, labels and counts.
        tf32: the kernel was asked to multiply in TF32 (fp32 results only).
        chain: longest sequential chain of additions of the kernel, for "parameter".
        contraction: length of the shortest sum of rounded products behind an element (for
            attention `min(Lq, Lk)`); None if the operation rounds only once, at its store. The
            floor is asserted for None and from 64 on, its bound for None, from 1 on forward and
            from 8 on for gradients. For a composite that stores intermediate results in half
            precision pass 8, or 0 if only eager can be its measure.
        overrides: constants that this operation replaces, from `override`.

    Raises:
        AssertionError: wrong dtype, shape or device; a value that is not finite where the rounded
            oracle is, no NaN where it is NaN, another infinity; an error above its allowance.
        ValueError: an unknown kind, or `tf32` for a half-precision result.
    """
    for label, x in (("actual", actual), ("oracle", oracle), ("eager", eager)):
        check_dense(label, x)
    check_strings(name=name)
    check_choice("kind", kind, KINDS)
    check_policy(tf32, chain, contraction, overrides)
    if tf32 and actual.dtype in HALF:
        raise ValueError(f"{name}: tf32 concerns fp32 results, got {actual.dtype}")
    for what in ("dtype", "shape", "device"):
        got, want = getattr(actual, what), getattr(eager, what)
        if got != want:
            raise AssertionError(f"{name}: {what} is {got}, expected {want}")
    for what in ("shape", "device"):
        got, want = getattr(actual, what), getattr(oracle, what)
        if got != want:
            raise AssertionError(f"{name}: {what} is {got}, the oracle has {want}")

    rounded = oracle.to(actual.dtype)
    finite = torch.isfinite(rounded)
    differs = actual != rounded
    wrong = {
        "not finite where the oracle is": finite & ~torch.isfinite(actual),
        "not NaN where the oracle is NaN": rounded.isnan() & ~actual.isnan(),
        "another value where the oracle is infinite": rounded.isinf() & differs,
    }
    exact = any(row.yardstick == "equal" and kind in row.kinds for row in POLICY)
    if exact:
        wrong["another value"] = finite & differs
    for label, bad in wrong.items():
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {label}, at {int(bad.sum())} of {bad.numel()} elements; first at {index}:"
                f" got {actual[index].item()!r}, oracle {oracle[index].item()!r}"
            )
    if exact:
        return Parity(name, kind, actual.dtype, tuple(actual.shape), 0.0, ())

    # Where the rounded oracle is not finite, everything that can be said was said above.
    truth = oracle.double().where(finite, 0.0)
    error = (actual.double() - truth).where(finite, 0.0)
    yardsticks = {
        "floor": (rounded.double() - truth).where(finite, 0.0),
        "eager": (eager.double() - truth).where(finite & torch.isfinite(eager), 0.0),
        "oracle": truth,
    }
    eps = EPS[actual.dtype]
    checks = []
    for row in POLICY:
        if not row.applies(kind, actual.dtype, actual.numel(), contraction, tf32):
            continue
        for made in overrides:
            if made.tier == row.tier and made.kind in (None, kind):
                row = replace(row, **dict(made.constants))
        chained = row.chain_eps * EPS[torch.float32] * math.sqrt(chain)
        for metric, norm, factor, slack in (
            ("rms", _rms, row.rms, row.rms_eps * eps + chained),
            ("amax", _amax, row.amax, row.amax_eps * eps + 3 * chained),
        ):
            if factor is not None:
                yardstick = norm(yardsticks[row.yardstick])
                allowed = factor * yardstick + slack * norm(truth)
                checks.append(Check(row.tier, metric, norm(error), yardstick, allowed))
    failed = [check for check in checks if not check.ok]
    if failed:
        index = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
        lines = [
            f"{name}: {c.tier}, {c.metric} error {c.ratio:.3g} times the yardstick, allowed"
            f" {c.allowed_ratio:.3g} (error {c.measured:.3g}, yardstick {c.yardstick:.3g})"
            for c in failed
        ]
        lines.append(
            f"  {kind} {tuple(actual.shape)} {actual.dtype} on {actual.device}; worst at {index}:"
            f" got {actual[index].item()!r}, oracle {oracle[index].item()!r},"
            f" eager {eager[index].item()!r}"
        )
        if contraction is None and any(c.tier == "A floor" for c in failed):
            lines.append("  an operation with sums of rounded products passes their `contraction`")
        raise AssertionError("\n".join(lines))
    relative = _ratio(_rms(error), _rms(truth))
    return Parity(name, kind, actual.dtype, tuple(actual.shape), relative, tuple(checks))


def check_policy(
    tf32: bool, chain: int, contraction: int | None, overrides: Sequence[Override]
) -> None:
    """What chooses rows of the policy and changes them, as in `assert_parity`."""
    check_flags(tf32=tf32)
    check_sizes(chain=chain)
    if contraction is not None:
        check_integer("contraction", contraction)
        if contraction < 0:
            raise ValueError(f"contraction must be at least 0; got {contraction}")
    check_sequence("overrides", overrides, Override, "Override")


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _amax(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _ratio(a: float, b: float) -> float:
    if b == 0.0:
        return 0.0 if a == 0.0 else math.inf
    return a / b

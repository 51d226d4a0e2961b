"""Constants of the tolerance policy that an operation replaces: with a reason, and all known."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from equiseg_fast import testing
from equiseg_fast.testing import assert_parity, random_normal


def test_overrides_need_a_reason_and_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equiseg_fast.testing.policy._OVERRIDES", {})
    for wrong, message in (
        ({"reason": "  ", "rms": 2.0}, "reason must not be empty"),
        ({"reason": "r", "tier": "Z"}, "tier must be one of"),
        ({"reason": "r", "kind": "backward", "rms": 2.0}, "kind must be one of"),
        ({"reason": "r", "numel": 1.0}, "constants must be some of"),
        ({"reason": "r"}, "constants must be some of"),
    ):
        with pytest.raises(ValueError, match=message):
            testing.override("hub", **{"tier": "A floor", **wrong})
    with pytest.raises(TypeError, match="reason"):
        testing.override("hub", "A floor", rms=2.0)
    assert testing.overrides() == ()

    made = testing.override("hub", "A floor", kind="forward", reason="two roundings", rms=2.0)
    assert (
        testing.override("hub", "A floor", kind="forward", reason="two roundings", rms=2.0) == made
    )
    with pytest.raises(ValueError, match="already overrides A floor"):
        testing.override("hub", "A floor", kind="forward", reason="two roundings", rms=3.0)
    assert testing.overrides() == (made,)

    x = random_normal((64, 64), torch.float64, seed=0)
    twice = (x * 1.0025).to(torch.bfloat16)
    check = partial(assert_parity, twice, x, twice)
    with pytest.raises(AssertionError, match="A floor"):
        check()
    check(overrides=[made])
    other = testing.override("hub", "A floor", kind="gradient", reason="two roundings", rms=2.0)
    with pytest.raises(AssertionError, match="A floor"):
        check(overrides=[other])


# Operations that are held to other constants, with (operation, tier, kind); the reason stands where
# the override is made. A new one has to be written down here as well.
KNOWN_OVERRIDES: set[tuple[str, str, str | None]] = {
    ("attention", "A floor", "gradient"),
    ("attention", "B eager", "gradient"),
    ("attention with a mean", "A floor", "gradient"),
    ("upsample_cross_entropy", "B eager", "gradient"),
}


def test_no_override_is_unknown() -> None:
    assert {(o.op, o.tier, o.kind) for o in testing.overrides()} <= KNOWN_OVERRIDES

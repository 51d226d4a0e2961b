"""How close is close enough: one tolerance policy for every operation, dtype and shape.

Nothing here is tuned by hand per test. A result is compared with an *oracle* (the same mathematics
in float64, on the inputs as they were already rounded to the tested dtype), and its error is
measured with a yardstick that scales by itself:

* the *floor*: the oracle rounded once to the tested dtype, the best any kernel can do;
* *eager*: the error plain PyTorch makes in the tested dtype, TF32 off; in half precision that is
  no excuse for more than a few floors.

Root mean squares see a small bias everywhere (a scale that is 0.3 % off), maxima see one wrong row;
both are asserted. `POLICY` is the whole policy, `check_op_parity` applies it to an operation.
"""

from .memory import (
    LAYOUTS,
    assert_deterministic,
    nan_poison,
    random_normal,
    same_bits,
    with_layout,
)
from .parity import check_op_parity
from .policy import (
    EPS,
    POLICY,
    Check,
    Override,
    Parity,
    Tolerance,
    assert_parity,
    override,
    overrides,
)

__all__ = [
    "EPS",
    "LAYOUTS",
    "POLICY",
    "Check",
    "Override",
    "Parity",
    "Tolerance",
    "assert_deterministic",
    "assert_parity",
    "check_op_parity",
    "nan_poison",
    "override",
    "overrides",
    "random_normal",
    "same_bits",
    "with_layout",
]

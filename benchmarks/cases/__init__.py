"""What is timed: operations, and the parts of the model."""

from functools import cache

from benchmarks.cases import networks, ops
from benchmarks.cases.common.op import Op


@cache
def operations() -> dict[str, Op]:
    """Every declaration by name, operations before larger parts."""
    return {op.name: op for op in (*ops.OPS, *networks.OPS)}

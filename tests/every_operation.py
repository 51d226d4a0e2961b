"""The `OPERATION` of every public operation, which stands in its test file."""

from importlib import import_module

from equiseg_fast import ops
from tests.operations import Operation

OPERATIONS: dict[str, Operation] = {
    name: import_module(f"tests.test_{name}").OPERATION
    for name in ops.__all__
    if name not in ("explain", "use_backend")
}

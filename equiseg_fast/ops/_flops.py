"""What `torch.utils.flop_counter.FlopCounterMode` counts for the registered operations (`flops=` of
`register`).

Its convention: 2 for every multiply-add of a matrix product or a convolution, in a backward for
those done again as well, and nothing for pools, interpolation, norms, softmax and other elementwise
work. So the gate, the cross-entropy and the LayerNorm count as their stock counterparts do: 0.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from ._registry import FLOPS

_COUNTER = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    for name, flops in FLOPS.items():

        def formula(*args: Any, flops: Callable[..., int] = flops, **_: Any) -> int:
            return flops(*args)

        counter.register_flop_formula(getattr(torch.ops.equiseg_fast, name))(formula)
    # Stock operators of the torch backend that the counter has forgotten.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for operator, known in (
        (attention, torch.ops.aten._scaled_dot_product_flash_attention),
        (backward, torch.ops.aten._scaled_dot_product_flash_attention_backward),
        (torch.ops.aten.baddbmm_, torch.ops.aten.baddbmm),
    ):
        counter.flop_registry.setdefault(operator, counter.flop_registry[known])


class _Finder(MetaPathFinder):
    """Registers the formulas when the counter is imported: it imports Triton, which we must not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Let the counter know the operations, now or when it is imported."""
    counter: Any = sys.modules.get(_COUNTER)
    if counter is None:
        sys.meta_path.insert(0, _Finder())
    else:
        _register(counter)

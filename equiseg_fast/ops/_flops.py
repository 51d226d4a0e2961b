"""What `torch.utils.flop_counter.FlopCounterMode` counts for the registered operations.

Its convention: 2 for every multiply-add of a matrix product or a convolution, in a backward for
those done again as well, and nothing for pools, interpolation, norms, softmax and other elementwise
work. So the gate, the cross-entropy and the LayerNorm count as their stock counterparts do: 0.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _attention(q: Shape, k: Shape, *_: object, **__: object) -> int:
    return 4 * prod(q) * k[1]


def _attention_backward(
    grad_out: Shape, grad_lse: Shape | None, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape,
    scale: float, tf32: bool, dq: bool, dk: bool, dv: bool, **_: object,
) -> int:  # fmt: skip
    """The scores again; the weights for their gradient, and a product for each gradient."""
    return 2 * prod(q) * k[1] * (1 + (dq or dk) + dq + dk + dv)


def _depthwise(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return 2 * prod(x) * prod(weight[1:])


def _depthwise_backward(
    grad_out: Shape, x: Shape, weight: Shape, bias: Shape, height: int, width: int,
    dx: bool, dweight: bool, dbias: bool, **_: object,
) -> int:  # fmt: skip
    return _depthwise(x, weight) * (1 + dx + dweight)


def _mixer_backward(
    grad_out: Shape, x: Shape, weight: Shape, height: int, width: int,
    dx: bool, dweight: bool, dbias: bool, **_: object,
) -> int:  # fmt: skip
    return _depthwise(x, weight) * (dx + dweight)


def _hub(x: Shape, *_: object, **__: object) -> int:
    """One convolution of 3 x 3 to one channel, as which both of a score net are done."""
    return 2 * 9 * prod(x)


def _hub_backward(
    grad_out: Shape, x: Shape, weight: Shape, present: Shape | None, score: Shape, winner: Shape,
    height: int, width: int, dx: bool, dw: bool, **_: object,
) -> int:  # fmt: skip
    return _hub(x) * (dx + dw)


def _prototypes(x: Shape, labels: Shape, num_classes: int, *_: object, **__: object) -> int:
    """A product with the classes of the tokens; the backward only looks up."""
    return 2 * prod(x) * num_classes


def _nothing(*_: object, **__: object) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _attention,
    "attention_bwd": _attention_backward,
    "depthwise_conv_gelu_fwd": _depthwise,
    "depthwise_conv_gelu_bwd": _depthwise_backward,
    "add_layer_norm_fwd": _nothing,
    "add_layer_norm_bwd": _nothing,
    "query_hub_fwd": _hub,
    "query_hub_bwd": _hub_backward,
    "pooling_mixer_fwd": _depthwise,
    "pooling_mixer_bwd": _mixer_backward,
    "guided_gate_fwd": _nothing,
    "guided_gate_bwd": _nothing,
    "class_prototypes_fwd": _prototypes,
    "class_prototypes_bwd": _nothing,
    "upsample_cross_entropy_fwd": _nothing,
    "upsample_cross_entropy_bwd": _nothing,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
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

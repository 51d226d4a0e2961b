"""Tensors of any size without memory: what would be made and computed on a GPU is on "meta"."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from benchmarks.cases.common import network

META = torch.device("meta")

# What CUDA's autocast computes in half precision and in fp32, by the names of the functions.
TO_HALF = {
    "linear", "conv2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm",
    "einsum", "scaled_dot_product_attention",
}  # fmt: skip
TO_SINGLE = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "exp", "log", "pow", "cumsum", "prod",
    "norm", "cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "kl_div",
    "sum", "rsqrt", "reciprocal", "softplus", "cosine_similarity",
}  # fmt: skip
ON_HOST = {"randperm", "linspace", "arange"}
"""Small, and read by the host where it draws an order or the rates of layers."""


READ_BY_HOST = {"item": 1, "__bool__": True, "__int__": 1}
"""What the host reads where it waits for a value, by the name of the method."""


class _Meta(TorchFunctionMode):
    """Makes tensors on "meta", casts as CUDA's autocast to `dtype` would (None: does not), and
    attends as FlashAttention does, which the choice of a backend would not find there."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.constructors = {f for f in _device_constructors() if f.__name__ not in ON_HOST}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in self.constructors:
            kwargs.pop("generator", None)
            return func(*args, **kwargs | {"device": META})
        if name in READ_BY_HOST and args[0].is_meta:
            return READ_BY_HOST[name]
        if self.dtype and name in TO_HALF | TO_SINGLE and "dtype" not in kwargs:
            wanted = self.dtype if name in TO_HALF else torch.float32
            args, kwargs = _cast(args, wanted, self.dtype), _cast(kwargs, wanted, self.dtype)
        if name == "scaled_dot_product_attention" and args[0].element_size() == 2:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], **kwargs)[0]
        return func(*args, **kwargs)


def _cast(values: Any, wanted: torch.dtype, half: torch.dtype) -> Any:
    if isinstance(values, torch.Tensor) and values.dtype in (torch.float32, half):
        return values.to(wanted)
    if isinstance(values, dict):
        return {name: _cast(x, wanted, half) for name, x in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_cast(x, wanted, half) for x in values)
    return values


@contextmanager
def on_meta(autocast: torch.dtype | None = None) -> Iterator[None]:
    """New tensors are on "meta", where autocast works as on CUDA. A benchmark's own autocast does
    nothing: this one is on everywhere inside, if it is.

    Where the host waits for a value it reads 1 or true, and boolean indices select everything.
    """
    mode = _Meta(autocast)

    @contextmanager
    def without(device: str) -> Iterator[None]:
        with patch.object(mode, "dtype", None):
            yield

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (network, "_autocast", lambda *_: nullcontext()),
        (torch, "get_autocast_dtype", _replaced(torch.get_autocast_dtype, lambda: mode.dtype)),
    ]
    for module in [m for name, m in sys.modules.items() if name.startswith("equiseg_fast")]:
        for name, value in (
            ("autocast_is_on", lambda _: mode.dtype is not None),
            ("without_autocast", without),
        ):
            if hasattr(module, name):
                changes.append((module, name, value))
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        stack.enter_context(_config.patch(meta_nonzero_assume_all_nonzero=True))
        stack.enter_context(mode)
        yield


def _replaced(
    before: Callable[[str], torch.dtype], dtype: Callable[[], torch.dtype | None]
) -> Callable[[str], torch.dtype]:
    return lambda device: dtype() or before(device)

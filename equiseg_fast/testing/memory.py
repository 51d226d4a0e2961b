"""What tests do to memory: strange strides, equal bits, NaN poison."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from numbers import Integral
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from equiseg_fast.ops._checks import (
    MAX_SIZE,
    check_callable,
    check_choice,
    check_dense,
    check_flags,
    check_integer,
    check_memory,
    check_seed,
    check_sequence,
    check_sizes,
    number,
    positive,
)

LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "expanded")


def with_layout(x: Tensor, layout: str, *, unit_last_stride: bool = False) -> Tensor:
    """The values of `x` in another memory layout, in memory of their own.

    Args:
        x: any shape and dtype.
        layout: "contiguous"; "transposed" (the last two dimensions swapped in memory);
            "channels_last" (the second dimension is the innermost in memory); "sliced" (a window
            that starts inside a larger allocation, at an odd offset, every second element of the
            last dimension; the memory around it is NaN, or 1 if not floating); "expanded" (the
            last dimension has stride 0 and repeats its first value).
        unit_last_stride: keep the last stride at 1. "transposed" then swaps the two dimensions
            before the last, "sliced" takes neighbours, and "expanded" repeats along the first
            dimension longer than 1.

    Raises:
        TypeError: arguments of other types.
        ValueError: an unknown layout, or one that `x` has too few dimensions for.
    """
    check_dense("x", x)
    check_choice("layout", layout, LAYOUTS)
    check_flags(unit_last_stride=unit_last_stride)
    needs = {"transposed": 2, "channels_last": 3, "sliced": 1, "expanded": 1}.get(layout, 0)
    needs += unit_last_stride and layout in ("transposed", "expanded")
    if x.dim() < needs or (unit_last_stride and layout == "channels_last"):
        raise ValueError(
            f"layout {layout!r} with unit_last_stride={unit_last_stride} is impossible or needs"
            f" at least {needs} dimensions, got x of shape {tuple(x.shape)}"
        )
    x = x.detach()
    if layout == "transposed":
        a, b = (-3, -2) if unit_last_stride else (-2, -1)
        return x.transpose(a, b).clone(memory_format=torch.contiguous_format).transpose(a, b)
    if layout == "channels_last":
        return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    if layout == "sliced":
        step = 1 if unit_last_stride else 2
        padded = [n + 1 for n in x.shape[:-1]] + [step * x.shape[-1] + 3]
        filling = float("nan") if x.is_floating_point() else 1
        around = torch.full(padded, filling, dtype=x.dtype, device=x.device)
        window = around[tuple(slice(1, None) for _ in x.shape[:-1])]
        window = window[..., 1 : 1 + step * x.shape[-1] : step]
        return window.copy_(x)
    if layout == "expanded" and x.numel():
        longer = [i for i, n in enumerate(x.shape[:-1]) if n > 1]
        dim = (longer or [0])[0] if unit_last_stride else x.dim() - 1
        return x.narrow(dim, 0, 1).clone(memory_format=torch.contiguous_format).expand(x.shape)
    return x.clone(memory_format=torch.contiguous_format)


def random_normal(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int,
    layout: str = "contiguous",
    unit_last_stride: bool = False,
    scale: float = 1.0,
    mean: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal random numbers of their own generator: the same values on every device and, but for
    "expanded", in every layout.

    Args:
        shape: any shape.
        dtype: a floating dtype; values are drawn in fp32 and rounded once.
        seed: of the generator of this tensor alone.
        layout, unit_last_stride: see `with_layout`.
        scale, mean: standard deviation and mean.
        device: where the tensor goes.

    Raises:
        TypeError, ValueError: arguments that are no such thing; as `with_layout`.
    """
    check_sequence("shape", shape, Integral, "sizes")
    for size in shape:
        check_integer("shape", size)
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"shape must hold sizes of 0 to {MAX_SIZE}; got {size}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype; got {dtype!r}")
    check_seed(seed)
    scale, mean = positive("scale", scale), number("mean", mean)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be a torch.device or its name; got {device!r}") from error
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(
        tuple(shape), generator=generator, dtype=torch.float32, device=generator.device
    )
    values = (values * scale + mean).to(device, dtype)
    return with_layout(values, layout, unit_last_stride=unit_last_stride)


def storage_bytes(x: Tensor) -> Tensor:
    """The whole allocation under `x` as uint8 `[bytes]`, the memory around a view included."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals NaN, and -0.0 is not 0.0.

    Raises TypeError for what is no dense tensor.
    """
    check_memory("a", a)
    check_memory("b", b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def assert_deterministic(fn: Callable[[], Any], repeats: int = 20) -> None:
    """Asserts that `fn()`, which returns a tensor or a sequence of tensors, gives the same bits
    `repeats` times.

    Raises:
        AssertionError: naming the repeat and the output that differs.
        TypeError: a function that returns something else, or is none.
        ValueError: fewer than 2 repeats.
    """
    check_callable(fn=fn)
    check_sizes(repeats=repeats)
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, got {repeats}")
    # Cloned, because a function that hands out one buffer again and again agrees with itself.
    first = [x.clone() for x in _as_tuple(fn())]
    for repeat in range(1, repeats):
        again = _as_tuple(fn())
        if len(again) != len(first):
            raise AssertionError(f"repeat {repeat}: {len(again)} outputs, first {len(first)}")
        for i, (a, b) in enumerate(zip(first, again, strict=True)):
            if not same_bits(a, b):
                raise AssertionError(
                    f"repeat {repeat}: output {i} {tuple(b.shape)} {b.dtype} differs from the"
                    f" first run"
                )


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    if isinstance(outputs, Tensor):
        return (outputs,)
    check_sequence("what fn returns", outputs, Tensor, "tensors")
    return tuple(outputs)


@contextmanager
def nan_poison(modules: Sequence[str] = ("equiseg_fast.kernels",)) -> Iterator[None]:
    """Fills what `modules` (and modules below them) allocate without values with NaN, so that an
    output element that no program writes is seen.

    Covers floating tensors from `torch.empty`, `torch.empty_like`, `torch.empty_strided`,
    `Tensor.new_empty` and `Tensor.new_empty_strided`, called directly in the code of these modules,
    from any thread. It does not see integer and bool tensors, names bound before it was entered
    (`from torch import empty`), allocations of other modules, of C++ and of compiled graphs, and
    stores beyond the end of a tensor. Raises TypeError for what is no sequence of names.
    """
    check_sequence("modules", modules, str, "names of modules")

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(allocate)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling():
                return allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            made = allocate(*args, **kwargs)
            if made.is_floating_point() and f"{caller}.".startswith(prefixes):
                made.detach().fill_(float("nan"))
            return made

        return wrapper

    prefixes = tuple(f"{module}." for module in modules)
    # `with torch.device(..)` collects the constructors it redirects on first use, and keeps them:
    # collected in here, they would be the wrappers.
    _device_constructors()
    with ExitStack() as patches:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patches.enter_context(
                    mock.patch.object(owner, name, poisoned(getattr(owner, name)))
                )
        yield

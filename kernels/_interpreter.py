"""Repairs of Triton's interpreter (`TRITON_INTERPRET=1`), which runs kernels on NumPy arrays
without a GPU.

NumPy has no bfloat16, so the interpreter keeps such values as `uint16` bit patterns, and computes
on the patterns: a `tl.dot` of bf16 operands is wrong by a factor of 10^9, arithmetic is noise, and
the conversion from fp32 truncates where a GPU rounds to nearest even. Triton up to 3.6 also cannot
use a runtime value as a loop bound with NumPy 2.4. None of this says anything about a kernel, and
all of it hides what would.

`install()` widens bf16 operands to fp32, which is exact, computes there, and rounds results to
nearest even once. It changes nothing but Triton's `InterpreterBuilder` and one helper next to it,
touches no compiled kernel, and may be called any number of times. What stays missing: bf16 atomics,
libdevice, inline assembly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

_WIDENED_METHODS = (
    "binary_op",
    "ternary_op",
    "unary_op",
    "create_fma",
    "create_rsqrt",
    "create_erf",
    "create_dot",
)
_INSTALLED = "_equiseg_fast_repairs"


def float32_to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of fp32 values rounded to bf16, ties to even; NaN becomes 0x7fc0."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def bfloat16_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns (uint16); exact."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(np.shape(bits))


def install() -> None:
    """Repair the interpreter of the installed Triton; does nothing the second time."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, _INSTALLED, False):
        return
    handle = interpreter.TensorHandle

    def is_bfloat16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x: Any) -> Any:
        return handle(bfloat16_bits_to_float32(x.data), tl.float32) if is_bfloat16(x) else x

    def narrow(x: Any) -> Any:
        return handle(float32_to_bfloat16_bits(x.data), tl.bfloat16)

    def through_float32(method: Callable) -> Callable:
        @functools.wraps(method)
        def repaired(self: Any, *args: Any) -> Any:
            if not any(is_bfloat16(a) for a in args):
                return method(self, *args)
            result = method(self, *(widen(a) for a in args))
            # The accumulator of a dot has its own type, and comparisons give booleans: those stay
            # as they are.
            handles = [a for a in args if isinstance(a, handle)]
            return (
                narrow(result)
                if is_bfloat16(handles[-1]) and result.data.dtype == np.float32
                else result
            )

        return repaired

    original_cast, original_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        src = widen(src)
        if dst_type.scalar != tl.bfloat16:
            return original_cast(self, src, dst_type)
        return narrow(
            src if src.dtype.scalar == tl.float32 else original_cast(self, src, tl.float32)
        )

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    def get_bf16(self: Any, value: float) -> Any:
        return narrow(handle(np.array([value], dtype=np.float32), tl.float32))

    for name in _WIDENED_METHODS:
        setattr(builder, name, through_float32(getattr(builder, name)))
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16

    original_patch = interpreter._patch_lang_tensor

    @functools.wraps(original_patch)
    def patch_lang_tensor(tensor: Any, *args: Any) -> None:
        original_patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    setattr(builder, _INSTALLED, True)

"""Argument checks with one message style: the argument, what came, what is allowed.

Only metadata is looked at, so nothing waits for the device and the compiler sees no branch on data;
labels alone have their values checked, where that costs neither (`has_values`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


_NO_TORCHSCRIPT = (
    "torch.jit.trace, torch.jit.script and the ONNX export with dynamo=False are not supported: "
    "they would record the sizes of the example for good; use torch.export (for ONNX "
    "torch.onnx.export with dynamo=True)"
)


def refuse_torchscript(*_: object, **__: object) -> Any:
    """Raise what every operation and layer says to TorchScript."""
    raise RuntimeError(_NO_TORCHSCRIPT)


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], shape: str) -> None:
    """x is a tensor of one of the dtypes whose rank is the number of names in `shape`.

    shape: the documented shape, e.g. "[B, L, C]", or "[..., C]" for one dimension or more. Raises
    TypeError or ValueError, and RuntimeError where `torch.jit.trace` is at work: every operation
    begins here.
    """
    if torch.jit.is_tracing():
        refuse_torchscript()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}; got {str(x.dtype)[6:]}")
    if x.dim() != shape.count(",") + 1 and not (shape == "[..., C]" and x.dim()):
        raise ValueError(f"{name} must have shape {shape}; got {list(x.shape)}")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], shape: str) -> None:
    """x is a tensor of exactly the expected shape; `shape` names it for the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {shape} = {list(expected)}; got {list(x.shape)}")


def check_same(**tensors: Tensor) -> None:
    """All tensors share the dtype and device of the first."""
    (first_name, first), *others = tensors.items()
    dtype, device = first.dtype, first.device
    for name, x in others:
        if x.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}; got {x.dtype}")
        if x.device != device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {device}; got {x.device}"
            )


def check_same_device(**tensors: Tensor) -> None:
    """All tensors are on the device of the first."""
    (first_name, first), *others = tensors.items()
    device = first.device
    for name, x in others:
        if x.device != device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {device}; got {x.device}"
            )


def check_integer(name: str, value: object) -> None:
    """value is an integer, of Python, NumPy or the compiler."""
    if isinstance(value, (int, torch.SymInt)):
        return
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r}")


def number(name: str, value: Any) -> float:
    """value as a float; TypeError if it is no number."""
    # The compiler knows no attributes of its numbers.
    if isinstance(value, (float, int)) or hasattr(value, "__float__"):
        return float(value)
    raise TypeError(f"{name} must be a number; got {value!r}")


def check_tokens(name: str, x: Tensor, height: int, width: int) -> None:
    """The token axis of x (second to last) holds height * width tokens, both positive."""
    for label, value in (("height", height), ("width", width)):
        check_integer(label, value)
        if value < 1:
            raise ValueError(f"{label} must be at least 1; got {value}")
    if x.shape[-2] != height * width:
        raise ValueError(
            f"{name} must have height * width = {height} * {width} = {height * width} tokens; "
            f"got {x.shape[-2]} in shape {list(x.shape)}"
        )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_values(x: Tensor) -> bool:
    """Whether x is plain CPU memory in an eager call: nothing that traces or transforms would take
    what depends on its values, or on its sizes, for what always holds."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if is_transformed() or get_proxy_mode() is not None:
        return False
    if torch._C._functorch.is_legacy_batchedtensor(x):  # as cotangents with is_grads_batched are
        return False
    return not torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def check_label_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Where it waits for nothing, every label is a class or ignored."""
    if not has_values(labels):
        return
    # Narrow dtypes wrap what they cannot hold: 255 would be -1 in int8.
    values = labels.long()
    wrong = ((values < 0) | (values >= classes)) & (values != ignore_index)
    if wrong.any():
        raise ValueError(
            f"labels must be 0..{classes - 1} or {ignore_index} (ignored); got {values[wrong][0]}"
        )


def check_present(present: Tensor | None, x: Tensor) -> None:
    """present is a bool mask [M, B] on the device of x [M, B, ...]."""
    if present is None:
        return
    check_tensor("present", present, (torch.bool,), "[M, B]")
    check_shape("present", present, tuple(x.shape[:2]), "[M, B]")
    check_same_device(x=x, present=present)

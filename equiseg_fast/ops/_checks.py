"""Argument checks with one message style: the argument, what came, what is allowed.

Only metadata is looked at, so nothing waits for the device and the compiler sees no branch on data;
labels alone have their values checked, where that costs neither (`has_values`).
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of labels. PyTorch has too few operators for uint16 to uint64, and bool is a mask.
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

_NUMBERS: Any = (float, int, Real)
_STRIDED = torch.strided

MAX_SIZE = 2**31 - 1
"""Largest size of a layer, or number of classes: what is beyond is a mistake, not a tensor."""


_NO_TORCHSCRIPT = (
    "torch.jit.trace, torch.jit.script and the ONNX export with dynamo=False are not supported: "
    "they would record the sizes of the example for good; use torch.export (for ONNX "
    "torch.onnx.export with dynamo=True)"
)


def refuse_torchscript(*_: object, **__: object) -> Any:
    """Raise what every operation and layer says to TorchScript."""
    raise RuntimeError(_NO_TORCHSCRIPT)


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], shape: str) -> None:
    """x is a dense tensor of one of the dtypes whose rank is the number of names in `shape`.

    shape: the documented shape, e.g. "[B, L, C]"; dots are any number of dimensions, as in
    "[..., C]". Raises TypeError or ValueError, and RuntimeError where `torch.jit.trace` is at work:
    every operation begins here.
    """
    if torch.jit.is_tracing():
        refuse_torchscript()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}; got {str(x.dtype)[6:]}")
    if x.layout is not _STRIDED or x.is_nested:
        check_dense(name, x)
    rank = shape.count(",") + 1
    if x.dim() != rank and not ("..." in shape and x.dim() >= rank - 1):
        raise ValueError(f"{name} must have shape {shape}; got {list(x.shape)}")


def check_memory(name: str, x: Tensor) -> None:
    """x is a dense tensor that holds values."""
    check_dense(name, x)
    if x.is_meta:
        raise ValueError(f"{name} must hold values; got a tensor on the meta device")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], shape: str) -> None:
    """x is a dense tensor of exactly the expected shape; `shape` names it for the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    if x.layout is not _STRIDED or x.is_nested:
        check_dense(name, x)
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {shape} = {list(expected)}; got {list(x.shape)}")


def check_dense(name: str, x: Tensor) -> None:
    """x is a tensor of whatever dtype and shape, and not sparse or nested."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.layout is not _STRIDED or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)[6:]
        raise TypeError(f"{name} must be a dense tensor; got a {layout} one")


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
    """value is an integer, of Python, NumPy or the compiler; a bool is none."""
    if not isinstance(value, (int, torch.SymInt, Integral)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")


def check_sizes(**sizes: Any) -> None:
    """Sizes and counts are integers of at least 1."""
    for name, size in sizes.items():
        check_integer(name, size)
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
        if size > MAX_SIZE:
            raise ValueError(f"{name} must be at most {MAX_SIZE}; got {size}")


def check_ignore_index(value: Any) -> None:
    """A label that counts for nothing: any integer that labels can hold."""
    check_integer("ignore_index", value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must be an integer of 64 bits; got {value}")


def check_seed(value: Any) -> None:
    """A seed, as torch.Generator takes it."""
    check_integer("seed", value)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits; got {value}")


def number(name: str, value: Any) -> float:
    """value as a float: a finite number of Python or NumPy, and no bool.

    A tensor is none: taking its value would wait for the device, and lose its gradient.
    """
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        x = float(value)
    except OverflowError as error:  # of an int that is too large
        raise ValueError(f"{name} must be finite; got {value}") from error
    if not x - x == 0:  # nor are these infinity and NaN; for the compiler it holds of all others
        raise ValueError(f"{name} must be finite; got {value}")
    return x


def positive(name: str, value: Any) -> float:
    """A number above 0 as a float: an eps, a temperature and their like."""
    x = number(name, value)
    if not x > 0:
        raise ValueError(f"{name} must be positive; got {value}")
    return x


def rate(name: str, value: Any) -> float:
    """The probability of leaving something out, in [0, 1), as a float."""
    x = number(name, value)
    if not 0.0 <= x < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {value}")
    return x


def check_flags(**flags: Any) -> None:
    """Flags are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {flag!r}")


def check_callable(**functions: Any) -> None:
    """Functions, or what can be called like one."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function; got {function!r}")


def check_strings(**strings: Any) -> None:
    """Strings, which have something to say."""
    for name, value in strings.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")
        if not value.strip():
            raise ValueError(f"{name} must not be empty; got {value!r}")


def check_sequence(name: str, value: Any, kind: type, of: str) -> None:
    """A list, a tuple or the like of one kind of elements; of: what to call those.

    A string is none: its characters are no names.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of {of}; got {value!r}")
    for element in value:
        if not isinstance(element, kind) or isinstance(element, bool):
            raise TypeError(f"{name} must be a sequence of {of}; got {element!r} in it")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """value is one of the allowed strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


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
            f"labels must be 0..{classes - 1} or {ignore_index} (ignore_index); "
            f"got {values[wrong][0]}"
        )


def check_order(order: Tensor, name: str, x: Tensor) -> None:
    """order is a permutation `[M]` of the modalities of x `[M, ...]`; name: what x is called.

    Its values are looked at only where that waits for nothing.
    """
    check_tensor("order", order, (torch.int64,), "[M]")
    check_shape("order", order, (x.shape[0],), "[M]")
    check_same_device(**{name: x, "order": order})
    if has_values(order) and sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(
            f"order must be a permutation of 0..{len(order) - 1}; got {order.tolist()}"
        )


def check_present(present: Tensor | None, x: Tensor) -> None:
    """present is a bool mask [M, B] on the device of x [M, B, ...]."""
    if present is None:
        return
    check_tensor("present", present, (torch.bool,), "[M, B]")
    check_shape("present", present, tuple(x.shape[:2]), "[M, B]")
    check_same_device(x=x, present=present)

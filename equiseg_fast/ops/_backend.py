"""Which implementation of an operation runs, and why.

Three backends compute the same mathematics: `"triton"` (our fused kernels), `"torch"` (the fastest
composition of stock PyTorch operators) and `"reference"` (`equiseg_fast.reference`). `"auto"` takes
triton on a GPU when it can, else torch. A choice is made, in this order, by the `backend` argument,
the `use_backend(...)` around the call, the environment variable EQUISEG_FAST_BACKEND (the default
of the whole process), and `"auto"`.
An explicit choice never falls back: what it cannot do it refuses, with the reasons.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import _checks

BACKENDS = ("triton", "torch", "reference")
CHOICES = (*BACKENDS, "auto")

# Plain module globals, read once: the compiler guards on them instead of breaking the graph.
TRITON_INSTALLED = find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_default = os.environ.get("EQUISEG_FAST_BACKEND", "auto")

Reasons = list[str]


_checks.check_choice("EQUISEG_FAST_BACKEND", _default, CHOICES)

_blocks: ContextVar[tuple[tuple[str], ...]] = ContextVar("equiseg_fast_blocks", default=())
_choice: ContextVar[Any] = ContextVar("equiseg_fast_choice")
_traced: str | None = None  # by a block inside of what the compiler traces; None at run time


class _Here:
    """Looks up the choice of this thread or task.

    The compiler cannot trace `ContextVar.get`, but it takes a property whose getter is built in for
    a plain attribute, and guards on what it reads. Without a choice, `get` returns the object.
    """

    choice = property(_choice.get)


_here = _Here()


def current() -> str:
    """What decides without a `backend` argument: the choice around the call, else the process's."""
    choice = _traced or _here.choice
    return _default if choice is _here else choice


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the backend of every operation called inside the `with` block.

    backend: "triton", "torch", "reference" or "auto". Raises ValueError on any other name, and
        TypeError on what is none.

    The choice holds in this thread, or in this asyncio task and those that it starts inside; other
    threads, also those that are started inside, keep theirs. Where blocks overlap, the one entered
    last that is still open decides. A backward runs on the backend of its forward, wherever it is
    called. Activation checkpointing, however, runs the forward again in the thread of the backward,
    which on a GPU belongs to autograd and knows no choice: open the block inside the function that
    is checkpointed, or set EQUISEG_FAST_BACKEND.
    """
    global _traced
    _checks.check_choice("backend", backend, CHOICES)
    if torch.compiler.is_dynamo_compiling():
        outer, _traced = _traced, backend
        try:
            yield
        finally:
            _traced = outer
        return
    block = (backend,)  # a tuple, to be told from others with the same choice
    _enter((*_blocks.get(), block))
    try:
        yield
    finally:
        _enter(tuple(b for b in _blocks.get() if b is not block))


def _enter(blocks: tuple[tuple[str], ...]) -> None:
    _blocks.set(blocks)
    _choice.set(blocks[-1][0] if blocks else _here)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)


def triton_reasons(*tensors: Tensor) -> Reasons:
    """Why the Triton kernels cannot take these tensors at all; empty when they can."""
    first = tensors[0]
    runs = _is_new(first.device) if first.is_cuda else INTERPRET and first.is_cpu
    if runs and TRITON_INSTALLED and not loses_derivatives():
        for x in tensors:
            if x.dtype not in _DTYPES and x.is_floating_point():
                break
        else:
            return []
    return _all_reasons(*tensors)


@cache
def _capability(gpu: torch.device) -> tuple[int, int]:
    # Looked up, it takes as long as all checks of a call.
    return torch.cuda.get_device_capability(gpu)


def _is_new(gpu: torch.device) -> bool:
    # The compiler warns of caches, and asks once anyway.
    compiling = torch.compiler.is_compiling()
    return (torch.cuda.get_device_capability if compiling else _capability)(gpu) >= _OLDEST


def loses_derivatives() -> bool:
    """The compiler takes the forward of an `autograd.Function` without its backward if only a
    transform inside of what it compiles asks for derivatives."""
    return torch._C._are_functorch_transforms_active() and torch.compiler.is_compiling()


def _all_reasons(*tensors: Tensor) -> Reasons:
    reasons = []
    if loses_derivatives():
        reasons.append("torch.compile would lose its derivatives under torch.func transforms")
    if not TRITON_INSTALLED:
        reasons.append("triton is not installed")
    device = tensors[0].device.type
    if device != "cuda" and not (INTERPRET and device == "cpu"):
        reasons.append(
            f"the tensors are on {device!r}, the kernels need 'cuda' "
            "(or the CPU with TRITON_INTERPRET=1 set before equiseg_fast is imported)"
        )
    if device == "cuda" and not _is_new(tensors[0].device):
        reasons.append("the GPU is older than compute capability 8.0")
    reasons.extend(
        f"dtype {dtype} is not one of float32, float16, bfloat16"
        for dtype in dict.fromkeys(t.dtype for t in tensors if t.is_floating_point())
        if dtype not in _DTYPES
    )
    return reasons


# op name -> function of the op's own arguments that returns the reasons against Triton
_REASONS: dict[str, Callable[..., Reasons]] = {}


def register_reasons(op: str, function: Callable[..., Reasons]) -> None:
    _REASONS[op] = function


class _Question(Exception):
    """In the place of a backend: what would run, and why? `resolve` raises it with the answer."""

    def __init__(self, requested: str | None) -> None:
        self.requested = requested
        self.answer = ""


def resolve(op: str, requested: Any, device: torch.device, *args: object, **kwargs: object) -> str:
    """The backend that runs `op` on a device; args, kwargs: those that its reasons look at.

    Raises ValueError for an unknown name and for an explicit "triton" with reasons against it.
    """
    choice = current() if requested is None else requested
    if not isinstance(choice, str) or choice not in CHOICES:
        if isinstance(requested, _Question):
            requested.answer = _explain(op, requested.requested, device, *args, **kwargs)
            raise requested
        _checks.check_choice("backend", requested, CHOICES)
    if choice == "auto":
        if device.type != "cuda" or _REASONS[op](*args, **kwargs):
            return "torch"
        return "triton"
    if choice == "triton" and (reasons := _REASONS[op](*args, **kwargs)):
        raise ValueError(f"backend 'triton' cannot run {op}: " + "; ".join(reasons))
    return choice


def choice_for(op: str, *args: object) -> tuple[str, str]:
    """The current choice, and the backend it comes to for these arguments of `op` (or "none")."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    try:
        return current(), resolve(op, None, device, *args)
    except ValueError:
        return current(), "none"


def explain(op: str, *args: object, **kwargs: object) -> str:
    """Say in words which backend `op` would take for these arguments, and why not another.

    op: the name of a public operation, e.g. "attention"; args and kwargs as for the call itself,
    which are checked as there. Nothing is computed. Raises ValueError for an unknown operation, and
    what the call would raise for bad arguments.
    """
    _checks.check_choice("op", op, sorted(_REASONS))
    question = _Question(kwargs.pop("backend", None))
    try:
        getattr(import_module(__package__), op)(*args, **kwargs, backend=question)
    except _Question:
        return question.answer
    raise AssertionError(f"{op} never asked for a backend")


def _explain(op: str, requested: Any, device: torch.device, *args: object, **kwargs: object) -> str:
    choice = current() if requested is None else requested
    reasons = _REASONS[op](*args, **kwargs)
    try:
        chosen = f"{op} runs on backend {resolve(op, choice, device, *args, **kwargs)!r}"
    except ValueError as error:
        chosen = f"{op} raises ValueError: {error}"
    return "\n".join(
        [
            f"{chosen} (choice {choice!r}, device {str(device)!r})",
            *(f"  triton: {reason}" for reason in reasons or ["usable"]),
            "  torch: usable",
            "  reference: usable",
        ]
    )

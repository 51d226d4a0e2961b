"""How an operation becomes known to PyTorch: schema, kernels, fake, autograd and the autocast rule.

`define` + `impl` + `register_fake` (`register`) under one thin `autograd.Function` per operation
(`differentiable`): opaque to the compiler, clean under opcheck, and cheaper to call than the
decorators built on top of them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from . import _backend
from ._checks import has_values, is_transformed

_LIBRARY = Library("equiseg_fast", "FRAGMENT")
_COMPLIANT = (torch.Tag.pt2_compliant_tag,)
_OPERATIONS = torch.ops.equiseg_fast

LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""What launches the kernels of each registered operation, by name. For inspection; call the
operation instead."""

FLOPS: dict[str, Callable[..., int]] = {}
"""How many FLOPs each registered operation counts for in `_flops`, by name."""


def register(
    name: str,
    schema: str,
    *,
    kernels: str,
    torch: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] = lambda *_, **__: 0,
) -> Any:
    """Define `equiseg_fast::<name><schema>` and return its callable overload.

    kernels is the file of `equiseg_fast.kernels` whose function `name` launches ours; it serves
    CUDA, and the CPU when Triton interprets. torch is the same computation in stock PyTorch
    operators; it serves the CPU otherwise, so that a model exported with the kernels inside still
    runs there. fake returns empty tensors of exact shape, dtype, strides. flops takes the arguments
    with shapes in place of tensors, and returns what `_flops` defines.
    """

    @cache  # lazy, because it imports Triton
    def launcher() -> Callable[..., Any]:
        if _backend.INTERPRET:
            import_module("equiseg_fast.kernels._interpreter").install()
        return getattr(import_module(f"equiseg_fast.kernels.{kernels}"), name)

    def triton(*args: Any) -> Any:
        return launcher()(*args)

    def cpu(*args: Any) -> Any:
        return (launcher() if _backend.INTERPRET else torch)(*args)

    LAUNCHERS[name] = triton
    FLOPS[name] = flops
    _LIBRARY.define(name + schema, tags=_COMPLIANT)
    _LIBRARY.impl(name, triton, "CUDA")
    _LIBRARY.impl(name, cpu, "CPU")
    register_fake(f"equiseg_fast::{name}", fake, lib=_LIBRARY)
    return getattr(_OPERATIONS, name).default


_NO_FORWARD_MODE = (
    "forward-mode differentiation (jvp, jacfwd, linearize, torch.func.hessian, dual tensors) is "
    "not supported by this backend; use reverse mode (grad, vjp, jacrev, jacrev of jacrev), or "
    'backend="reference"'
)


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` whose arguments are all given and by position.

    The `apply` of PyTorch looks up the signature of `forward` on every call, to fill in defaults:
    three times the work of all the rest.

    All transforms of `torch.func` work but those of forward mode, which are refused.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        try:
            if torch._C._are_functorch_transforms_active():
                return super().apply(*args)
            return super(torch.autograd.Function, cls).apply(*args)
        except NotImplementedError as error:
            # The compiler refuses classes that have a `jvp`, even one that does nothing but this.
            if "jvp" not in str(error):
                raise
            raise RuntimeError(_NO_FORWARD_MODE) from None

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        """A loop: one call per example."""

        def call(i: int) -> Any:
            mapped = zip(args, in_dims, strict=True)
            return cls.apply(*(x if dim is None else x.select(dim, i) for x, dim in mapped))

        if info.batch_size == 0:
            raise RuntimeError("vmap over no examples at all is not supported by this backend")
        outputs = [call(i) for i in range(info.batch_size)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def as_result(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype, contiguous, as a `Function` returns it: without no-op calls, and no view, which
    could not be modified in place.

    The compiler of PyTorch 2.11 treats results of no-op calls, views and in-place operators as
    different tensors, and drops the gradient.
    """
    if x.dtype != dtype:
        x = x.to(dtype)
    if not x.is_contiguous():
        return x.contiguous()
    if not torch.compiler.is_compiling() and x._is_view():
        return torch.ops.aten._unsafe_view(x, x.shape)
    return x


def _has_autocast(device: str) -> bool:
    # The question itself is one that the compiler of PyTorch 2.11 cannot trace.
    return device in ("cuda", "cpu") or torch.amp.is_autocast_available(device)


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of x."""
    # The string of a device takes longer to make than all the rest of this.
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A context in which nothing is cast, for statistics that are fp32 by definition."""
    if _has_autocast(device):
        # A compiled or exported program must record this; in eager mode it would be a slow no-op.
        if torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
            return torch.autocast(device, enabled=False)
    return nullcontext()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast cast fp32 and half-precision inputs to its dtype; fp64 stays as it is.

    Non-tensors pass through; the checks that follow reject them.
    """
    if not autocast_is_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    stays = (not isinstance(t, Tensor) or t.dtype == torch.float64 for t in tensors)
    return tuple(t if stay else t.to(dtype) for t, stay in zip(tensors, stays, strict=True))


def needs_grad(*tensors: Tensor) -> bool:
    """Whether the call has to go through the `autograd.Function`.

    Yes if autograd would record it, and under any transform: only the Function has rules for them
    or refuses, the bare operation would compute without derivatives.
    """
    if is_transformed():
        return True
    if torch.is_grad_enabled():
        for x in tensors:  # a loop costs half of `any` over a generator
            if x.requires_grad:
                return True
    return False


def empty_gradients(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Contiguous memory for the gradients that are needed, and `[0]` for the others: what every
    registered backward returns, and its fake."""
    return tuple(
        x.new_empty(x.shape if needed else (0,)) for x, needed in zip(tensors, needs, strict=True)
    )


def by_reference(*cotangents: Tensor | None) -> bool:
    """Whether a backward has to be done in operators that PyTorch itself can differentiate and
    transform (`reference_gradients`): for a graph of it, under transforms, and for cotangents that
    stand for several (`is_grads_batched`)."""
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    if is_transformed():
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor
    for g in cotangents:
        if g is not None and batched(g):
            return True
    return False


def reference_gradients(
    function: Callable[..., Any],
    args: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*args)` at the first of the arguments, one for each of `needs`; where
    gradients are enabled as a graph that can be differentiated again.

    function returns one tensor per cotangent; a cotangent may be None. Inputs that `needs` no
    gradient get None, and so may what the given outputs do not depend on. This is the double
    backward of every operation, its first backward done over in the reference, and its backward
    under transforms.
    """
    given = [i for i, g in enumerate(cotangents) if g is not None]
    wanted = [i for i, needed in enumerate(needs) if needed]

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(wanted, chosen, strict=True))
        ys = function(*(at.get(i, x) for i, x in enumerate(args)))
        return (ys,) if isinstance(ys, Tensor) else tuple(ys[i] for i in given)

    again = torch.is_grad_enabled()
    # The inputs were cast when the operation was called.
    with without_autocast(args[0].device.type), torch.enable_grad():
        # Views stand for the inputs: if one input was computed from another, only the direct
        # dependence of the operation itself may be differentiated here.
        views = [args[i].view_as(args[i]) for i in wanted]
        gs = tuple(cotangents[i] for i in given)
        if all(x.requires_grad for x in views):
            found = torch.autograd.grad(
                outputs(*views), views, gs, create_graph=again, allow_unused=True
            )
        else:
            # The transform that the operation was called in has ended, as in `torch.func.vjp`.
            found = torch.func.vjp(outputs, *views)[1](gs)
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(i) for i in range(len(needs)))


Saves = Callable[[Sequence[Any], Any], tuple[Sequence[Tensor | None], Sequence[Any]]]


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    reference: Callable[..., Any] | None,
    *,
    name: str,
    tensors: int,
    outputs: int = 1,
    summands: int = 1,
    saves: Saves | int | None = None,
    without_gradients: Callable[..., Any] | None = None,
    loops: bool = False,
) -> Callable[..., Any]:
    """`forward`, whose arguments are all given and by position, with gradients.

    backward takes the cotangents (None where there is none, but never all None), then what was
        saved, then one flag per gradient that says whether it is needed, and returns one gradient
        per flag; with a single differentiable input no flag is passed. Gradients that are not
        needed are dropped.
    reference takes what was saved and returns the outputs; it is used where PyTorch has to
        differentiate or transform the backward (`by_reference`). None if backward itself can be
        differentiated, and then always is.
    name: of the node in the graph, as profilers show it.
    tensors: number of leading arguments that may require a gradient. outputs: number of leading
        outputs that are differentiable. summands: number of leading arguments whose sum is the
        first output, and which share one gradient.
    saves: number of leading arguments that are saved as tensors (default: `tensors`), the others
        being kept as they are; or a function of the arguments and the result of forward that
        returns the tensors to save, those with gradients first, and the rest.
    without_gradients: called instead of `forward` where nothing is recorded.
    loops: backward loops depend on sizes or values of tensors, which nothing can trace.
    """
    count = saves if isinstance(saves, int) else tensors
    choose = saves if callable(saves) else None

    class Differentiable(Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if choose is None:
                ctx.save_for_backward(*inputs[:count])
                ctx.others = inputs[count:]
            else:
                saved, ctx.others = choose(inputs, output)
                ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(False)
            if isinstance(output, tuple):
                constants = output[outputs:]
                if summands > 1 and True not in [x.requires_grad for x in inputs[:summands]]:
                    constants = (output[0], *constants)
                if constants:
                    ctx.mark_non_differentiable(*constants)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
            every = ctx.needs_input_grad
            needs = wanted = every[:tensors]
            cotangents = cotangents[:outputs]
            for g in cotangents:
                if g is not None:
                    break
            else:
                return (None,) * len(every)
            if summands > 1:
                wanted = (any(needs[:summands]), *needs[summands:])
            saved: Sequence[Any] = (*ctx.saved_tensors, *ctx.others)
            if reference is not None and (
                by_reference(*cotangents) or (loops and not has_values(cotangents[0]))
            ):
                grads = reference_gradients(reference, saved, cotangents, wanted)
            elif tensors == 1:
                grads = (backward(*cotangents, *saved),)
            else:
                grads = backward(*cotangents, *saved, *wanted)
            if summands > 1:
                grads = (*(grads[0],) * summands, *grads[1:])
            if False in needs:
                grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
            return (*grads, *(None,) * (len(every) - tensors))

    function: Any = type(name, (Differentiable,), {})
    apply = super(torch.autograd.Function, function).apply  # without looking for transforms
    bare = without_gradients or forward

    def call(*args: Any) -> Any:
        if is_transformed():
            # The compiler would run the forward alone there, too, but stumbles over its signature.
            return (bare if _backend.loses_derivatives() else function.apply)(*args)
        if torch.is_grad_enabled():  # `needs_grad`, inlined
            for x in args[:tensors]:
                if x.requires_grad:
                    # The compiler knows the `apply` of classes only.
                    return (function.apply if torch.compiler.is_compiling() else apply)(*args)
        return bare(*args)

    return call

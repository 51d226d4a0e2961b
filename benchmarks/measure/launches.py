"""What a GPU would be given, counted on tensors of the CPU or of "meta", which take no memory.

Everything runs as it would on a GPU but for our kernels, which are noted and left out (results do
not matter here). The number of calls does not depend on the size of the map.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.command.options import kernel_stems
from benchmarks.measure import kernel_work
from benchmarks.measure.kernel_work import Kernel, tensors_in
from equiseg_fast import use_backend
from equiseg_fast.ops import _backend, _registry

META = torch.device("meta")
H100 = (90, 132)
"""Architecture and number of SMs, as our launchers ask for them."""

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
            known = (self.dtype, torch.float32)
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.to(wanted) if x.dtype in known else x, (args, kwargs)
            )
        if name == "scaled_dot_product_attention" and args[0].element_size() == 2:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], **kwargs)[0]
        return func(*args, **kwargs)


@contextmanager
def on_meta(autocast: torch.dtype | None = None) -> Iterator[None]:
    """New tensors are on "meta", where autocast works as on CUDA. A benchmark's own autocast does
    nothing: this one is on everywhere inside, if it is (None or fp32: it is not).

    Where the host waits for a value it reads 1 or true, and boolean indices select everything.
    """
    mode = _Meta(None if autocast == torch.float32 else autocast)

    def region(device: str, dtype: Any = None, enabled: bool = True) -> AbstractContextManager[Any]:
        return nullcontext() if enabled else patch.object(mode, "dtype", None)

    with (
        patch.object(torch, "autocast", region),
        patch.object(torch, "get_autocast_dtype", lambda _: mode.dtype),
        patch.object(torch, "is_autocast_enabled", lambda *_: mode.dtype is not None),
        patch.object(_registry, "_has_autocast", lambda _: True),
        _config.patch(meta_nonzero_assume_all_nonzero=True),
        mode,
    ):
        yield


@contextmanager
def as_on_gpu(backend: str) -> Iterator[None]:
    """Operations of equiseg_fast take their tensors for those of a GPU. backend: of calls that
    choose none, as in `use_backend`."""

    def resolve(op: str, requested: str | None, _: Any, *args: Any, **kwargs: Any) -> str:
        return before(op, requested, torch.device("cuda"), *args, **kwargs)

    before = _backend.resolve
    with (
        patch.object(_backend, "resolve", resolve),
        patch.object(_backend, "triton_reasons", lambda *_: []),
        use_backend(backend),
    ):
        yield


FUSED = {"pointwise", "transposing copy"}
"""Kinds of kernels that a floor leaves out: a compiler can fuse them into a neighbour."""


@dataclass(frozen=True)
class Call:
    """A launch of ours, or a call of a stock operator that does more than make a view or allocate,
    with the kernels that CUDA makes of it.

    phase: "fwd", or "bwd" for what autograd runs. works: what a floor is made of.
    """

    name: str
    ours: bool
    phase: str
    kernels: tuple[Kernel, ...]
    works: tuple[Work, ...]


class _Counter(TorchDispatchMode):
    """Notes calls in their order; see `counting`."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.whole = whole

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        ours = func.namespace == "equiseg_fast"
        if not (ours and self.whole):
            with self:
                if ours:
                    return _registry.LAUNCHERS[name](*args, **kwargs)
                # Inside our operations nothing has taken composite ones like `contiguous` apart.
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        out = func(*args, **kwargs)
        if ours:
            self._add(name, True, (), (_operation(func, args, out),))
        elif kernel_work.launches_kernel(func):
            kernels = kernel_work.stock(func, args, kwargs, out)
            own = [kernel for kernel in kernels if kernel.kind not in FUSED]
            works = (Work(k.bytes, k.matrix + k.vector, exps=k.exps) for k in own)
            self._add(name, False, kernels, tuple(works))
        return out

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        """Instead of a launch."""
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        self._add(name, True, (kernel_work.ours(name, grid, args, options),))

    def _add(
        self, name: str, ours: bool, kernels: tuple[Kernel, ...], works: tuple[Work, ...] = ()
    ) -> None:
        phase = "fwd" if torch._C._current_graph_task_id() == -1 else "bwd"
        self.calls.append(Call(name, ours, phase, kernels, works))


def _operation(func: Any, args: Sequence[Any], out: Any) -> Work:
    """The cost of a registered operation: the formula of its case for the sizes of its tensors."""
    stem, _, way = func.overloadpacket.__name__.rpartition("_")
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    x = max((t for t in tensors_in((args, out)) if t.is_floating_point()), key=Tensor.numel)
    sizes: Any = SimpleNamespace()
    if stem == "attention":
        sizes.rows, sizes.tokens, sizes.heads, width = given["q"].shape
        sizes.keys, sizes.channels = given["k"].shape[1], sizes.heads * width
    elif stem == "upsample_cross_entropy":
        sizes.batch, sizes.height, sizes.width = given["labels"].shape
        sizes.tokens = given["logits"].shape[2:].numel()
    else:
        *rows, sizes.tokens, sizes.channels = x.shape
        sizes.modalities, sizes.batch, sizes.rows = rows[0], rows[-1], torch.Size(rows).numel()
        if stem == "depthwise_conv_gelu":
            sizes.channels /= 4  # the formula takes those of the block around it
    formula = operations()[stem].cost
    assert formula is not None
    return formula(sizes, x.element_size()).of(way)[0]


@contextmanager
def launching(launch: Callable[..., None], facts: tuple[int, int]) -> Iterator[None]:
    """Our launchers call this, and choose tiles for such a device (see `H100`)."""
    with ExitStack() as stack:
        for stem in kernel_stems():
            module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
            stack.enter_context(patch.object(module, "launch", launch))
            if hasattr(module, "device_facts"):
                stack.enter_context(patch.object(module, "device_facts", lambda _: facts))
        yield


@contextmanager
def counting(facts: tuple[int, int] | None = None) -> Iterator[list[Call]]:
    """What is called inside, forward or backward, as if its tensors were on a GPU, in this order.

    facts: of the GPU, as in `H100`, whose launches are counted; None counts our operations as one
    call each, with the cost of their cases, and needs no Triton. What ours would compute is left
    uninitialised.
    """
    counter = _Counter(whole=facts is None)
    launches = launching(counter.launch, facts) if facts else nullcontext()
    with launches, as_on_gpu("triton"), counter:
        yield counter.calls


@cache
def _problem(op: Op, shape: Shape, dtype: torch.dtype) -> Problem:
    with on_meta():
        return op.build(shape, dtype, META, 0)


def run_case(op: Op, shape: Shape, dtype: torch.dtype, provider: str, backward: bool) -> None:
    """Call a provider on tensors of "meta"; backward: also for all gradients."""
    problem = _problem(op, shape, dtype)
    outputs = problem.calls[provider]()
    if backward:
        outputs = tuple(x for x in outputs if x.requires_grad)
        cotangents = [torch.empty_like(x) for x in outputs]
        torch.autograd.grad(outputs, list(problem.leaves.values()), cotangents)


@cache
def count(
    op: Op, shape: Shape, dtype: torch.dtype, provider: str, graph: bool,
    facts: tuple[int, int] | None = None,
) -> list[Call]:  # fmt: skip
    """The calls of one provider on one case at its full size.

    graph: whether one is recorded, with the backward to all leaves behind. facts: see `counting`.
    """
    autocast = None if op.scope == "operation" else dtype
    _problem(op, shape, dtype)  # before anything is counted
    with on_meta(autocast), torch.set_grad_enabled(graph), counting(facts) as calls:
        run_case(op, shape, dtype, provider, graph)
    return calls


def cost_of(op: Op, shape: Shape, itemsize: int) -> Cost:
    """What one call cannot do without: by the formula of an operation, of a network counted.

    The calls of a network, of operations of ours and of stock ones, each read their inputs from
    memory and write their outputs there; fusing two would need less. What is only elementwise or a
    copy is taken to be fused into a neighbour, and left out.
    """
    if op.cost is not None:
        return op.cost(shape, itemsize)
    if op.scope == "accelerated":  # the same encoder, in the words of others
        op = operations()["encoder"]
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    calls = count(op, shape, dtype, "triton", bool(_problem(op, shape, dtype).leaves))
    return Cost(*(tuple(w for c in calls if c.phase == p for w in c.works) for p in ("fwd", "bwd")))

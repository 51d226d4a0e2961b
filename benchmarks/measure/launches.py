"""What a GPU would be given, counted on tensors of the CPU or of "meta", which take no memory.

Everything runs as it would on a GPU but for our kernels, which are noted and left out (results do
not matter here). A stock operator counts as one call unless it only makes a view or allocates; the
kernels that CUDA makes of it are beside it (`kernel_work`). The number of calls does not depend on
the size of the map.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.command.options import kernel_stems
from benchmarks.measure import kernel_work
from benchmarks.measure.kernel_work import Kernel, tensors_in
from benchmarks.providers import baselines as baseline_model
from equiseg_fast import EQUISeg, use_backend
from equiseg_fast.ops import _backend
from equiseg_fast.ops._registry import LAUNCHERS

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


# ---- tensors without memory ---------------------------------------------------------------------


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
    if isinstance(values, Tensor) and values.dtype in (torch.float32, half):
        return values.to(wanted)
    if isinstance(values, dict):
        return {name: _cast(x, wanted, half) for name, x in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_cast(x, wanted, half) for x in values)
    return values


@contextmanager
def on_meta(autocast: torch.dtype | None = None) -> Iterator[None]:
    """New tensors are on "meta", where autocast works as on CUDA. A benchmark's own autocast does
    nothing: this one is on everywhere inside, if it is (None or fp32: it is not).

    Where the host waits for a value it reads 1 or true, and boolean indices select everything.
    """
    mode = _Meta(None if autocast == torch.float32 else autocast)
    before = torch.get_autocast_dtype

    @contextmanager
    def without(device: str) -> Iterator[None]:
        with patch.object(mode, "dtype", None):
            yield

    changes: list[tuple[Any, str, Any]] = [
        (torch, "autocast", lambda *_: nullcontext()),
        (torch, "get_autocast_dtype", lambda device: mode.dtype or before(device)),
    ]
    ours = {"autocast_is_on": lambda _: mode.dtype is not None, "without_autocast": without}
    for module in [m for name, m in sys.modules.items() if name.startswith("equiseg_fast")]:
        changes += [(module, name, ours[name]) for name in ours.keys() & vars(module).keys()]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        stack.enter_context(_config.patch(meta_nonzero_assume_all_nonzero=True))
        stack.enter_context(mode)
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


# ---- calls --------------------------------------------------------------------------------------

FUSED = {"pointwise", "transposing copy"}
"""Kinds of kernels that a floor leaves out: a compiler can fuse them into a neighbour."""


@dataclass(frozen=True)
class Call:
    """A launch of ours, or a call of a stock operator, with the kernels that CUDA makes of it.
    phase: "fwd", or "bwd" for what autograd runs. module: in whose forward it was called, or the
    node recorded that calls it. cost: of an operation of ours that was not looked into."""

    name: str
    ours: bool
    phase: str
    kernels: tuple[Kernel, ...]
    module: str = ""
    cost: Work | None = None

    @property
    def works(self) -> list[Work]:
        """What a floor is made of."""
        part = f"{self.module} {self.name}"
        if self.cost is not None:
            return [replace(self.cost, part=part)]
        return [
            Work(k.bytes, k.matrix + k.vector, exps=k.exps, part=part)
            for k in self.kernels
            if k.kind not in FUSED
        ]


class KernelCounter(TorchDispatchMode):
    """Notes calls in their order. whole: our operations count as one call each, with the cost of
    their cases, and Triton need not be installed; otherwise they are looked into."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.whole = whole
        self._inside = [""]
        self._recorded: dict[int, str] = {}

    @property
    def fused(self) -> Counter[str]:
        """Launches of ours by name."""
        return Counter(call.name for call in self.calls if call.ours)

    @property
    def stock(self) -> Counter[str]:
        """Calls of stock operators by name."""
        return Counter(call.name for call in self.calls if not call.ours)

    def kernels(self, phase: str = "") -> list[Kernel]:
        """Of one phase, or of all."""
        return [k for call in self.calls if phase in ("", call.phase) for k in call.kernels]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # The node of this call, if it has one, is the last that was made.
        self._recorded[torch._C._autograd._get_sequence_nr() - 1] = self._inside[-1]
        if func.namespace == "equiseg_fast" and self.whole:
            out = func(*args, **kwargs)
            self._add(name, True, (), _operation(func, args, out))
            return out
        with self:
            if func.namespace == "equiseg_fast":
                return LAUNCHERS[name](*args, **kwargs)
            # Inside our operations nothing has taken composite ones like `contiguous` apart yet.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if kernel_work.launches_kernel(func):
            self._add(name, False, kernel_work.stock(func, args, kwargs, out))
        return out

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        """Instead of a launch."""
        name = _name(kernel)
        self._add(name, True, (kernel_work.ours(name, grid, args, options),))

    def _add(
        self, name: str, ours: bool, kernels: tuple[Kernel, ...], cost: Work | None = None
    ) -> None:
        phase, module = "fwd", self._inside[-1]
        if torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            phase, module = "bwd", self._recorded.get(node._sequence_nr(), "") if node else ""
        self.calls.append(Call(name, ours, phase, kernels, module, cost))

    @contextmanager
    def naming(self, root: nn.Module | None) -> Iterator[None]:
        """Calls know the module that makes them, by its name in `root`."""
        names = {} if root is None else {module: name for name, module in root.named_modules()}
        called = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._inside.append(names.get(module, self._inside[-1]))
            try:
                return called(module, *args, **kwargs)
            finally:
                self._inside.pop()

        # Not by hooks: with those modules take the way that calls every module inside them.
        with patch.object(nn.Module, "__call__", call):
            yield


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
def launching(
    instead: Callable[[Callable[..., None]], Callable[..., None]],
    facts: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Our launchers call what this makes of their `launch`, and choose tiles for such a device."""
    with ExitStack() as stack:
        for stem in kernel_stems():
            module = importlib.import_module(f"equiseg_fast.kernels.{stem}")
            stack.enter_context(patch.object(module, "launch", instead(module.launch)))
            if facts and hasattr(module, "device_facts"):
                stack.enter_context(patch.object(module, "device_facts", lambda _: facts))
        yield


@contextmanager
def counting(facts: tuple[int, int] | None = None) -> Iterator[KernelCounter]:
    """Count what runs inside, forward or backward, as if its tensors were on a GPU.

    Tensors are on the CPU or on "meta"; what our kernels would compute is left uninitialised. The
    Triton backend is the default. facts: (architecture, number of SMs) of the GPU, for example
    (90, 132); None for the choices of the interpreter.
    """
    counter = KernelCounter()
    with launching(lambda _: counter.launch, facts), as_on_gpu("triton"), counter:
        yield counter


@contextmanager
def counting_operations(root: nn.Module | None = None) -> Iterator[KernelCounter]:
    """As `counting`, with operations of ours as one call each. root: names the modules of calls."""
    counter = KernelCounter(whole=True)
    with as_on_gpu("triton"), counter.naming(root), counter:
        yield counter


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

    graph: whether one is recorded, with the backward to all leaves behind it. facts: as for
    `counting`; None counts our operations as one call each, with the cost of their cases.
    """
    root = _problem(op, shape, dtype).root
    autocast = None if op.scope == "operation" else dtype
    with (
        on_meta(autocast),
        torch.set_grad_enabled(graph),
        counting(facts) if facts else counting_operations(root) as counter,
    ):
        run_case(op, shape, dtype, provider, graph)
    return counter.calls


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


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What our kernels are launched with inside, each once: name, tile and launch options."""
    seen: list[str] = []

    def noted(launch: Callable[..., None], kernel: Any, *args: Any, **options: Any) -> None:
        tile = (f"{k}={v}" for k, v in options.items() if k.startswith(("BLOCK", "num_")))
        if (text := " ".join([_name(kernel), *tile])) not in seen:
            seen.append(text)
        launch(kernel, *args, **options)

    with launching(lambda launch: partial(noted, launch)):
        yield seen


def _name(kernel: Any) -> str:
    return kernel.__name__.strip("_").removesuffix("_kernel")


# ---- the cross-modal block, for reports ---------------------------------------------------------

MODALITIES = 4
SIZE = 8
"""Height and width of the map."""


@dataclass(frozen=True)
class Row:
    """Kernels of one forward of a part of EQUISeg-B0, in inference with all modalities."""

    stage: int
    part: str
    provider: str
    fused: int
    stock: int

    @property
    def total(self) -> int:
        return self.fused + self.stock


def cross_modal_blocks(stages: Iterable[int] = (1, 2, 3, 4)) -> list[Row]:
    """Cross-modal blocks and the gates behind them: the eager baseline, ours, and ours folded."""
    model = EQUISeg.from_name("b0", num_classes=25, drop_path=0.0, head_dropout=0.0).eval()
    folded = EQUISeg.from_name("b0", num_classes=25).fold_()
    size = (SIZE, SIZE)
    rows = []
    for s in (stage - 1 for stage in stages):
        x, y = torch.randn(2, MODALITIES, 1, SIZE * SIZE, model.config.dims[s])
        maps = [tokens.mT.unflatten(-1, size).contiguous() for tokens in x]
        block, eager = model.fusion[s], baseline_model
        calls: dict[tuple[str, str], Callable[[], Any]] = {
            ("block", "baseline"): partial(eager.cross_modal_block, block, maps, list(y)),
            ("block", "ours"): partial(block, x, y, *size),
            ("block", "ours, folded"): partial(folded.fusion[s], x, y, *size),
            ("gate", "baseline"): partial(eager.balance, model.gates[s], list(y)),
            ("gate", "ours"): partial(model._balance, s, y, None),
        }
        for (part, provider), call in calls.items():
            with torch.no_grad(), counting() as counter:
                call()
            fused, stock = counter.fused.total(), counter.stock.total()
            rows.append(Row(s + 1, part, provider, fused, stock))
    return rows

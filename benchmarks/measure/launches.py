"""What a GPU would be given: launches of ours plus calls of stock operators, and their work.

Counted on tensors of the CPU or of "meta": everything runs as it would on a GPU but for our
kernels, which are noted and left out (results do not matter here). A stock operator counts as one
call unless it only makes a view or allocates; the kernels that CUDA makes of it, with bytes and
FLOPs, are beside it (`kernel_work`). The number of calls does not depend on the size of the map.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command.options import ROOT
from benchmarks.measure import kernel_work
from benchmarks.measure.kernel_work import Kernel
from benchmarks.providers import baseline_model
from equiseg_fast import EQUISeg, use_backend
from equiseg_fast.ops import _backend
from equiseg_fast.ops._registry import LAUNCHERS

MODALITIES = 4
KERNELS = ROOT / "kernels"
SIZE = 8
"""Height and width of the map."""


def kernel_stems() -> list[str]:
    """The kernel files, each of which has `offline_entries(arch)`."""
    return sorted(p.stem for p in KERNELS.glob("*.py") if not p.stem.startswith("_"))


@dataclass(frozen=True)
class Call:
    """A launch of ours, or a call of a stock operator, with the kernels that CUDA makes of it.
    phase: "fwd", or "bwd" for what autograd runs."""

    name: str
    ours: bool
    phase: str
    kernels: tuple[Kernel, ...]


class KernelCounter(TorchDispatchMode):
    """Notes calls in their order. Our operations are looked into instead of counted themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

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

    def _add(self, name: str, ours: bool, kernels: tuple[Kernel, ...]) -> None:
        phase = "fwd" if torch._C._current_graph_task_id() == -1 else "bwd"
        self.calls.append(Call(name, ours, phase, kernels))


@contextmanager
def _launching(
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
    Triton backend is the default. facts: (architecture, multiprocessors) of the GPU, for example
    (90, 132); None for the choices of the interpreter.
    """
    counter, resolve = KernelCounter(), _backend.resolve

    def on_gpu(op: str, requested: str | None, _: Any, *args: Any, **kwargs: Any) -> str:
        return resolve(op, requested, torch.device("cuda"), *args, **kwargs)

    with (
        _launching(lambda _: counter.launch, facts),
        patch.object(_backend, "resolve", on_gpu),
        patch.object(_backend, "triton_reasons", lambda *_: []),
        use_backend("triton"),
        counter,
    ):
        yield counter


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What our kernels are launched with inside, each once: name, tile and launch options."""
    seen: list[str] = []

    def noted(launch: Callable[..., None], kernel: Any, *args: Any, **options: Any) -> None:
        tile = {k: v for k, v in options.items() if k.startswith(("BLOCK", "num_"))}
        text = " ".join([_name(kernel), *(f"{k}={v}" for k, v in tile.items())])
        if text not in seen:
            seen.append(text)
        launch(kernel, *args, **options)

    with _launching(lambda launch: partial(noted, launch)):
        yield seen


def _name(kernel: Any) -> str:
    return kernel.__name__.strip("_").removesuffix("_kernel")


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
    for stage in stages:
        s = stage - 1
        x, y = torch.randn(2, MODALITIES, 1, SIZE * SIZE, model.config.dims[s])
        maps = [tokens.mT.unflatten(-1, size).contiguous() for tokens in x]
        calls: list[tuple[str, str, Callable[[], Any]]] = [
            (
                "block",
                "baseline",
                partial(baseline_model.cross_modal_block, model.fusion[s], maps, list(y), *size),
            ),
            ("block", "ours", partial(model.fusion[s], x, y, *size)),
            ("block", "ours, folded", partial(folded.fusion[s], x, y, *size)),
            ("gate", "baseline", partial(baseline_model.balance, model.gates[s], list(y))),
            ("gate", "ours", partial(model._balance, s, y, None)),
        ]
        for part, provider, call in calls:
            with torch.no_grad(), counting() as counter:
                call()
            rows.append(Row(stage, part, provider, counter.fused.total(), counter.stock.total()))
    return rows

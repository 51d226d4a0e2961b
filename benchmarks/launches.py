"""How many kernels a GPU would be given: launches of ours plus calls of stock operators.

Counted on the CPU: everything runs as it would on a GPU but for our kernels, which are counted and
left out (results do not matter here). A stock operator counts as one kernel, the least it can be,
unless it only makes a view or allocates. The count does not depend on the size of the map.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import baseline_model
from benchmarks.resources import kernel_stems
from equiseg_fast import EQUISeg, use_backend
from equiseg_fast.ops import _backend
from equiseg_fast.ops._registry import LAUNCHERS

MODALITIES = 4
SIZE = 8
"""Height and width of the map."""

NO_KERNEL = {
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "_reshape_alias", "_unsafe_view",
}  # fmt: skip


class KernelCounter(TorchDispatchMode):
    """Counts kernels by name. Our operations are looked into instead of counted themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: Counter[str] = Counter()
        self.stock: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        with self:
            if func.namespace == "equiseg_fast":
                return LAUNCHERS[name](*args, **(kwargs or {}))
            # Inside our operations nothing has taken composite ones like `contiguous` apart yet.
            result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if not func.is_view and name not in NO_KERNEL:
            self.stock[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, *_: Any, **__: Any) -> None:
        """Instead of a launch."""
        self.fused[_name(kernel)] += 1


@contextmanager
def _launching(instead: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Our launchers call what this makes of their `launch`."""
    modules = [importlib.import_module(f"equiseg_fast.kernels.{stem}") for stem in kernel_stems()]
    before = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = instead(module.launch)
        yield
    finally:
        for module, launch in zip(modules, before, strict=True):
            module.launch = launch


@contextmanager
def counting() -> Iterator[KernelCounter]:
    """Count what runs inside, forward or backward, on CPU tensors and the Triton backend.

    What our kernels would compute is left uninitialised.
    """
    counter = KernelCounter()
    interpret = _backend.INTERPRET
    try:
        _backend.INTERPRET = True  # so that tensors on the CPU are taken for ours
        with _launching(lambda _: counter.launch), use_backend("triton"), counter:
            yield counter
    finally:
        _backend.INTERPRET = interpret


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

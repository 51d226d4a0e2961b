"""What can be measured: shapes, problems, operations, providers, suites."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost import Cost
from benchmarks.timing import MODES
from equiseg_fast import explain
from equiseg_fast.models.config import HEADS, SR_RATIOS, VARIANTS

STEMS = (
    "attention",
    "depthwise",
    "mix_ffn",
    "norm",
    "query_hub",
    "pooling_mixer",
    "guided_gate",
    "prototypes",
    "losses",
    "encoder",
    "model",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 25

PROVIDERS = {
    "baseline": "eager PyTorch as public models write it (benchmarks/baselines.py)",
    "reference": "equiseg_fast.reference, the mathematics in plain PyTorch",
    "torch": "backend 'torch', the fastest composition of stock operators",
    "triton": "backend 'triton'; for the model the kernels that exist, stock operators elsewhere",
    "compile": "torch.compile of the torch backend",
    "sdpa_flash": "scaled_dot_product_attention, FlashAttention backend",
    "sdpa_efficient": "scaled_dot_product_attention, memory-efficient backend",
    "transformers": "SegformerModel of transformers, eager",
    "sdpa_cudnn": "scaled_dot_product_attention, cuDNN backend",
}
COMMON_PROVIDERS = ("baseline", "reference", "torch", "triton", "compile")


class Unsupported(Exception):
    """A provider that cannot do a case; the message says why."""


@dataclass(frozen=True)
class Shape:
    """EQUISeg at one size; `stage` 1 to 4 picks the tensors of that stage, 0 is the whole model.

    height, width: of the images, multiples of 32, in pixels.
    """

    variant: str
    stage: int
    height: int
    width: int
    batch: int = 1
    modalities: int = 3

    @property
    def channels(self) -> int:
        return VARIANTS[self.variant][0][self.stage - 1]

    @property
    def heads(self) -> int:
        return HEADS[self.stage - 1]

    @property
    def stride(self) -> int:
        """Image pixels per token, along each side."""
        return 2 ** (self.stage + 1)

    @property
    def h(self) -> int:
        return self.height // self.stride

    @property
    def w(self) -> int:
        return self.width // self.stride

    @property
    def tokens(self) -> int:
        return self.h * self.w

    @property
    def keys(self) -> int:
        """Tokens after the spatial reduction of the attention."""
        ratio = SR_RATIOS[self.stage - 1]
        return (self.h // ratio) * (self.w // ratio)

    @property
    def rows(self) -> int:
        """Modalities and images in one batch."""
        return self.modalities * self.batch

    @property
    def label(self) -> str:
        stage = f" s{self.stage}" if self.stage else ""
        size = f"{self.height}x{self.width}"
        return f"{self.variant}{stage} {size} B{self.batch} M{self.modalities}"


Outputs = tuple[Tensor, ...]


@dataclass
class Problem:
    """One case made concrete on a device.

    calls: provider -> forward computation; what it returns is compared and differentiated.
    leaves: the tensors gradients are taken for, by name.
    cast: dtype -> (reference forward, its leaves) computed in that dtype, the oracle of parity.
    synchronising: providers that wait for the device, which no CUDA graph can capture.
    inputs: of the public operation, for `explain`. ignored: tensors that exist anyway and are not
        counted as saved for the backward.
    kinds, contraction, chain: of the results, see `equiseg_fast.testing.assert_parity`; the chain
        is that of the most naive provider, which adds all tokens one after the other.
    agreement: None for the tolerance policy; else the relative RMS error allowed for outputs and
        for gradients, against `cast` (whole models, which have no rounding floor of their own).
    """

    calls: dict[str, Callable[[], Outputs]]
    leaves: dict[str, Tensor]
    cast: Callable[[torch.dtype], tuple[Callable[[], Outputs], list[Tensor]]]
    synchronising: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[Tensor] = ()
    output_names: Sequence[str] = ("out",)
    kinds: Mapping[str, str] = field(default_factory=dict)
    contraction: int | None = None
    chain: int = 1
    agreement: tuple[float, float] | None = None


@dataclass(frozen=True)
class Op:
    """The declaration of one operation.

    name: in tables, that of its file but for models. function: the public function that `explain`
    knows, "" for models. build: (shape, dtype, device, seed) -> `Problem`, or `Unsupported`.
    cost: (shape, bytes per element) -> `Cost`, None where there is no formula. formula: bytes and
    FLOPs of the forward, in words. modes, stages: those that make sense.
    """

    name: str
    function: str
    build: Callable[[Shape, torch.dtype, torch.device, int], Problem]
    cost: Callable[[Shape, int], Cost] | None
    formula: str
    extra_providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    stages: tuple[int, ...] = (1, 2, 3, 4)

    @property
    def providers(self) -> tuple[str, ...]:
        return (*COMMON_PROVIDERS, *self.extra_providers)


def op_problem(
    inputs: Mapping[str, Any],
    differentiable: Sequence[str],
    functions: Mapping[str, Callable[..., Any]],
    reference: Callable[..., Any],
    **fields: Any,
) -> Problem:
    """A problem from functions of the same keyword arguments; fields: of `Problem`."""
    inputs = dict(inputs)
    for name in differentiable:
        inputs[name].requires_grad_()

    def cast(dtype: torch.dtype) -> tuple[Callable[[], Outputs], list[Tensor]]:
        moved = {
            name: x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        leaves = [moved[name].requires_grad_() for name in differentiable]
        return lambda: _as_tuple(reference(**moved)), leaves

    def bound(function: Callable[..., Any]) -> Callable[[], Outputs]:
        return lambda: _as_tuple(function(**inputs))

    return Problem(
        calls={name: bound(function) for name, function in functions.items()},
        leaves={name: inputs[name] for name in differentiable},
        cast=cast,
        inputs=inputs,
        ignored=[x for x in inputs.values() if isinstance(x, Tensor)],
        **fields,
    )


def _as_tuple(outputs: Any) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def backends(function: Callable[..., Any], baseline: Callable[..., Any]) -> dict[str, Any]:
    """The providers that every operation has."""

    def on(backend: str) -> Callable[..., Any]:
        return lambda **inputs: function(**inputs, backend=backend)

    return {
        "baseline": baseline,
        "reference": on("reference"),
        "torch": on("torch"),
        "triton": on("triton"),
        "compile": _compiled(function),
    }


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # One wrapper per function: a new one for every input set would be compiled every time.
    return lazily_compiled(lambda **inputs: function(**inputs, backend="torch"))


def lazily_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of it at the first call; importing the compiler takes seconds."""
    compiled = cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)


@cache
def operations() -> dict[str, Op]:
    """Every declaration in `benchmarks/cases`, by name."""
    found = [op for stem in STEMS for op in importlib.import_module(f"benchmarks.cases.{stem}").OPS]
    return {op.name: op for op in found}


@cache
def unavailable(op: Op, provider: str, device: torch.device) -> str:
    """Why a provider is out before anything is tried; empty if it is not."""
    if provider not in op.providers:
        return "no such implementation of this operation"
    if provider == "transformers":
        return "" if find_spec("transformers") else "transformers is not installed"
    if device.type != "cuda":
        if provider == "triton":
            return f"kernels are timed on a GPU only; the device is {device.type!r}"
        if provider in op.extra_providers:
            return f"this backend exists on a GPU only; the device is {device.type!r}"
    elif provider == "triton" and op.function:
        tiny = op.build(Shape("b0", 1, 64, 64), torch.float16, device, 0)
        return "; ".join(_reasons(op.function, tiny.inputs))
    return ""


def _reasons(function: str, inputs: Mapping[str, Any]) -> list[str]:
    lines = explain(function, **inputs).splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("  triton:")]
    return [reason for reason in found if reason != "usable"]


@dataclass(frozen=True)
class Suite:
    """Which cases, dtypes and modes, and how long each may take.

    ops: names of operations, empty for all. seconds: of timing, per case and mode, shared by all
    providers; rounds: at least and at most.
    """

    variants: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    modalities: tuple[int, ...]
    stages: tuple[int, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    seconds: float
    rounds: tuple[int, int]
    ops: tuple[str, ...] = ()

    def shapes(self, op: Op) -> list[Shape]:
        """The cases of one operation."""
        stages = [s for s in op.stages if s in self.stages] or op.stages
        grid = product(self.variants, self.sizes, self.batches, self.modalities, stages)
        return [Shape(v, s, *size, b, m) for v, size, b, m, s in grid]


SUITES = {
    "quick": Suite(
        variants=("b0",),
        sizes=((480, 736),),
        batches=(1,),
        modalities=(3,),
        stages=(2,),
        dtypes=("fp32",),
        modes=("fwd", "step"),
        providers=("baseline", "reference", "torch", "triton"),
        seconds=0.1,
        rounds=(2, 30),
        # All but the encoder, which is most of the model.
        ops=(
            "attention",
            "depthwise",
            "mix_ffn",
            "norm",
            "query_hub",
            "pooling_mixer",
            "guided_gate",
            "prototypes",
            "losses",
            "model",
            "training",
        ),
    ),
    "cpu": Suite(
        variants=("b0",),
        sizes=((512, 512),),
        batches=(1,),
        modalities=(1, 4),
        stages=(0,),
        dtypes=("fp32",),
        modes=("fwd", "step"),
        providers=("baseline", "transformers", "torch"),
        seconds=20.0,
        rounds=(7, 30),
        ops=("encoder", "model", "training"),
    ),
    "core": Suite(
        variants=("b0", "b2"),
        sizes=((512, 512), (1024, 1024)),
        batches=(1,),
        modalities=(4,),
        stages=(1, 2, 3, 4),
        dtypes=("bf16",),
        modes=("fwd", "step"),
        providers=tuple(PROVIDERS),
        seconds=0.2,
        rounds=(10, 100),
    ),
    "full": Suite(
        variants=("b0", "b2"),
        sizes=((512, 512), (1024, 1024), (480, 640), (1024, 1920)),
        batches=(1, 4, 8),
        modalities=(1, 2, 3, 4),
        stages=(1, 2, 3, 4),
        dtypes=("fp16", "bf16", "fp32"),
        modes=MODES,
        providers=tuple(PROVIDERS),
        seconds=0.4,
        rounds=(10, 200),
    ),
}

"""How an operation, or a larger part of the model, is declared; see `benchmarks/cases`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.common import data
from benchmarks.cases.common.cost import Cost
from benchmarks.cases.common.problem import Problem, Shape, Unsupported, op_problem
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baselines
from benchmarks.providers.provider import EVERYWHERE, backends, impossible
from equiseg_fast import explain, ops, reference

MODES = ("fwd", "fwd_train", "bwd", "step")
TRAINING_MODES = MODES[1:]

SCOPES = {
    "operation": "one function of equiseg_fast.ops",
    "block": "the cross-modal block and the gate of one stage",
    "stage": "one stage of the encoder, for all modalities",
    "encoder": "the four stages of the encoder",
    "accelerated": "encoders of others after accelerate_segformer or accelerate_module",
    "model": "EQUISeg, inference and training step",
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _anything(shape: Shape) -> str:
    return ""


@dataclass(frozen=True)
class Op:
    """The declaration of one operation, or of a larger part of the model.

    name: in tables; of an operation that of its public function. build: (shape, dtype, device,
    seed) -> `Problem`, or `Unsupported`. cost: (shape, bytes per element) -> `Cost`, None where it
    is counted (`launches.cost_of`). formula: bytes and FLOPs of the forward, in words. rank: among
    the operations by their share of a training step, the largest first. rivals: providers besides
    those that all have. modes, stages: those that make sense. scope: a key of `SCOPES`. refuses:
    shape -> why no provider can do it, empty if some can. stem: its file in `benchmarks/cases`,
    which `operations` fills in.
    """

    name: str
    build: Callable[[Shape, torch.dtype, torch.device, int], Problem]
    cost: Callable[[Shape, int], Cost] | None
    formula: str
    rank: int = 0
    rivals: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    stages: tuple[int, ...] = (1, 2, 3, 4)
    scope: str = "operation"
    refuses: Callable[[Shape], str] = _anything
    stem: str = ""

    @property
    def function(self) -> str:
        """The public function that `explain` knows, "" where there is none."""
        return self.name if self.scope == "operation" else ""

    @property
    def providers(self) -> tuple[str, ...]:
        return (*EVERYWHERE, *self.rivals)


class Draw:
    """Inputs of one case: normal random numbers, each tensor from a seed of its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device, self.seed = dtype, device, seed
        self.drawn = 0

    def __call__(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        seed = self.seed + self.drawn
        self.drawn += 1
        return random_normal(size, dtype or self.dtype, seed=seed, scale=scale, device=self.device)

    def labels(self, batch: int, height: int, width: int) -> Tensor:
        return data.labels(batch, height, width, self.seed, self.device)


def operation(
    name: str,
    inputs: Callable[[Shape, Draw], Mapping[str, Any]],
    *,
    baseline: Callable[..., Any] | None = None,
    rivals: Mapping[str, Callable[..., Any]] | None = None,
    parameters: tuple[str, ...] = (),
    fields: Callable[[Shape], Mapping[str, Any]] = lambda shape: {},
    **declared: Any,
) -> Op:
    """An operation of `equiseg_fast.ops`, which has the same name in `reference`.

    inputs: its arguments, of which floating tensors are differentiated. baseline: in eager PyTorch;
    default: the function of that name in `baselines`, where those are that the whole model needs,
    too. rivals: other providers. parameters: inputs whose gradients add up over all tokens. fields:
    of `Problem`; declared: of `Op`.
    """
    refuses = declared.get("refuses", _anything)

    def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
        if reason := refuses(shape):
            raise Unsupported(reason)
        more = dict(fields(shape))
        if parameters:
            kinds = {f"d{parameter}": "parameter" for parameter in parameters}
            more |= {"kinds": kinds, "contraction": 0, "chain": shape.rows * shape.tokens}
        own = baseline or getattr(baselines, name)
        return op_problem(
            inputs(shape, Draw(dtype, device, seed)),
            {**backends(getattr(ops, name), own), **(rivals or {})},
            getattr(reference, name),
            **more,
        )

    return Op(name, build, rivals=tuple(rivals or ()), **declared)


def unavailable(op: Op, provider: str, device: torch.device, dtype: str = "") -> str:
    """Why a provider is out before anything is tried; empty if it is not.

    dtype: short name, "" if it does not matter. For a GPU on a machine without one: what is known.
    """
    if provider not in op.providers:
        return "no such implementation of this operation"
    if reason := impossible(provider, device, dtype):
        return reason
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if on_gpu and provider in ("triton", "tuned") and op.function:
        return _against_triton(op, device)
    return ""


@cache
def _against_triton(op: Op, device: torch.device) -> str:
    tiny = op.build(Shape("b0", 1, 64, 64), torch.float16, device, 0)
    lines = explain(op.function, **tiny.inputs).splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("  triton:")]
    return "; ".join(reason for reason in found if reason != "usable")

"""How an operation, or a larger part of the model, is declared; see `benchmarks/cases`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.cases.common.cost import Cost
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.providers.provider import EVERYWHERE, impossible
from equiseg_fast import explain

MODES = ("fwd", "fwd_train", "bwd", "step")

SCOPES = {
    "operation": "one function of equiseg_fast.ops",
    "block": "the cross-modal block and the gate of one stage",
    "stage": "one stage of the encoder, for all modalities",
    "encoder": "the four stages of the encoder",
    "accelerated": "encoders of others after accelerate_segformer or accelerate_module",
    "model": "EQUISeg, inference and training step",
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 25


def _anything(shape: Shape) -> str:
    return ""


@dataclass(frozen=True)
class Op:
    """The declaration of one operation, or of a larger part of the model.

    name: in tables. function: the public function that `explain` knows, "" where there is none.
    build: (shape, dtype, device, seed) -> `Problem`, or `Unsupported`. cost: (shape, bytes per
    element) -> `Cost`, None where it is counted (`launches.cost_of`). formula: bytes and FLOPs of
    the forward, in words. extra_providers: besides those that all have. modes, stages: those that
    make sense. scope: a key of `SCOPES`. refuses: shape -> why no provider can do it, empty if
    some can.
    """

    name: str
    function: str
    build: Callable[[Shape, torch.dtype, torch.device, int], Problem]
    cost: Callable[[Shape, int], Cost] | None
    formula: str
    extra_providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    stages: tuple[int, ...] = (1, 2, 3, 4)
    scope: str = "operation"
    refuses: Callable[[Shape], str] = _anything

    @property
    def providers(self) -> tuple[str, ...]:
        return (*EVERYWHERE, *self.extra_providers)


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
    return "; ".join(_reasons(op.function, tiny.inputs))


def _reasons(function: str, inputs: Mapping[str, Any]) -> list[str]:
    lines = explain(function, **inputs).splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("  triton:")]
    return [reason for reason in found if reason != "usable"]

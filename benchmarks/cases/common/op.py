"""How an operation, or a larger part of the model, is declared; see `benchmarks/cases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.cases.common.cost import Cost
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.providers.provider import EVERYWHERE, impossible
from equiseg_fast import explain

MODES = ("fwd", "fwd_train", "bwd", "step")
TRAINING_MODES = MODES[1:]

SCOPES = {
    "operation": "one function of equiseg_fast.ops",
    "block": "the cross-modal block and the gate of one stage",
    "stage": "one stage of the encoder, for all modalities",
    "encoder": "the four stages of the encoder",
    "accelerated": "SegformerModel of transformers after accelerate_segformer",
    "model": "EQUISeg, inference and training step",
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Op:
    """The declaration of one operation, or of a larger part of the model.

    name: in tables; of an operation that of its public function. build: (shape, dtype, device,
    seed) -> `Problem`. cost: (shape, bytes per element) -> `Cost`, None where it is counted
    (`launches.cost_of`). formula: bytes and FLOPs of the forward, in words. rivals: providers
    besides those that all have. modes, stages: those that make sense. scope: a key of `SCOPES`.
    refuses: shape -> why no provider can do it, empty if some can. stem: its file in
    `benchmarks/cases`, which `operations` fills in.
    """

    name: str
    build: Callable[[Shape, torch.dtype, torch.device, int], Problem]
    cost: Callable[[Shape, int], Cost] | None
    formula: str
    rivals: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    stages: tuple[int, ...] = (1, 2, 3, 4)
    scope: str = "operation"
    refuses: Callable[[Shape], str] = lambda shape: ""
    stem: str = ""

    @property
    def function(self) -> str:
        """The public function that `explain` knows, "" where there is none."""
        return self.name if self.scope == "operation" else ""

    @property
    def providers(self) -> tuple[str, ...]:
        return (*EVERYWHERE, *self.rivals)


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

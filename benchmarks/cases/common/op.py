"""How an operation, or a larger part of the model, is declared; see `benchmarks/cases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases.common.cost import Cost
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.providers.provider import EVERYWHERE, impossible

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
    refuses: shape -> why no provider can do it, empty if some can.
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

    @property
    def function(self) -> str:
        """The public function that `explain` knows, "" where there is none."""
        return self.name if self.scope == "operation" else ""

    @property
    def providers(self) -> tuple[str, ...]:
        return (*EVERYWHERE, *self.rivals)


def unavailable(op: Op, provider: str, device: torch.device, dtype: str = "") -> str:
    """Why a provider is out before anything is tried; empty if it is not.

    dtype: short name, "" if it does not matter. Nothing is tried and no GPU is needed: what a
    backend says against a GPU that is too old, it says when it is called.
    """
    if provider not in op.providers:
        return "no such implementation of this operation"
    return impossible(provider, device, dtype)

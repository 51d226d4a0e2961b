"""Everything that changes during training, saved and restored as one."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiseg_fast.models import EQUISeg, EQUISegConfig, load_backbone

from .config import TrainConfig
from .distributed import Place, as_part_of, full_state, in_full, wrap
from .optimise import Average, adamw


class State:
    """Model, optimiser, scaler of the loss, average of the weights, and where the training is.

    step: optimiser steps done; the epoch, the position in it and the rate follow from it, and so
    does every generator: those of step t are seeded with (seed, t) and the rank. validated: step of
    the last validation; best: its step and mIoU, of the best so far; sums: of what is logged, since
    the last line, their number first; length: bytes of the log.
    """

    def __init__(self, model: EQUISeg, config: TrainConfig, here: Place) -> None:
        self.here = here
        self.model = model.to(here.device)
        self.wrapped = wrap(self.model, config, here)
        self.optimiser = adamw(self.model, config)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=config.precision == "fp16")
        self.average = Average(self.tensors(), config.ema) if config.ema else None
        self.step = 0
        self.validated = 0
        self.best: dict[str, Any] | None = None
        self.sums: list[float] = []
        self.length = 0

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they are trained."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def kept(self) -> dict[str, Tensor]:
        """The weights to validate and keep, in full: the average if there is one, or the last. All
        processes must call this; it gives them the running statistics of the first."""
        tensors = self.tensors() if self.average is None else self.average.state
        found = {name: in_full(x.detach()) for name, x in tensors.items()}
        for name, _ in self.model.named_buffers():
            self.here.share(found[name])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain values. All processes call this; only in the first one are
        there tensors. Parts of the optimiser go by the name of their parameter."""
        names: dict[Any, str] = {p: name for name, p in self.model.named_parameters()}
        moments = {
            f"{names[p]}/{key}": x
            for p, own in self.optimiser.state.items()
            for key, x in own.items()
        }
        average = {} if self.average is None else self.average.state
        return {
            "step": self.step,
            "validated": self.validated,
            "best": self.best,
            "sums": list(self.sums),
            "length": self.length,
            "model": full_state(self.tensors(), self.here),
            "optimiser": full_state(moments, self.here),
            "average": full_state(average, self.here),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load(self, content: Mapping[str, Any]) -> None:
        """Go on from `to_dict`, in any number of processes."""
        self.step, self.validated = content["step"], content["validated"]
        self.best, self.length = content["best"], content["length"]
        self.sums = list(content["sums"])
        for ours, name in (
            (self.tensors(), "model"),
            ({} if self.average is None else self.average.state, "average"),
        ):
            for key, x in ours.items():
                x.copy_(as_part_of(content[name][key], x))
        parameters = dict(self.model.named_parameters())
        for key, x in content["optimiser"].items():
            name, _, kind = key.rpartition("/")
            p = parameters[name]
            # The number of its steps is no part of a parameter.
            self.optimiser.state[p][kind] = as_part_of(x, p) if x.dim() else x
        self.scaler.load_state_dict(content["scaler"])


def build(model_config: EQUISegConfig, config: TrainConfig, backbone: bool) -> tuple[EQUISeg, str]:
    """A model with weights from the seed and the backbone, and the report of loading the latter."""
    torch.manual_seed(config.seed)
    model = EQUISeg(model_config)
    report = ""
    if backbone and config.backbone is not None:
        path = os.path.expanduser(config.backbone)
        report = str(load_backbone(model, path, adapt_channels=True))
    return model, report

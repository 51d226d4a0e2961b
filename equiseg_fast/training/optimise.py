"""The optimiser, its learning rate, and averages of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .distributed import part_here


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on norms, biases and layer scales: all parameters of one
    dimension, and those called bias (score nets stack theirs over modalities)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = {name for name, p in named if p.dim() < 2 or name.endswith("bias")}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name not in still]},
        {"params": [p for name, p in named if name in still], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def lr_ratio(step: int, steps: int, config: TrainConfig) -> float:
    """What `lr` is multiplied by at step 0 <= step < steps.

    Linear from `warmup_ratio` to 1 in the first part, `warmup` of all steps; then
    (1 - t)^power, where t goes from 0 to 1. The schedule of CMNeXt (arXiv 2303.01480).
    """
    rising = round(config.warmup * steps)
    if step < rising:
        return config.warmup_ratio + (1 - config.warmup_ratio) * step / rising
    return (1 - (step - rising) / (steps - rising)) ** config.power


class Average:
    """Exponential moving average of weights and running statistics.

    The decay grows to its value, (1 + n) / (10 + n) after n steps, so that the first weights, which
    are random, are soon forgotten.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state = {name: x.detach().clone() for name, x in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights that step number `step`, from 0, made."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = [(part_here(x), part_here(state[name])) for name, x in self.state.items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        ours, theirs = zip(*floating, strict=True)
        torch._foreach_lerp_(ours, theirs, weight)
        for mine, now in pairs:
            if not mine.is_floating_point():  # numbers of batches seen
                mine.copy_(now)

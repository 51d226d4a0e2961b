"""What the gate does with three real sensors, and what happens to that when one is blanked.

An untrained gate weighs all modalities alike, so a small model is first trained for a few steps on
the pseudo-labels of `data`: enough to move the gate, far from enough to segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import data
from equiseg_fast.models import EQUISeg

STEPS = 20
CROP = (128, 192)
VIEW = (160, 256)


@dataclass(frozen=True)
class Contributions:
    """weights: title -> `[4, M]`, the mean over channels of each modality's weight per stage; NaN
    where a modality is absent. losses: of the training steps."""

    weights: dict[str, Tensor]
    losses: list[float]


def contributions(seed: int = 0) -> Contributions:
    """Train, then look at the centre with all present, with one blanked, and with one absent."""
    sensors = data.motorcycle()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EQUISeg.from_name(
            "b0",
            modalities=data.NAMES,
            num_classes=data.BANDS,
            drop_path=0.0,
            head_dropout=0.0,
            modality_dropout=0.3,
        )
        losses = _train(model, sensors, seed)
    return _look(model.eval(), sensors, losses)


def _train(model: EQUISeg, sensors: data.Sensors, seed: int) -> list[float]:
    gates = {id(p) for p in model.gates.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in gates]},
        {"params": list(model.gates.parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        top, left = (
            int(torch.randint(0, n - m + 1, (), generator=generator))
            for n, m in zip(data.SIZE, CROP, strict=True)
        )
        rows, columns = slice(top, top + CROP[0]), slice(left, left + CROP[1])
        loss, _ = model.loss(
            sensors.images[..., rows, columns],
            sensors.labels[..., rows, columns],
            generator=generator,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _look(model: EQUISeg, sensors: data.Sensors, losses: list[float]) -> Contributions:
    top, left = ((n - m) // 2 for n, m in zip(data.SIZE, VIEW, strict=True))
    window = (..., slice(top, top + VIEW[0]), slice(left, left + VIEW[1]))
    images = sensors.images[window]
    weights = {"all present": _weights(model, images, data.NAMES)}
    for i, name in enumerate(data.NAMES):
        blanked = images.clone()
        blanked[i] = 0
        others = [n for n in data.NAMES if n != name]
        weights[f"{name} blanked"] = _weights(model, blanked, data.NAMES)
        weights[f"{name} absent"] = _weights(model, images, others)
    return Contributions(weights, losses)


def _weights(model: EQUISeg, images: Tensor, present: list[str] | tuple[str, ...]) -> Tensor:
    stages = model.stages(images, present=set(present))
    table = torch.full((len(stages), len(data.NAMES)), float("nan"))
    columns = [i for i, name in enumerate(data.NAMES) if name in present]
    for s, stage in enumerate(stages):
        table[s, columns] = stage.contributions.mean(dim=(1, 2))
    return table

"""What is computed of one batch: the loss to learn from, and the scores to be judged by."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast._command import PRECISIONS
from equiseg_fast._seeds import seed_of
from equiseg_fast.data import Batch, SensorDataset
from equiseg_fast.models import EQUISeg
from equiseg_fast.models.inputs import dropout_draws
from equiseg_fast.robustness import evaluate_dataset

from .config import TrainConfig
from .distributed import Place


def loss_of(
    model: nn.Module, batch: Batch, step: int, config: TrainConfig, here: Place
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and its parts. What is drawn follows from seed and step: which modalities of an image
    are dropped, and which teach, is the same for any number of processes; dropout and stochastic
    depth are not."""
    torch.manual_seed(seed_of((config.seed, step, here.rank)))
    teachers = torch.Generator(here.device).manual_seed(seed_of((config.seed, step, "common")))
    order = torch.randperm(len(batch.present), generator=teachers, device=here.device)
    dropped = torch.Generator().manual_seed(seed_of((config.seed, step, "dropped")))
    dropout_draws(config.batch_size * here.rank // here.world, dropped)  # of other processes
    batch = batch.to(here.device)
    if batch.labels is None:
        raise ValueError(f"training images must have labels; {', '.join(batch.names)} have none")
    dtype = PRECISIONS[config.precision]
    with torch.autocast(here.device.type, dtype, enabled=dtype is not None):
        return model(
            batch.images, labels=batch.labels, present=batch.mask, generator=dropped, order=order
        )


def validate(
    model: EQUISeg,
    data: SensorDataset,
    config: TrainConfig,
    here: Place,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """mIoU, IoU by name of class, and how many images had logits that are not finite, over whole
    images, of all processes together.

    pause: called after every image, to stop there.
    """
    found = evaluate_dataset(
        model,
        data,
        batch_size=here.world,
        workers=config.loaders,
        device=here.device,
        dtype=PRECISIONS[config.precision],
        rank=here.rank,
        world=here.world,
        progress=lambda _: pause(),
    )
    iou = dict(zip(data.classes, found["iou"], strict=True))
    return {"miou": found["miou"], "iou": iou, "not_finite": found["not_finite"]}


@contextmanager
def contributions(model: EQUISeg) -> Iterator[dict[int, Tensor]]:
    """The weights `[M, B, C]` of the last call of every gate that weighs the fused map."""
    found: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def keep(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            found[index] = output[-1].detach()

        return keep

    gates = list(model.gates) if model.config.fuse == "gate" else []
    handles = [gate.register_forward_hook(hook(i)) for i, gate in enumerate(gates)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""What a training will do, found out before it starts."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from equiseg_fast.data import Augment, SensorDataset, batches
from equiseg_fast.data.samples import Cached
from equiseg_fast.models import EQUISeg, EQUISegConfig

from .config import TrainConfig, flat
from .distributed import Place
from .optimise import lr_ratio
from .state import build
from .step import loss_of


@dataclass(frozen=True)
class Plan:
    """A configuration with what follows from its data."""

    config: TrainConfig
    here: Place
    train: SensorDataset
    val: SensorDataset | None
    model: EQUISegConfig
    augment: Augment
    steps_per_epoch: int
    steps: int

    def batches(self, epoch: int, first: int) -> DataLoader[Any]:
        """The share of this process of the batches of an epoch, from batch `first` on."""
        config = self.config
        return batches(
            self.train, batch_size=config.batch_size, seed=config.seed, epoch=epoch,
            augment=self.augment, workers=config.loaders, first=first, rank=self.here.rank,
            world=self.here.world, pin_memory=self.here.device.type == "cuda",
        )  # fmt: skip


def make_plan(config: TrainConfig, here: Place) -> Plan:
    """Open the data. Raises ValueError naming the field that does not fit them."""
    if config.batch_size % here.world:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {here.world}; "
            f"got {config.batch_size}"
        )
    train = config.data.open("train")
    val = None if config.validate_on == "none" else config.data.open(config.validate_on)
    if not config.loaders:  # worker processes end with their epoch
        train, val = Cached(train), None if val is None else Cached(val)
    if len(train) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(train)}; "
            f"got {config.batch_size}"
        )
    size = config.crop
    if size is None:
        height, width = next(iter(train.raw(0).images.values())).shape[-2:]
        size = (height, width)
    per_epoch = len(train) // config.batch_size
    return Plan(
        config,
        here,
        train,
        val,
        config.model_for(train),
        Augment(size, config.scale, config.flip, config.jitter, config.blur),
        per_epoch,
        per_epoch * config.epochs if config.steps is None else config.steps,
    )


def show(plan: Plan, console: Console | None, step: int = 0) -> None:
    """Every field, bold where it is not the default, and what follows from them."""
    if console is None:
        return
    config = plan.config
    values = flat(config.to_dict())
    usual = flat(TrainConfig(out=config.out, data=type(config.data)()).to_dict())
    short: list[Text] = []
    long: list[Text] = []
    for name, value in values.items():
        text = f"{name:<21} " + ("-" if value is None else str(value))
        cell = Text(text, "" if value == usual.get(name) else "bold")
        (short if len(text) < 40 else long).append(cell)
    table = Table.grid(padding=(0, 1), expand=False)
    for start in range(0, len(short), 2):
        table.add_row(*short[start : start + 2])
    console.print(table)
    for cell in long:
        console.print(cell, soft_wrap=True)
    for line in _summary(plan, step):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _summary(plan: Plan, step: int) -> list[str]:
    config, model = plan.config, plan.model
    with torch.device("meta"):
        parameters = sum(p.numel() for p in EQUISeg(model).parameters())
    height, width = plan.augment.crop
    rising = round(config.warmup * plan.steps)
    rise = f"rising to {config.lr:g} in {rising} steps, then" if rising else f"{config.lr:g},"
    last = config.lr * lr_ratio(plan.steps - 1, plan.steps, config)
    images = ", ".join(f"{s.name} ({s.channels})" for s in plan.train.sensors)
    val = "no validation, the last weights are kept"
    if plan.val is not None:
        every = {0: "at the end", 1: "after every epoch"}.get(
            config.validate_every, f"every {config.validate_every} epochs"
        )
        val = f"{len(plan.val)} of split {config.validate_on}, {every}"
    return [
        f"EQUISeg {model.variant}: {parameters / 1e6:.2f} million parameters, "
        f"{model.num_classes} classes, {images}",
        f"images: {len(plan.train)} to train, {config.batch_size} a step as crops of {height} x "
        f"{width}; {val}",
        f"steps: {plan.steps}, {plan.steps_per_epoch} an epoch"
        + (f"; going on after step {step}" if step else ""),
        f"learning rate: {rise} falling to {last:.2g}",
        f"device: {plan.here.device}, {config.precision}"
        + (f", {plan.here.world} processes by {config.distributed}" if plan.here.world > 1 else ""),
    ]


def try_out(plan: Plan, console: Console | None) -> None:
    """The loss and its gradients of the first batch, and the first image to validate, of this
    process alone; nothing is written."""
    config, here = plan.config, plan.here
    model, report = build(plan.model, config, backbone=True)
    model = model.to(here.device).train()
    started = time.monotonic()
    batch = next(iter(plan.batches(0, 0)))
    loss, parts = loss_of(model, batch, 0, config, here)
    loss.backward()
    lines = [report] if report else []
    said = ", ".join(f"{name} {x.item():.4g}" for name, x in parts.items())
    lines.append(
        f"first batch ({', '.join(batch.names[:4])}{', ..' if len(batch.names) > 4 else ''}): "
        f"loss {loss.item():.4g}, {said}, in {time.monotonic() - started:.1f} s"
    )
    if here.device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated(here.device) / 2**30:.1f} GiB")
    if plan.val is not None:
        sample = plan.val[0]
        if sample.labels is None:
            raise ValueError(f"{sample.name} of split {config.validate_on} has no labels")
        height, width = sample.labels.shape
        lines.append(f"first image to validate: {sample.name}, {height} x {width}")
    for line in lines:
        if console is not None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

"""One training in several processes, started by torchrun, that equals one in a single process."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equiseg_fast._command import choose_device
from equiseg_fast.models import EQUISeg
from equiseg_fast.models.mix_transformer import TransformerBlock
from equiseg_fast.nn import CrossModalBlock
from equiseg_fast.ops import ohem

from .config import TrainConfig


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, and where it computes."""

    rank: int
    world: int
    device: torch.device

    def maximum(self, *values: float) -> list[float]:
        """The largest that any process has, value by value."""
        if self.world == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
            values /= self.world
        return values

    def share(self, x: Tensor) -> None:
        """Put the values of the first process into x."""
        if self.world > 1:
            dist.broadcast(x, 0)

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def place(device: str | None) -> Iterator[Place]:
    """This process among those that torchrun started, or alone.

    Each gets the GPU of its local rank. Raises ValueError for a device that PyTorch does not see.
    """
    if not dist.is_torchelastic_launched():
        yield Place(0, 1, choose_device(device))
        return
    where = choose_device(device)
    if where.type == "cuda":
        where = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), where)
    finally:
        dist.destroy_process_group()


def wrap(model: EQUISeg, config: TrainConfig, here: Place) -> nn.Module:
    """The module whose call trains `model` together with the other processes.

    `model` itself is changed: its hard pixels are found among those of all processes, and with
    `sync_bn` its batch norms see the images of all. So gradients are those of one process with all
    images, where no dropout or stochastic depth makes each process draw its own.
    """
    if here.world == 1:
        return model
    model.hard_pixels = ohem_of_all
    if config.distributed == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        if config.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, TransformerBlock | CrossModalBlock):
                fully_shard(module)
        fully_shard(model)
        return model
    ids = [here.device] if here.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    if config.sync_bn:
        # Afterwards, because it refuses SyncBatchNorm on a CPU, where ours works.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return wrapped


def ohem_of_all(loss: Tensor, valid: Tensor, *, thresh: float) -> Tensor:
    """`ops.ohem` of the pixels of all processes, of which the mean over processes is meant.

    Hard pixels are those of all processes together, so that the mean of what the processes return
    (and of its gradients) is that of one process with all images. All have equal shapes.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    pixels, counted = (_of_all(x, world) for x in (loss.detach(), valid.float()))
    pixels.requires_grad_()
    with torch.enable_grad():
        total = ohem(pixels, counted > 0, thresh=thresh)
    (weights,) = torch.autograd.grad(total, pixels)
    weights = weights.chunk(world)[rank]
    return torch.where(weights > 0, loss * weights, 0.0).sum() * world


def _of_all(x: Tensor, world: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def part_here(x: Any) -> Tensor:
    """The values of a tensor that are in this process."""
    return x.to_local() if hasattr(x, "to_local") else x


def in_full(x: Any) -> Tensor:
    """A tensor with all its values, also where every process has a part; all must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def as_part_of(x: Tensor, example: Any) -> Tensor:
    """A full tensor on the device, and in the parts, of an example."""
    x = x.to(example.device)
    if not hasattr(example, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, example.device_mesh, example.placements)


def full_state(tensors: dict[str, Tensor], here: Place) -> dict[str, Tensor]:
    """Full copies of the tensors on the CPU in the first process; in the others nothing. All
    processes must call this."""
    found = {}
    for name, x in tensors.items():
        x = in_full(x.detach())
        if here.rank == 0:
            found[name] = x.to("cpu", copy=True)
    return found


def joined(batches: Sequence[Any]) -> dict[str, Any]:
    """The batches of all processes as one, in plain containers."""
    labels = [x.labels for x in batches]
    return {
        "names": [name for x in batches for name in x.names],
        "images": {k: torch.cat([x.images[k] for x in batches]) for k in batches[0].images},
        "present": torch.cat([x.present for x in batches], dim=1),
        "labels": torch.cat(labels),
    }

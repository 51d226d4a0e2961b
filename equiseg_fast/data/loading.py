"""Batches of a dataset that follow from a seed, an epoch and nothing else."""

import contextlib
import signal
import traceback
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from equiseg_fast._seeds import generator_of
from equiseg_fast.ops._checks import check_flags, check_integer, check_seed, check_sizes

from .augment import Augment
from .samples import Batch, Sample, SensorDataset, collate, normalise


def batches(
    dataset: SensorDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment | None = None,
    workers: int = 0,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of the `Batch`es of one epoch.

    The order is a function of (seed, epoch), and what `augment` draws for a sample of (seed, epoch,
    index): the batches are the same bit by bit for any number of workers, and from batch `first` on
    as after those before it. `dataset.raw` must be a function of the index. No generator of the
    process is touched.

    batch_size: of all processes together. Process `rank` of `world` gets its part of the batch that
    a single process would have. drop_last=True leaves out the samples that fill no batch, so that
    all processes have as many batches and all batches one size: for training. False keeps them,
    each in one process only, of which some may get a batch less: for validation. workers: processes
    that load, each on a single thread; 0 loads in this one. They live for this epoch. pin_memory:
    whether batches are in pinned memory, for a GPU.

    An error of the dataset stops the loop that asks for batches; from a worker it arrives as the
    nearest of OSError, ValueError, TypeError, ImportError and RuntimeError, with its message, and
    the traceback of the worker as its cause. Raises TypeError or ValueError naming an argument that
    cannot be.
    """
    if not isinstance(dataset, SensorDataset):
        raise TypeError(f"dataset must be a SensorDataset; got {type(dataset).__name__}")
    if augment is not None and not isinstance(augment, Augment):
        raise TypeError(f"augment must be an Augment or None; got {augment!r}")
    check_sizes(batch_size=batch_size, world=world)
    check_seed(seed)
    check_flags(shuffle=shuffle, drop_last=drop_last, pin_memory=pin_memory)
    for name, value in {"epoch": epoch, "workers": workers, "first": first, "rank": rank}.items():
        check_integer(name, value)
        if value < 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
    if rank >= world:
        raise ValueError(f"rank must be below world = {world}; got {rank}")
    if drop_last and batch_size % world:
        raise ValueError(
            "batch_size must be a multiple of world, so that all processes have as many samples; "
            f"got {batch_size} and {world}"
        )
    count = len(dataset)
    if count < (batch_size if drop_last else 1):
        needed = f"batch_size = {batch_size}" if drop_last else "1"
        raise ValueError(
            f"dataset must have at least {needed} samples; {type(dataset).__name__} has {count}"
        )

    order = list(range(count))
    if shuffle:
        order = torch.randperm(count, generator=generator_of([int(seed), int(epoch)])).tolist()
    end = count - count % batch_size if drop_last else count
    chunks = [order[i : min(i + batch_size, end)] for i in range(0, end, batch_size)]
    if first > len(chunks):
        raise ValueError(f"first must be 0..{len(chunks)}, the number of batches; got {first}")
    parts = [c[len(c) * rank // world : len(c) * (rank + 1) // world] for c in chunks[first:]]
    return _Loader(
        _Epoch(dataset, augment, seed, epoch, [part for part in parts if part]),
        batch_size=None,  # what the dataset below gives are batches
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_prepare_worker,
        pin_memory=pin_memory,
        generator=generator_of([int(seed), int(epoch)]),  # else PyTorch draws from the global one
    )


class _Epoch(Dataset[Any]):
    """The batches of an epoch by their number, or the `_Failure` to make one in a worker."""

    def __init__(
        self,
        dataset: SensorDataset,
        augment: Augment | None,
        seed: int,
        epoch: int,
        chunks: list[list[int]],
    ) -> None:
        self.dataset, self.augment = dataset, augment
        self.seed, self.epoch, self.chunks = seed, epoch, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> "Batch | _Failure":
        try:
            return collate([self.sample(index) for index in self.chunks[number]])
        except Exception as error:
            if get_worker_info() is None:
                raise
            return _Failure(error)

    def sample(self, index: int) -> Sample:
        if self.augment is None:
            return self.dataset[index]
        generator = generator_of([int(self.seed), int(self.epoch), index])
        dataset = self.dataset
        raw = self.augment(dataset.raw(index), dataset.sensors, dataset.ignore_index, generator)
        return normalise(raw, dataset.sensors)


class _Failure:
    """An error on its way out of a worker. PyTorch's own way puts the traceback into the message,
    and an exception of an unknown kind may not survive pickling."""

    def __init__(self, error: Exception) -> None:
        kinds = (OSError, ValueError, TypeError, ImportError)
        self.kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        name = "" if isinstance(error, (*kinds, RuntimeError)) else f"{type(error).__name__}: "
        self.message = f"{name}{error}"
        self.traceback = traceback.format_exc()


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                cause = RuntimeError(f"in a worker:\n{batch.traceback}")
                raise batch.kind(batch.message) from cause
            yield batch


def _prepare_worker(_: int) -> None:
    """One thread in each worker, also of OpenCV, whose threads do not survive a fork.

    Ctrl-C reaches all processes of a terminal: what it means is up to the one that asks for
    batches, which needs them until it has decided.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)


def _unchanged(batch: Any) -> Any:
    return batch

"""Samples, datasets of them, and batches: the form in which all data reaches a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sensors import Sensor


@dataclass(frozen=True)
class Sample:
    """What all sensors saw of one scene, and what is there.

    images: name of a sensor -> `[C, H, W]` fp32; zeros where it is absent. In the units of the
    files in what `SensorDataset.raw` returns, normalised in what a dataset returns by index.
    present: bool `[M]` in the order of the sensors. labels: int64 `[H, W]`, class or ignore index;
    None where nobody labelled. distance: metres `[H, W]` fp32 from the camera, where it is known,
    for degradations that depend on it.
    """

    name: str
    images: dict[str, Tensor]
    present: Tensor
    labels: Tensor | None = None
    distance: Tensor | None = None


class SensorDataset(Dataset[Sample]):
    """Base of all datasets: a subclass has the attributes, `__len__` and `raw`.

    By index it gives normalised samples; `raw` gives them as the sensors recorded them, which is
    what augmentations and degradations work on.
    """

    sensors: tuple[Sensor, ...]
    classes: tuple[str, ...]
    ignore_index: int = 255
    palette: tuple[tuple[int, int, int], ...] | None = None
    """Colour of every class, 0 to 255; None leaves the choice to whoever draws."""

    def __len__(self) -> int:
        raise NotImplementedError

    def raw(self, index: int) -> Sample:
        """Sample `index`, 0 <= index < len, in the units of the files."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}; got {index}")
        return normalise(self.raw(index), self.sensors)


class Wrapped(SensorDataset):
    """Base of what changes the samples of another dataset, or how they are had."""

    def __init__(self, dataset: SensorDataset) -> None:
        self.dataset = dataset
        self.sensors, self.classes = dataset.sensors, dataset.classes
        self.ignore_index, self.palette = dataset.ignore_index, dataset.palette

    def __len__(self) -> int:
        return len(self.dataset)


class Cached(Wrapped):
    """A dataset whose raw samples stay in memory for whoever reads them again in this process, as
    many as fit into `size` bytes."""

    def __init__(self, dataset: SensorDataset, size: int = 2**30) -> None:
        super().__init__(dataset)
        self.left = size
        self.cache: dict[int, Sample] = {}

    def raw(self, index: int) -> Sample:
        if index in self.cache:
            return self.cache[index]
        sample = self.dataset.raw(index)
        tensors = (*sample.images.values(), sample.labels, sample.distance)
        size = sum(x.nbytes for x in tensors if x is not None)
        if size <= self.left:
            self.left -= size
            self.cache[index] = sample
        return sample


def normalise(sample: Sample, sensors: Sequence[Sensor]) -> Sample:
    """A raw sample as the model sees it. Absent sensors stay zero."""
    images = {
        sensor.name: sensor.normalise(sample.images[sensor.name])
        if sample.present[i]
        else sample.images[sensor.name].float()
        for i, sensor in enumerate(sensors)
    }
    return replace(sample, images=images)


class Batch(NamedTuple):
    """B samples: images name -> `[B, C, H, W]`, present bool `[M, B]`, labels `[B, H, W]` int64."""

    names: list[str]
    images: dict[str, Tensor]
    present: Tensor
    labels: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; `present` stays on the CPU, where its values can be checked."""
        # Nobody would wait for what a GPU copies to the CPU before it is read there.
        ahead = torch.device(device).type != "cpu"
        images = {name: x.to(device, non_blocking=ahead) for name, x in self.images.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=ahead)
        return self._replace(images=images, labels=labels)

    @property
    def mask(self) -> Tensor | None:
        """`present` for a model: None where nothing is absent, which is faster."""
        return None if bool(self.present.all()) else self.present


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples of one size; raises ValueError naming one that differs."""
    first = samples[0]
    shapes = {name: x.shape[-2:] for name, x in first.images.items()}
    for sample in samples:
        for name, x in sample.images.items():
            if x.shape[-2:] != shapes[name]:
                raise ValueError(
                    f"all samples of a batch must have one size: {sample.name} has "
                    f"{list(x.shape[-2:])} for {name}, {first.name} {list(shapes[name])}; choose a "
                    "crop, or batches of one"
                )
    labels = [sample.labels for sample in samples if sample.labels is not None]
    return Batch(
        [sample.name for sample in samples],
        {name: torch.stack([s.images[name] for s in samples]) for name in first.images},
        torch.stack([sample.present for sample in samples], dim=1),
        torch.stack(labels) if len(labels) == len(samples) else None,
    )

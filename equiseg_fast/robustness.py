"""How well a model does when sensors fail: conditions, the scores under them, and their averages.

EMM, RMM and NM are the protocols of "Benchmarking multi-modal semantic segmentation under sensor
failures" (arXiv 2503.18445; scripts `val_mm_EMM.py`, `val_mm_RMM.py` and `val_mm_NM.py` of
github.com/Chenfei-Liao/Multi-Modal-Semantic-Segmentation-Robustness-Benchmark). They change
normalised images, as the model sees them. "masked" and "degradations" are ours.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast._seeds import generator_of
from equiseg_fast.ops._checks import check_choice, check_sequence, check_sizes

from .data.samples import Batch, Sample, SensorDataset, Wrapped
from .data.sensors import Sensor

PROTOCOLS = ("clean", "emm", "rmm", "nm", "masked", "degradations")
FAILURES = (0.2, 0.1, 0.05)
"""Probabilities p with which every sensor fails on its own, in the expectations E(p)."""
RATIOS = (0.25, 0.5, 0.75)
"""Ratios r of elements that are missing in RMM."""
LEVELS = {"low": (0.05, 0.1), "mid": (0.1, 0.2), "high": (0.2, 0.5)}
"""Density of salt and pepper and standard deviation of Gaussian noise of the levels of NM."""
SEVERITIES = (0.25, 0.5, 0.75, 1.0)

Subset = tuple[str, ...]
Scores = Mapping["Condition", float]


@dataclass(frozen=True)
class Condition:
    """What happens to the sensors.

    protocol: one of `PROTOCOLS`. sensors: the degraded ones, of emm, rmm and masked. amount: ratio
    of rmm, severity of degradations. name: level of nm, degradation of degradations.
    """

    protocol: str = "clean"
    sensors: Subset = ()
    amount: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_sequence("sensors", self.sensors, str, "names")
        object.__setattr__(self, "sensors", tuple(self.sensors))

    def __str__(self) -> str:
        which = " + ".join(self.sensors)
        return {
            "clean": "clean",
            "emm": f"EMM, zero: {which}",
            "rmm": f"RMM {self.amount:g}: {which}",
            "nm": f"NM {self.name}",
            "masked": f"masked: {which}",
            "degradations": f"{self.name} at {self.amount:g}",
        }[self.protocol]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**asdict(self), "sensors": list(self.sensors)}


CLEAN = Condition()


def conditions(
    sensors: Sequence[Sensor], protocols: Collection[str] = PROTOCOLS
) -> list[Condition]:
    """All conditions of the protocols, for M sensors.

    emm, rmm and masked: the proper subsets A of the sensors, 2^M - 1 of them; the empty one is the
    condition "clean", which they share. rmm has all others once for each of `RATIOS`; nm has one
    for each of `LEVELS`, degradations one for each of `SEVERITIES` of what can happen to sensors.
    """
    for protocol in protocols:
        check_choice("protocols", protocol, PROTOCOLS)
    names = [sensor.name for sensor in sensors]
    found: list[Condition] = []
    for protocol in PROTOCOLS:
        if protocol not in protocols:
            continue
        if protocol in ("clean", "emm", "rmm", "masked") and CLEAN not in found:
            found.append(CLEAN)
        if protocol in ("emm", "masked"):
            found += [Condition(protocol, subset) for subset in proper_subsets(names)[1:]]
        if protocol == "rmm":
            found += [
                Condition(protocol, subset, ratio)
                for ratio in RATIOS
                for subset in proper_subsets(names)[1:]
            ]
        if protocol == "nm":
            found += [Condition(protocol, name=level) for level in LEVELS]
        if protocol == "degradations":
            from .data.degradations import degradations_for

            found += [
                Condition(protocol, amount=severity, name=name)
                for name in degradations_for(sensors)
                for severity in SEVERITIES
            ]
    return found


def proper_subsets(names: Sequence[str]) -> list[Subset]:
    """All subsets but the whole, which leaves nothing to see, by size; the empty one first."""
    return [subset for size in range(len(names)) for subset in combinations(names, size)]


def apply(
    condition: Condition, sample: Sample, sensors: Sequence[Sensor], *, seed: int = 0
) -> Sample:
    """A normalised sample under a condition other than degradations, which work on raw samples.

    emm: images of the sensors are zeros, and count as present. masked: the sensors are absent, by
    `present`. rmm: every element, of all channels and pixels, is zero with probability r. nm: in
    all sensors ceil(density * elements / 2) elements, drawn with replacement, get the largest value
    of the image, then as many the smallest; then Gaussian noise is added, but to event sensors.

    The protocols draw once per batch, and take the extremes of the batch. Here every image is
    treated like a batch of one and draws from a stream of its own, which follows from seed, the
    names of sample and sensor, and r or the level: results depend on neither batches nor workers,
    and an image lacks the same elements in all subsets that its sensor is in.
    """
    if condition.protocol == "degradations":
        raise ValueError("condition must not be of degradations, which work on raw samples")
    if unknown := set(condition.sensors) - {sensor.name for sensor in sensors}:
        raise ValueError(
            f"condition must be of sensors {', '.join(s.name for s in sensors)}; got "
            f"{', '.join(sorted(unknown))}"
        )
    images, present = dict(sample.images), sample.present.clone()
    for i, sensor in enumerate(sensors):
        hit = condition.protocol == "nm" or sensor.name in condition.sensors
        if not hit or not present[i]:
            continue
        x = images[sensor.name]
        key = (seed, sample.name, sensor.name, condition.protocol, condition.amount, condition.name)
        if condition.protocol in ("emm", "masked"):
            images[sensor.name] = torch.zeros_like(x)
            present[i] = condition.protocol == "emm"
        elif condition.protocol == "rmm":
            missing = torch.rand(x.shape, generator=generator_of(key)) < condition.amount
            images[sensor.name] = x.masked_fill(missing, 0.0)
        else:
            density, std = LEVELS[condition.name]
            std = 0.0 if sensor.kind == "event" else std
            images[sensor.name] = _noisy(x, density, std, generator_of(key))
    return replace(sample, images=images, present=present)


def _noisy(x: Tensor, density: float, std: float, generator: torch.Generator) -> Tensor:
    count = math.ceil(density * x.numel() / 2)
    noisy = x.flatten().clone()
    for value in (x.max(), x.min()):
        places = torch.randint(x.numel(), (count,), generator=generator)
        noisy[places] = value
    if std:
        noisy += std * torch.randn(x.numel(), generator=generator)
    return noisy.view_as(x)


class Conditioned(Wrapped):
    """A dataset under a condition: by index it gives normalised samples to which it happened.

    limit: how many samples there are at most, spread evenly over those of the dataset. Raises
    ValueError naming a sample that has no labels.
    """

    def __init__(
        self,
        dataset: SensorDataset,
        condition: Condition = CLEAN,
        *,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if limit is not None:
            check_sizes(limit=limit)
        super().__init__(dataset)
        self.condition, self.seed = condition, seed
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        if condition.protocol == "degradations":
            from .data.degradations import Degraded

            self.dataset = Degraded(dataset, condition.name, condition.amount, seed)

    def __len__(self) -> int:
        return self.count

    def raw(self, index: int) -> Sample:
        return self.dataset.raw(index * len(self.dataset) // self.count)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if sample.labels is None:
            raise ValueError(f"sample {sample.name} has no labels; evaluation needs them")
        if self.condition.protocol == "degradations":
            return sample
        return apply(self.condition, sample, self.sensors, seed=self.seed)


def evaluate_dataset(
    model: Callable[..., Tensor],
    dataset: SensorDataset,
    *,
    condition: Condition = CLEAN,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """What `SegmentationMetrics` computes over a dataset under a condition, and "left_out": how
    many samples had no sensor left, and were not counted.

    model: called as `model(images, present=mask)`, gives logits `[B, K, H, W]`; a module is in
    evaluation mode meanwhile. limit, seed: see `Conditioned`. batch_size: of all ranks together;
    more than one needs samples of one size. workers: processes that load. dtype: of autocast, None
    is without. rank, world: this process sees its part of the samples, and the result is that of
    all, which have to call this together. One may get a batch less than another, so the model must
    wait for no other rank. progress: called with the number of samples just done.
    """
    from .data.loading import batches
    from .metrics import SegmentationMetrics

    device = torch.device(device)
    conditioned = Conditioned(dataset, condition, seed=seed, limit=limit)
    metrics = SegmentationMetrics(len(dataset.classes), dataset.ignore_index).to(device)
    loader = batches(
        conditioned,
        batch_size=batch_size,
        seed=0,
        epoch=0,
        workers=workers,
        rank=rank,
        world=world,
        shuffle=False,
        drop_last=False,
        pin_memory=device.type == "cuda",
    )
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            for batch in loader:
                some = batch.present.any(dim=0)
                if not bool(some.all()):
                    batch = _rows(batch, some)
                if batch.names:
                    there = batch.to(device)
                    logits = model(there.images, present=there.mask)
                    metrics.update(logits, there.labels)
                if progress is not None:
                    progress(len(some))
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    result = metrics.compute()
    return {**result, "left_out": len(conditioned) - result["images"]}


def _rows(batch: Batch, keep: Tensor) -> Batch:
    """The samples of a batch that are to be kept, bool `[B]`."""
    return batch._replace(
        names=[name for name, kept in zip(batch.names, keep.tolist(), strict=True) if kept],
        images={name: x[keep] for name, x in batch.images.items()},
        present=batch.present[:, keep],
        labels=None if batch.labels is None else batch.labels[keep],
    )


def average(scores: Mapping[Subset, float]) -> float:
    """The mean over subsets A of degraded sensors, the empty one among them: EMM_Avg, RMM_Avg."""
    return sum(scores.values()) / len(scores)


def expectation(scores: Mapping[Subset, float], sensors: int, p: float) -> float:
    """E(p): the expected score if each of M sensors fails with probability p on its own, given
    that not all do: weights w_A = p^|A| (1 - p)^(M - |A|), whose sum over all proper subsets is
    1 - p^M."""
    weights = {a: p ** len(a) * (1 - p) ** (sensors - len(a)) for a in scores}
    return sum(weights[a] * score for a, score in scores.items()) / sum(weights.values())


def summary(scores: Scores, sensors: Sequence[str]) -> dict[str, Any]:
    """The averages of the protocols whose conditions all have a score, none where there are none.

    "clean"; "EMM_Avg", "EMM_E" by p, "RMM_Avg" by r, "RMM_E" by r and p, "NM" by level; for the
    masked mode "masked_Avg" and "masked_E"; "degradations": the mean over severities by name;
    "mean_of_EMM_Avg_RMM_Avg_0.5_NM_low". Numbers stand for themselves, as "0.5".
    """
    subsets = proper_subsets(sensors)
    result: dict[str, Any] = {}
    if CLEAN in scores:
        result["clean"] = scores[CLEAN]

    def of(protocol: str, amount: float = 0.0) -> dict[Subset, float] | None:
        keys = {a: Condition(protocol, a, amount) if a else CLEAN for a in subsets}
        ran = any(c.protocol == protocol for c in scores)
        whole = ran and all(condition in scores for condition in keys.values())
        return {a: scores[condition] for a, condition in keys.items()} if whole else None

    for title, protocol in (("EMM", "emm"), ("masked", "masked")):
        if (found := of(protocol)) is not None:
            result[f"{title}_Avg"] = average(found)
            result[f"{title}_E"] = {f"{p:g}": expectation(found, len(sensors), p) for p in FAILURES}
    tables = {f"{r:g}": found for r in RATIOS if (found := of("rmm", r)) is not None}
    if tables:
        result["RMM_Avg"] = {r: average(found) for r, found in tables.items()}
        result["RMM_E"] = {
            r: {f"{p:g}": expectation(found, len(sensors), p) for p in FAILURES}
            for r, found in tables.items()
        }
    noise = {c.name: score for c, score in scores.items() if c.protocol == "nm"}
    if noise:
        result["NM"] = noise
    degraded: dict[str, list[float]] = {}
    for c, score in scores.items():
        if c.protocol == "degradations":
            degraded.setdefault(c.name, []).append(score)
    whole = {name: xs for name, xs in degraded.items() if len(xs) == len(SEVERITIES)}
    if whole:
        result["degradations"] = {name: sum(xs) / len(xs) for name, xs in whole.items()}
    if "EMM_Avg" in result and "0.5" in result.get("RMM_Avg", {}) and "low" in noise:
        three = (result["EMM_Avg"], result["RMM_Avg"]["0.5"], noise["low"])
        result["mean_of_EMM_Avg_RMM_Avg_0.5_NM_low"] = sum(three) / 3
    return result

"""Robustness protocols against their definitions, numbers by hand and brute force."""

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from equiseg_fast.data import (
    Sample,
    Sensor,
    SensorDataset,
    degradations_for,
    degrade,
    normalise,
)
from equiseg_fast.data.samples import Cached
from equiseg_fast.robustness import (
    CLEAN,
    FAILURES,
    LEVELS,
    RATIOS,
    SEVERITIES,
    Condition,
    Conditioned,
    apply,
    average,
    conditions,
    evaluate_dataset,
    expectation,
    proper_subsets,
    summary,
)

SENSORS = (
    Sensor("rgb", "camera", 1.0, mean=(0.2, 0.0, 0.1), std=(1.0, 0.5, 2.0)),
    Sensor("event", "event", 1.0),
    Sensor("lidar", "lidar", 1.0, mean=(0.0,), std=(1.0,)),
)
CLASSES = ("a", "b", "c")


class Noise(SensorDataset):
    """Random images and labels; sample `without` of `index: sensor` lacks that sensor."""

    sensors, classes = SENSORS, CLASSES

    def __init__(
        self,
        count: int = 5,
        size: tuple[int, int] = (6, 8),
        absent: dict[int, tuple[str, ...]] | None = None,
    ) -> None:
        self.count, self.size, self.absent = count, size, absent or {}

    def __len__(self) -> int:
        return self.count

    def raw(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        images = {s.name: torch.randn(s.channels, *self.size, generator=generator) for s in SENSORS}
        labels = torch.randint(0, 3, self.size, generator=generator)
        gone = self.absent.get(index, ())
        for name in gone:
            images[name] = torch.zeros_like(images[name])
        present = torch.tensor([s.name not in gone for s in SENSORS])
        return Sample(f"image {index}", images, present, labels)


class Largest(nn.Module):
    """The class of a pixel is the sensor with the largest first channel, among those present."""

    def forward(self, images: dict[str, Tensor], *, present: Tensor | None = None) -> Tensor:
        logits = torch.stack([images[s.name][:, 0] for s in SENSORS], dim=1)
        if present is not None:
            logits = logits.masked_fill(~present.T[:, :, None, None], -100.0)
        return logits


def sample_of(index: int = 0, size: tuple[int, int] = (40, 50)) -> Sample:
    return Noise(size=size)[index]


def changed(condition: Condition, sample: Sample, seed: int = 0) -> Sample:
    return apply(condition, sample, SENSORS, seed=seed)


def test_subsets_are_all_but_the_whole() -> None:
    assert proper_subsets("ab") == [(), ("a",), ("b",)]
    for count in (1, 3, 4, 8):
        found = proper_subsets("abcdefgh"[:count])
        assert len(found) == len(set(found)) == 2**count - 1
        assert all(len(subset) < count for subset in found)


def test_expectation_by_hand() -> None:
    # p = 0.2, two sensors: weights 0.64, 0.16, 0.16, of 0.96 together
    two = {(): 0.6, ("a",): 0.3, ("b",): 0.45}
    assert average(two) == pytest.approx(0.45)
    assert expectation(two, 2, 0.2) == pytest.approx((0.64 * 0.6 + 0.16 * 0.75) / 0.96)
    # p = 0.1, three: 0.729 once, 0.081 three times, 0.009 three times, of 0.999
    three = dict(zip(proper_subsets("abc"), (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0), strict=True))
    assert average(three) == pytest.approx(2.2 / 7)
    by_hand = (0.729 * 0.7 + 0.081 * 1.2 + 0.009 * 0.3) / 0.999
    assert expectation(three, 3, 0.1) == pytest.approx(by_hand)
    # p = 0.05, four; a score that is 1 where a works: P(a works | not all fail)
    four = {a: float("a" not in a) for a in proper_subsets("abcd")}
    assert expectation(four, 4, 0.05) == pytest.approx(0.95 / (1 - 0.05**4))
    assert average(four) == pytest.approx(8 / 15)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("p", FAILURES)
def test_expectation_is_that_of_independent_failures(count: int, p: float) -> None:
    names = "abcd"[:count]
    scores = {a: 1 / (1 + i) for i, a in enumerate(proper_subsets(names))}
    total = chance = 0.0
    for works in itertools.product((True, False), repeat=count):
        if any(works):
            weight = math.prod(1 - p if w else p for w in works)
            failed = tuple(n for n, w in zip(names, works, strict=True) if not w)
            total, chance = total + weight * scores[failed], chance + weight
    assert expectation(scores, count, p) == pytest.approx(total / chance)
    assert chance == pytest.approx(1 - p**count)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_conditions_are_those_of_the_protocols(count: int) -> None:
    sensors = [Sensor(name) for name in "abcd"[:count]]
    found = conditions(sensors, ("clean", "emm", "rmm", "nm", "masked"))
    assert len(found) == len(set(found))
    subsets = 2**count - 2
    counts = {p: sum(c.protocol == p for c in found) for p in ("emm", "rmm", "nm", "masked")}
    assert counts == {"emm": subsets, "rmm": 3 * subsets, "nm": 3, "masked": subsets}
    assert found[0] == CLEAN
    assert conditions(sensors, ("nm",)) == [Condition("nm", name=level) for level in LEVELS]
    assert len({str(condition) for condition in found}) == len(found)


def test_summary_against_its_definition() -> None:
    names = [s.name for s in SENSORS]
    found = conditions(SENSORS, ("clean", "emm", "rmm", "nm", "masked"))
    scores = {c: 1 / (2 + i) for i, c in enumerate(found)}
    result = summary(scores, names)

    def all_of(protocol: str, ratio: float = 0.0) -> dict[tuple[str, ...], float]:
        mine = [c for c in found if c.protocol == protocol and c.amount == ratio]
        return {(): scores[CLEAN], **{c.sensors: scores[c] for c in mine}}

    assert result["clean"] == scores[CLEAN]
    for title, protocol in (("EMM", "emm"), ("masked", "masked")):
        assert result[f"{title}_Avg"] == pytest.approx(average(all_of(protocol)))
        for p in FAILURES:
            wanted = expectation(all_of(protocol), 3, p)
            assert result[f"{title}_E"][f"{p:g}"] == pytest.approx(wanted)
    for r in RATIOS:
        assert result["RMM_Avg"][f"{r:g}"] == pytest.approx(average(all_of("rmm", r)))
        for p in FAILURES:
            wanted = expectation(all_of("rmm", r), 3, p)
            assert result["RMM_E"][f"{r:g}"][f"{p:g}"] == pytest.approx(wanted)
    low = scores[Condition("nm", name="low")]
    assert result["NM"]["low"] == low
    mean = (result["EMM_Avg"] + result["RMM_Avg"]["0.5"] + low) / 3
    assert result["mean_of_EMM_Avg_RMM_Avg_0.5_NM_low"] == pytest.approx(mean)
    assert not any("score" in name.lower() for name in result)


def test_summary_has_no_averages_of_what_did_not_all_run() -> None:
    found = conditions(SENSORS, ("emm", "nm"))
    scores = dict.fromkeys(found[:-4], 0.5)
    assert set(summary(scores, [s.name for s in SENSORS])) == {"clean"}
    assert summary({}, ["a"]) == {}


def test_emm_is_zero_and_present_and_masked_is_absent() -> None:
    sample = sample_of()
    gone = changed(Condition("emm", ("rgb",)), sample)
    assert not gone.images["rgb"].any()
    assert gone.present.all()
    masked = changed(Condition("masked", ("rgb",)), sample)
    assert masked.present.tolist() == [False, True, True]
    for name in ("event", "lidar"):
        assert torch.equal(gone.images[name], sample.images[name])
        assert torch.equal(masked.images[name], sample.images[name])
    assert sample.present.all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_rmm_drops_elements_at_its_ratio(ratio: float) -> None:
    sample = sample_of(size=(100, 100))
    one = changed(Condition("rmm", ("rgb",), ratio), sample)
    x, y = sample.images["rgb"], one.images["rgb"]
    kept = y != 0
    assert torch.equal(y[kept], x[kept])
    # five standard deviations of 30000 draws
    assert (~kept).float().mean().item() == pytest.approx(ratio, abs=0.0145)
    # Channels of a pixel are drawn each on its own.
    both = (~kept[0] & ~kept[1]).float().mean().item()
    assert both == pytest.approx(ratio**2, abs=0.025)
    assert torch.equal(one.images["lidar"], sample.images["lidar"])
    # Of an image and a sensor there is one draw, in all subsets; others have others.
    two = changed(Condition("rmm", ("rgb", "lidar"), ratio), sample)
    assert torch.equal(two.images["rgb"], y)
    assert not torch.equal(two.images["lidar"] != 0, kept[:1])
    renamed = changed(Condition("rmm", ("rgb",), ratio), replace(sample, name="another"))
    reseeded = changed(Condition("rmm", ("rgb",), ratio), sample, seed=1)
    assert not torch.equal(renamed.images["rgb"], y)
    assert not torch.equal(reseeded.images["rgb"], y)


@pytest.mark.parametrize("level", LEVELS)
def test_nm_has_salt_pepper_and_noise(level: str) -> None:
    density, _ = LEVELS[level]
    sample = sample_of(size=(100, 100))
    noisy = changed(Condition("nm", name=level), sample)
    # Without Gaussian noise the extremes can be counted: drawn with replacement, an element stays
    # if none of 2n draws hits it, and is the largest if the first n do and the last n do not.
    x, y = sample.images["event"], noisy.images["event"]
    n = math.ceil(density * x.numel() / 2)
    missed = (1 - 1 / x.numel()) ** n
    for elements, chance in (
        ((y == x) & (y != x.max()) & (y != x.min()), missed**2),
        (y == x.max(), (1 - missed) * missed),
        (y == x.min(), 1 - missed),
    ):
        four_deviations = 4 * math.sqrt(chance * (1 - chance) / x.numel())
        assert elements.float().mean().item() == pytest.approx(chance, abs=four_deviations)


@pytest.mark.parametrize("level", LEVELS)
def test_nm_adds_gaussian_noise_but_to_events(level: str) -> None:
    sample = sample_of(size=(100, 100))
    # Salt and pepper are all that an image of one value already has.
    flat = {name: torch.full_like(x, 3.0) for name, x in sample.images.items()}
    noisy = changed(Condition("nm", name=level), replace(sample, images=flat))
    for name in ("rgb", "lidar"):
        noise = noisy.images[name] - 3.0
        assert noise.std().item() == pytest.approx(LEVELS[level][1], rel=0.04)
        assert noise.mean().item() == pytest.approx(0.0, abs=0.05 * LEVELS[level][1])
    assert torch.equal(noisy.images["event"], flat["event"])
    assert not torch.equal(noisy.images["rgb"][:1], noisy.images["lidar"])


def test_nm_takes_the_extremes_before_noise_and_over_all_channels() -> None:
    sample = sample_of(size=(60, 60))
    x = sample.images["event"].clone()
    x[0, 0, 0], x[2, 0, 0] = 50.0, -70.0
    noisy = changed(
        Condition("nm", name="high"), replace(sample, images={**sample.images, "event": x})
    )
    y = noisy.images["event"]
    for channel in y:
        assert (channel == 50.0).any()
        assert (channel == -70.0).any()


def test_absent_sensors_stay_absent() -> None:
    sample = Noise(absent={0: ("lidar",)})[0]
    for condition in conditions(SENSORS, ("emm", "rmm", "nm", "masked")):
        result = changed(condition, sample)
        assert not result.present[2]
        assert not result.images["lidar"].any()


def test_cached_samples_stay_as_they_are_whatever_happens_to_them() -> None:
    reads: list[int] = []

    class Counted(Noise):
        def raw(self, index: int) -> Sample:
            reads.append(index)
            return super().raw(index)

    whole = sum(x.nbytes for x in Noise().raw(0).images.values()) + 6 * 8 * 8
    cached = Cached(Counted(), 3 * whole)  # three of the five fit
    found = conditions(SENSORS)
    for condition in found:
        ours, theirs = (
            Conditioned(cached, condition, seed=5),
            Conditioned(Noise(), condition, seed=5),
        )
        for i in range(5):
            assert torch.equal(ours[i].present, theirs[i].present)
            for name, x in ours[i].images.items():
                assert torch.equal(x, theirs[i].images[name]), (str(condition), name)
    assert [reads.count(i) for i in range(3)] == [1, 1, 1]
    assert reads.count(3) > len(found)


def test_degradations_happen_to_raw_values() -> None:
    names = degradations_for(SENSORS)
    found = conditions(SENSORS, ("degradations",))
    assert [(c.name, c.amount) for c in found] == [(n, s) for n in names for s in SEVERITIES]
    for condition in (found[0], Condition("degradations", amount=1.0, name="dead_lidar")):
        raw = degrade(Noise().raw(3), SENSORS, condition.name, condition.amount, seed=5)
        wanted = normalise(raw, SENSORS)
        sample = Conditioned(Noise(), condition, seed=5)[3]
        assert all(torch.equal(x, wanted.images[n]) for n, x in sample.images.items())
        clean = Noise()[3].images
        assert any(not torch.equal(x, clean[n]) for n, x in sample.images.items())
    assert summary(dict.fromkeys(found, 0.25), ["rgb", "event", "lidar"]) == {
        "degradations": dict.fromkeys(names, 0.25)
    }


def test_limit_spreads_over_the_dataset() -> None:
    assert [s.name for s in Conditioned(Noise(9), limit=3)] == ["image 0", "image 3", "image 6"]
    assert len(Conditioned(Noise(2), limit=3)) == 2


def test_results_depend_on_neither_batches_nor_workers() -> None:
    dataset = Noise(5)
    for condition in (Condition("rmm", ("rgb", "lidar"), 0.5), Condition("nm", name="mid")):
        one = evaluate_dataset(Largest(), dataset, condition=condition)
        assert evaluate_dataset(Largest(), dataset, condition=condition, batch_size=3) == one
        assert evaluate_dataset(Largest(), dataset, condition=condition, seed=1) != one
    many = evaluate_dataset(Largest(), dataset, condition=condition, batch_size=2, workers=2)
    assert many == one


def test_conditions_reach_the_model() -> None:
    dataset = Noise(4)

    @cache
    def under(condition: Condition) -> float:
        return evaluate_dataset(Largest(), dataset, condition=condition)["miou"]

    # Without a model: what `Largest` answers where two sensors are zero, and where they are absent.
    labels = torch.stack([dataset[i].labels for i in range(4)])
    lidar = torch.stack([dataset[i].images["lidar"][0] for i in range(4)])
    for condition, prediction in (
        (Condition("emm", ("rgb", "event")), torch.where(lidar > 0, 2, 0)),
        (Condition("masked", ("rgb", "event")), torch.full_like(labels, 2)),
    ):
        ious = [
            ((labels == k) & (prediction == k)).sum() / ((labels == k) | (prediction == k)).sum()
            for k in range(3)
        ]
        assert under(condition) == pytest.approx(float(torch.stack(ious).mean()))


def test_counts_samples_that_have_no_sensor_left() -> None:
    dataset = Noise(4, absent={1: ("event", "lidar"), 2: ("event",)})
    done: list[int] = []
    result = evaluate_dataset(
        Largest(), dataset, condition=Condition("masked", ("rgb",)), progress=done.append
    )
    assert (result["images"], result["left_out"], sum(done)) == (3, 1, 4)
    alone = Noise(1, absent={0: ("event", "lidar")})
    nothing = evaluate_dataset(Largest(), alone, condition=Condition("masked", ("rgb",)))
    assert nothing["left_out"] == 1
    assert math.isnan(nothing["miou"])


def test_modes_of_a_model_come_back_and_labels_are_needed() -> None:
    class Unlabelled(Noise):
        def raw(self, index: int) -> Sample:
            sample = super().raw(index)
            return replace(sample, labels=None) if index == 1 else sample

    class Model(Largest):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.other = nn.Identity().eval(), nn.Identity()

        def forward(self, *args: object, **kwargs: object) -> Tensor:
            assert not any(module.training for module in self.modules())
            return super().forward(*args, **kwargs)

    model = Model()
    with pytest.raises(ValueError, match="sample image 1 has no labels"):
        evaluate_dataset(model, Unlabelled())
    assert (model.training, model.frozen.training, model.other.training) == (True, False, True)


def test_ranks_share_the_samples() -> None:
    parts = [
        evaluate_dataset(Largest(), Noise(5), batch_size=2, rank=rank, world=2)["images"]
        for rank in (0, 1)
    ]
    assert sorted(parts) == [2, 3]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Condition("dark"), "protocol must be one of clean, emm"),
        (lambda: conditions(SENSORS, ["all"]), "protocols must be one of clean"),
        (lambda: changed(Condition("emm", ("radar",)), sample_of()), "got radar"),
        (lambda: changed(Condition("degradations", name="fog"), sample_of()), "raw samples"),
        (lambda: Conditioned(Noise(), limit=0), "limit must be at least 1"),
    ],
)
def test_says_what_is_wrong(make: object, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make()

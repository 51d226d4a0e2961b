"""Augmentations and batches: what changes together, what may change, and what may not."""

import pickle
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast.data import Augment, Batch, Sample, Sensor, SensorDataset, batches, camera
from equiseg_fast.data.loading import _prepare_worker

SENSORS = (
    camera(),
    Sensor("right", "camera", 1 / 65535, (0.5,), (0.25,)),
    Sensor("thermal", "thermal", 1.0, (0.0,), (1.0,)),
    Sensor("depth", "depth", 0.01, (0.0,), (1.0,)),
    Sensor("event", "event", 1.0, (0.0,) * 2, (1.0,) * 2),
)
IGNORE = -1
STILL = {"flip": 0.0, "jitter": 0.0, "blur": 0.0}


def place(height: int, width: int) -> Tensor:
    """A number of its own for every pixel, `[H, W]`."""
    return torch.arange(height * width).view(height, width)


def scene(index: int = 0, height: int = 20, width: int = 30) -> Sample:
    g = torch.Generator().manual_seed(index)
    images = {
        s.name: (torch.rand(s.channels, height, width, generator=g) / s.scale).round()
        for s in SENSORS
    }
    where = place(height, width)
    images["depth"] = where[None].float()
    images["event"] = torch.stack([where, -where]).float()
    present = torch.ones(len(SENSORS), dtype=torch.bool)
    return Sample(f"scene {index}", images, present, where, where.float())


class Scenes(SensorDataset):
    sensors, classes, ignore_index = SENSORS, ("road",), IGNORE

    def __init__(self, length: int, bad: int = -1) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def raw(self, index: int) -> Sample:
        if index == self.bad:
            raise FileNotFoundError(2, "No such file or directory", f"{index}.png")
        sample = scene(index)
        if index % 3 == 1:
            sample.present[0] = False
            sample.images["rgb"].zero_()
        return sample


def augmented(augment: Augment, seed: int = 0, sample: Sample | None = None) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return augment(sample or scene(), SENSORS, IGNORE, generator)


class TestGeometry:
    def test_nothing_to_do_changes_nothing(self) -> None:
        before = scene()
        after = augmented(Augment((20, 30), (1.0, 1.0), **STILL), sample=before)
        for name, x in before.images.items():
            assert torch.equal(after.images[name], x), name
        assert torch.equal(after.labels, before.labels)

    def test_all_sensors_and_labels_go_together(self) -> None:
        """Every pixel that is there comes from where its label does, and no value is invented."""
        seen = set()
        for seed in range(60):
            out = augmented(Augment((16, 24)), seed)
            assert {x.shape[-2:] for x in out.images.values()} == {(16, 24)}
            there = out.labels != IGNORE
            height, width = int(there.any(1).sum()), int(there.any(0).sum())
            assert there[:height, :width].all()  # what is missing is right and below
            where = out.labels.where(there, 0)
            for x in (out.images["depth"][0], out.images["event"][0], out.distance):
                assert torch.equal(x, where.float())
            assert torch.equal(out.images["event"][1], -where.float())
            rows, columns = where[:height, :width] // 30, where[:height, :width] % 30
            assert (rows == rows[:, :1]).all()
            assert (columns == columns[:1]).all()
            assert not out.images["rgb"][:, ~there].any()
            seen.add(bool(columns[0, 0] > columns[0, -1]))
        assert seen == {True, False}

    def test_interpolated_images_stay_with_labels(self) -> None:
        """A ramp interpolated lies within a pixel of the nearest one."""
        ramp = torch.arange(30.0).expand(20, 30) / 30
        sample = scene()
        sample.images["thermal"] = ramp[None]
        sample = replace(sample, labels=torch.arange(30).expand(20, 30).contiguous())
        for seed in range(40):
            out = augmented(Augment((16, 24), jitter=0.0, blur=0.0), seed, sample)
            there = out.labels != IGNORE
            error = (out.images["thermal"][0] * 30 - out.labels)[there].abs()
            assert error.max() <= 1.01, seed

    def test_the_shorter_side_follows_the_scale(self) -> None:
        """u * 16 of 20 rows, and no more of 30 columns than 4 * u * 24."""
        for u, rows in ((0.5, 8), (0.75, 12), (1.0, 16)):
            there = augmented(Augment((16, 24), (u, u), **STILL)).labels != IGNORE
            assert int(there.any(1).sum()) == rows
            assert int(there.any(0).sum()) == min(24, round(rows * 1.5))
        wide = augmented(Augment((16, 24), (0.5, 0.5), **STILL), sample=scene(0, 4, 120)).labels
        # 48 = 4 * 0.5 * 24 columns wide, so 2 rows high where the shorter side alone gave 8.
        assert int((wide != IGNORE).any(1).sum()) == 2

    def test_crops_reach_all_borders_and_not_beyond(self) -> None:
        firsts = set()
        for seed in range(300):
            labels = augmented(Augment((16, 28), (1.25, 1.25), **STILL), seed).labels
            assert (labels != IGNORE).all()
            firsts.add((int(labels[0, 0]) // 30, int(labels[0, 0]) % 30))
        assert firsts == {(row, column) for row in range(5) for column in range(3)}

    def test_a_scene_that_shrinks_is_averaged(self) -> None:
        """Bright points every sixth pixel: light spreads, measurements are taken or left out."""
        points = torch.zeros(60, 90)
        points[::6, ::6] = 36
        sample = scene(0, 60, 90)
        sample.images.update(thermal=points[None], depth=points[None])
        out = augmented(Augment((10, 15), (1.0, 1.0), **STILL), sample=sample)
        assert 0 < float(out.images["thermal"].std()) < 0.5
        assert float(out.images["thermal"].mean()) == pytest.approx(1.0, rel=0.1)
        assert set(out.images["depth"].unique().tolist()) <= {0.0, 36.0}

    def test_unlabelled_scenes_stay_so(self) -> None:
        out = augmented(Augment((16, 24)), sample=replace(scene(), labels=None, distance=None))
        assert out.labels is None
        assert out.distance is None


class TestLight:
    def test_only_cameras_change_and_stay_in_range(self) -> None:
        augment = Augment((20, 30), (1.0, 1.0), flip=0.0, jitter=1.0, blur=1.0)
        before = scene()
        means = []
        for seed in range(30):
            out = augmented(augment, seed, before)
            for name in ("thermal", "depth", "event"):
                assert torch.equal(out.images[name], before.images[name])
            for sensor in SENSORS[:2]:
                x = out.images[sensor.name] * sensor.scale
                assert not torch.equal(out.images[sensor.name], before.images[sensor.name])
                assert x.min() >= 0
                assert x.max() <= 1.00001
            means.append(float(out.images["rgb"].mean() / 255))
        assert min(means) < 0.35
        assert max(means) > 0.6
        assert torch.equal(before.images["rgb"], scene().images["rgb"])  # inputs are kept

    def test_absent_sensors_stay_zero(self) -> None:
        sample = scene()
        sample.present[1] = False
        sample.images["right"].zero_()
        augment = Augment((16, 24), jitter=1.0, blur=1.0)
        out = augmented(augment, sample=sample)
        assert not out.images["right"].any()
        # The others are as if it were there.
        assert torch.equal(out.images["rgb"], augmented(augment).images["rgb"])
        assert torch.equal(out.labels, augmented(augment).labels)

    def test_brightness_contrast_and_saturation(self) -> None:
        """Against their definitions, on colours that no step drives out of range."""
        torch.manual_seed(1)
        sample = scene()
        sample.images["rgb"] = 100 + 20 * torch.rand(3, 20, 30)
        augment = Augment((20, 30), (1.0, 1.0), flip=0.0, jitter=1.0, blur=0.0)
        x = sample.images["rgb"].double()
        luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
        for seed in range(5):
            g = torch.Generator().manual_seed(seed)
            torch.rand(4, generator=g, dtype=torch.float64)
            b, c, s = (0.5 + torch.rand(5, generator=g, dtype=torch.float64)[1:4]).tolist()
            y = x * b
            y = c * y + (1 - c) * (luma * y).sum(0).mean()
            y = s * y + (1 - s) * (luma * y).sum(0)
            out = augmented(augment, seed, sample).images["rgb"]
            torch.testing.assert_close(out.double(), y, rtol=1e-4, atol=0)

    def test_grey_cameras_have_no_saturation(self) -> None:
        """A single channel is its own grey; contrast draws values to their mean, or from it."""
        sample = scene()
        sample.images["right"] = 20000 + 5000 * torch.rand(1, 20, 30)
        augment = Augment((20, 30), (1.0, 1.0), flip=0.0, jitter=1.0, blur=0.0)
        spread = [
            float(x.std() / x.mean() / (sample.images["right"].std() / 22500))
            for x in (augmented(augment, seed, sample).images["right"] for seed in range(20))
        ]
        assert 0.45 < min(spread) < 0.8
        assert 1.2 < max(spread) < 1.6

    def test_blur_keeps_light(self) -> None:
        """A point spreads over 3x3 pixels by the weights of a Gaussian of 0.8 pixels."""
        sample = scene()
        sample.images["rgb"] = torch.zeros(3, 20, 30)
        sample.images["rgb"][:, 10, 10] = 200
        out = augmented(Augment((20, 30), (1.0, 1.0), 0.0, 0.0, 1.0), sample=sample).images["rgb"]
        x = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.64))
        expected = 200 * torch.outer(x, x) / x.sum() ** 2
        torch.testing.assert_close(out[1, 9:12, 9:12], expected)
        assert float(out.sum()) == pytest.approx(600, rel=1e-5)
        flat = torch.full((3, 20, 30), 200.0)
        sample.images["rgb"] = flat
        out = augmented(Augment((20, 30), (1.0, 1.0), 0.0, 0.0, 1.0), sample=sample).images["rgb"]
        torch.testing.assert_close(out, flat)  # also at the borders

    def test_probabilities_are_kept(self) -> None:
        before = scene(0, 4, 4)
        counts = {"flip": 0, "jitter": 0, "blur": 0}
        for field in counts:
            augment = Augment((4, 4), (1.0, 1.0), **{**STILL, field: 0.3})
            for seed in range(400):
                x = augmented(augment, seed, before).images["rgb"]
                counts[field] += not torch.equal(x, before.images["rgb"])
        assert all(80 < count < 160 for count in counts.values()), counts


class TestAugment:
    def test_follows_from_the_generator(self) -> None:
        augment = Augment((16, 24), jitter=1.0, blur=1.0)
        state = torch.random.get_rng_state()
        first, again, other = (augmented(augment, seed) for seed in (3, 3, 4))
        assert torch.equal(torch.random.get_rng_state(), state)
        for name, x in first.images.items():
            assert torch.equal(again.images[name], x)
            assert not torch.equal(other.images[name], x)

    def test_bits_do_not_depend_on_threads(self) -> None:
        """Of which those on images of a million values are many: a camera alone is enough."""
        rgb = torch.rand(3, 700, 900, generator=torch.Generator().manual_seed(0)) * 255
        sample = Sample("large", {"rgb": rgb}, torch.tensor([True]))
        augment = Augment((128, 128), jitter=1.0, blur=1.0)

        def images(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return augment(sample, SENSORS[:1], IGNORE, generator).images["rgb"]

        expected = [images(seed) for seed in range(3)]
        try:
            torch.set_num_threads(3)
            actual = [images(seed) for seed in range(3)]
        finally:
            torch.set_num_threads(1)
        assert all(map(torch.equal, actual, expected))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"crop": 64}, "crop must be a sequence"),
            ({"crop": (64,)}, r"crop must have two numbers; got \(64,\)"),
            ({"crop": (64, 0)}, r"crop\[1\] must be at least 1; got 0"),
            ({"scale": (0.0, 1.0)}, r"scale\[0\] must be positive"),
            ({"scale": (2.0, 1.0)}, "scale must be lowest and highest"),
            ({"jitter": 1.5}, "jitter must be a probability, 0 to 1; got 1.5"),
            ({"flip": "often"}, "flip must be a number"),
        ],
    )
    def test_fields_are_checked(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            Augment(**{"crop": (16, 24), **fields})

    def test_a_sample_that_does_not_fit_is_named(self) -> None:
        augment, sample = Augment((16, 24)), scene(7)
        with pytest.raises(ValueError, match=r"scene 7: labels must have shape .*the size of rgb"):
            augmented(augment, sample=replace(sample, labels=place(20, 31)))
        images = {**sample.images, "depth": torch.zeros(3, 20, 30)}
        with pytest.raises(ValueError, match=r"scene 7: depth must .*\[1, 20, 30\].*\[3, 20, 30\]"):
            augmented(augment, sample=replace(sample, images=images))
        with pytest.raises(ValueError, match="scene 7: images must have rgb; got"):
            augmented(augment, sample=replace(sample, images={}))
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
            augment(sample, SENSORS, IGNORE, None)


AUGMENT = Augment((16, 24), jitter=0.5, blur=0.5)
RUN: dict[str, Any] = {"batch_size": 4, "seed": 5, "epoch": 2, "augment": AUGMENT}


def names(loader: Any) -> list[list[str]]:
    return [batch.names for batch in loader]


def assert_equal(actual: list[Batch], expected: list[Batch]) -> None:
    assert [b.names for b in actual] == [b.names for b in expected]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.present, b.present)
        assert torch.equal(a.labels, b.labels)
        for name, x in b.images.items():
            assert torch.equal(a.images[name], x)


def test_only_a_gpu_may_lag_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it copies to the CPU in the background would be read before it is there."""
    asked = []

    def to(x: Tensor, device: str, *, non_blocking: bool) -> Tensor:
        asked.append((device, non_blocking))
        return x

    monkeypatch.setattr(Tensor, "to", to)
    batch = batches(Scenes(1), **{**RUN, "batch_size": 1, "augment": None}).dataset[0]
    batch._replace(images={"rgb": batch.images["rgb"]}).to("cpu").to("cuda")
    assert asked == [("cpu", False)] * 2 + [("cuda", True)] * 2


class TestBatches:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_change_nothing(self, workers: int) -> None:
        """Forked ones, and what spawned ones get: the dataset and its functions by pickling."""
        expected = list(batches(Scenes(14), **RUN))
        assert len(expected) == 3
        assert all(len(b.names) == 4 for b in expected)
        loader = batches(Scenes(14), **RUN, workers=workers)
        loader.multiprocessing_context = "fork"
        state = torch.random.get_rng_state()
        assert_equal(list(loader), expected)
        assert torch.equal(torch.random.get_rng_state(), state)
        parts = loader.dataset, loader.collate_fn, loader.worker_init_fn
        dataset, collate_fn, _ = pickle.loads(pickle.dumps(parts))
        assert_equal([collate_fn(dataset[i]) for i in range(3)], expected)

    def test_goes_on_where_it_stopped(self) -> None:
        expected = list(batches(Scenes(14), **RUN))
        for first in range(4):
            assert_equal(list(batches(Scenes(14), **RUN, first=first)), expected[first:])

    def test_follows_from_seed_epoch_and_index(self) -> None:
        """Another order and other draws in every epoch; the order is not that of other settings."""
        by_epoch = [names(batches(Scenes(12), **{**RUN, "epoch": e})) for e in range(4)]
        assert len({str(x) for x in by_epoch}) == 4
        assert names(batches(Scenes(12), **{**RUN, "seed": 6})) != by_epoch[2]
        small = names(batches(Scenes(12), **{**RUN, "batch_size": 2, "augment": None}))
        assert [*chain(*small)] == [*chain(*by_epoch[2])]

        def labels(epoch: int) -> Tensor:
            loader = batches(Scenes(1), **{**RUN, "batch_size": 1, "epoch": epoch})
            return next(iter(loader)).labels

        drawn = [labels(epoch) for epoch in range(4)]
        assert all(not torch.equal(drawn[0], x) for x in drawn[1:])
        assert torch.equal(drawn[0], labels(0))

    def test_neighbours_draw_differently(self) -> None:
        """Sample i + 1 of one epoch draws nothing like sample i of the next, or of another seed."""

        class Same(Scenes):
            def raw(self, index: int) -> Sample:
                return scene(0)

        seen = []
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
            run = {**RUN, "batch_size": 8, "seed": seed, "epoch": epoch, "shuffle": False}
            run["augment"] = replace(AUGMENT, jitter=1.0)
            seen += next(iter(batches(Same(8), **run))).images["rgb"].mean(dim=(1, 2, 3)).tolist()
        assert len(set(seen)) == 32

    def test_ranks_share_the_batch_of_one_process(self) -> None:
        expected = list(batches(Scenes(14), **RUN))
        parts = [list(batches(Scenes(14), **RUN, rank=rank, world=2)) for rank in range(2)]
        for whole, *shares in zip(expected, *parts, strict=True):
            assert [len(s.names) for s in shares] == [2, 2]
            images = {n: torch.cat([s.images[n] for s in shares]) for n in whole.images}
            joined = Batch(
                [*chain(*(s.names for s in shares))],
                images,
                torch.cat([s.present for s in shares], dim=1),
                torch.cat([s.labels for s in shares]),
            )
            assert_equal([joined], [whole])

    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("count", [1, 4, 9, 14])
    def test_validation_sees_every_sample_once(self, count: int, world: int) -> None:
        run = {**RUN, "augment": None, "shuffle": False, "drop_last": False, "world": world}
        loaders = [batches(Scenes(count), **run, rank=rank) for rank in range(world)]
        seen = [name for loader in loaders for batch in names(loader) for name in batch]
        assert sorted(seen) == sorted(f"scene {i}" for i in range(count))
        assert max(map(len, loaders)) - min(map(len, loaders)) <= 1
        if world == 1:
            assert seen == [f"scene {i}" for i in range(count)]
            assert len(loaders[0]) == -(-count // 4)

    @pytest.mark.parametrize("augment", [None, Augment((20, 30), (1.0, 1.0), **STILL)])
    def test_samples_are_normalised(self, augment: Augment | None) -> None:
        """As the dataset does it, also where something is done before."""
        dataset = Scenes(4)
        batch = next(iter(batches(dataset, **{**RUN, "augment": augment, "shuffle": False})))
        for i in range(4):
            for name, x in dataset[i].images.items():
                assert torch.equal(batch.images[name][i], x)
        assert batch.present[0].tolist() == [True, False, True, True]

    def test_absent_sensors_are_zero_and_marked(self) -> None:
        run = {**RUN, "augment": replace(AUGMENT, jitter=1.0, blur=1.0), "shuffle": False}
        batch = next(iter(batches(Scenes(4), **run)))
        assert batch.mask is not None
        assert not batch.images["rgb"][1].any()
        assert batch.images["rgb"][0].any()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_keeps_its_message(self, workers: int) -> None:
        loader = batches(Scenes(4, bad=2), **RUN, workers=workers)
        with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '2.png'$") as e:
            list(loader)
        if workers:
            assert "in raw" in str(e.value.__cause__)

    def test_an_error_of_any_kind_arrives(self) -> None:
        loader = batches(Unpicklable(4), **RUN, workers=1)
        with pytest.raises(RuntimeError, match=r"^Odd: a value and another$"):
            list(loader)

    def test_workers_have_one_thread(self) -> None:
        import cv2

        threads = cv2.getNumThreads(), torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            cv2.setNumThreads(2)
            _prepare_worker(0)
            assert torch.get_num_threads() == 1
            assert cv2.getNumThreads() == 1
        finally:
            cv2.setNumThreads(threads[0])
            torch.set_num_threads(threads[1])

    def test_a_loader_can_be_sent(self) -> None:
        loader = batches(Scenes(4), **RUN)
        again = pickle.loads(pickle.dumps(loader.dataset))
        assert again[0].names == loader.dataset[0].names

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": [1]}, "dataset must be a SensorDataset; got list"),
            ({"dataset": Scenes(3)}, "dataset must have at least batch_size = 4 .*Scenes has 3"),
            ({"dataset": Scenes(0), "drop_last": False}, "at least 1 samples; Scenes has 0"),
            ({"augment": SimpleNamespace()}, "augment must be an Augment or None"),
            ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
            ({"batch_size": 6, "world": 4}, "batch_size must be a multiple of world.*6 and 4"),
            ({"seed": 1.5}, "seed must be an integer"),
            ({"epoch": -1}, "epoch must be at least 0; got -1"),
            ({"workers": -1}, "workers must be at least 0; got -1"),
            ({"rank": 2, "world": 2}, "rank must be below world = 2; got 2"),
            ({"first": 4}, r"first must be 0\.\.3, the number of batches; got 4"),
            ({"shuffle": 1}, "shuffle must be True or False; got 1"),
        ],
    )
    def test_arguments_are_checked(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            batches(**{"dataset": Scenes(14), **RUN, **changes})


class Odd(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Unpicklable(Scenes):
    def raw(self, index: int) -> Sample:
        raise Odd("a value", "another")

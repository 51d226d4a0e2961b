"""Rendered scenes: what sensors see, what they do not, and that all follows from seed and index."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from equiseg_fast.data import Sample, Sensor, SyntheticScenes, _render, synthetic
from equiseg_fast.data.synthetic import FAR, SENSORS

CLASSES = SyntheticScenes.classes
ROAD, MARKING, SIDEWALK, TERRAIN = (
    CLASSES.index(name) for name in ("road", "marking", "sidewalk", "terrain")
)

# length of the ray of depth 1 through the middle of every pixel
_RIGHT, _UP = np.arange(128) - 63.5, np.arange(96)[:, None] - 47.5
SLANT = torch.from_numpy(np.sqrt(1 + (_RIGHT**2 + _UP**2) / (0.72 * 128) ** 2)).float()


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    dataset = SyntheticScenes(length=60, seed=5)
    return [dataset.raw(i) for i in range(60)]


def values_of(scenes: list[Sample], sensor: str, *classes: str) -> torch.Tensor:
    """[C, n] values of all pixels of the classes."""
    wanted = torch.tensor([CLASSES.index(name) for name in classes])
    return torch.cat([s.images[sensor][:, torch.isin(s.labels, wanted)] for s in scenes], dim=1)


def same(a: Sample, b: Sample) -> bool:
    return (
        a.name == b.name
        and all(torch.equal(x, b.images[name]) for name, x in a.images.items())
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.distance, b.distance)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_scenes_come_from_any_number_of_processes(workers: int) -> None:
    dataset = SyntheticScenes((32, 64), length=5, seed=3)
    here = [dataset[i] for i in reversed(range(5))][::-1]
    _render._tile.cache_clear()
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=lambda x: x[0])
    assert all(same(a, b) for a, b in zip(here, loader, strict=True))
    assert not same(here[0], here[1])
    other = SyntheticScenes((32, 64), length=5, seed=4).raw(0)
    assert not torch.equal(other.labels, here[0].labels)


def test_a_sensor_does_not_depend_on_which_others_are_asked_for() -> None:
    whole = SyntheticScenes((32, 64), seed=1).raw(2)
    own = Sensor("event", "event", 1.0, (0.5, 0.5), (2.0, 2.0))
    some = SyntheticScenes((32, 64), seed=1, sensors=["lidar", own])
    assert (
        [sensor.name for sensor in some.sensors] == list(some.raw(2).images) == ["lidar", "event"]
    )
    for name, values in some.raw(2).images.items():
        torch.testing.assert_close(values, whole.images[name], rtol=0, atol=0)
    torch.testing.assert_close(some[2].images["event"], (whole.images["event"] - 0.5) / 2)


def test_a_scene_is_the_same_at_twice_the_size() -> None:
    small, large = (SyntheticScenes(size, seed=2).raw(4) for size in ((64, 96), (128, 192)))
    # centres of small pixels lie at corners of large ones
    agree = (small.labels == large.labels[::2, ::2]) | (small.labels == large.labels[1::2, 1::2])
    assert agree.double().mean() > 0.9


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 96)])
def test_sizes(size: tuple[int, int]) -> None:
    sample = SyntheticScenes(size).raw(0)
    for sensor in SENSORS:
        values = sample.images[sensor.name]
        assert values.shape == (sensor.channels, *size)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert sample.labels.shape == sample.distance.shape == size
    assert sample.labels.dtype == torch.int64


def test_sensors_and_labels_agree(scenes: list[Sample]) -> None:
    sky = CLASSES.index("sky")
    for sample in scenes[:20]:
        assert torch.equal(sample.labels == sky, sample.distance == FAR)
        metres, reflectance = sample.images["lidar"]
        hit = metres > 0
        assert torch.equal(hit, reflectance > 0)
        assert 0.03 < hit.double().mean() < 0.3
        assert (metres - sample.distance)[hit].abs().max() < 0.02 * 6
        assert not (hit & (sample.labels == sky)).any()
        depth = sample.images["depth"][0]
        exact = sample.distance / SLANT
        seen = depth > 0
        assert ((depth - exact).abs() <= 0.006 * exact**2 + 1e-3)[seen].all()
        assert not (seen & (exact > 60)).any()
        assert seen[exact < 60].double().mean() > 0.95


def test_the_ground_is_one_plane_to_depth_and_paint_is_seen_by_camera_and_lidar(
    scenes: list[Sample],
) -> None:
    for sample in scenes[:20]:
        z = torch.where(sample.labels <= TERRAIN, sample.distance / SLANT, torch.nan)
        assert {ROAD, MARKING} <= set(sample.labels.unique().tolist())
        for row in z:
            row = row[~row.isnan()]
            if len(row) > 1:
                assert row.max() / row.min() < 1.0001
    paint, asphalt = (values_of(scenes, "rgb", name).mean() for name in ("marking", "road"))
    assert paint > asphalt + 20
    paint, asphalt = (lidar_of(scenes, name) for name in ("marking", "road"))
    assert paint > 3 * asphalt


def lidar_of(scenes: list[Sample], what: str) -> torch.Tensor:
    reflectance = values_of(scenes, "lidar", what)[1]
    return reflectance[reflectance > 0].mean()


def test_only_the_camera_tells_a_sidewalk_from_terrain(scenes: list[Sample]) -> None:
    stone, grass = (lidar_of(scenes, name) for name in ("sidewalk", "terrain"))
    assert abs(stone / grass - 1) < 0.02
    stone, grass = (values_of(scenes, "rgb", name).mean(1) for name in ("sidewalk", "terrain"))
    assert grass[1] - grass[2] > stone[1] - stone[2] + 15  # green against blue


def test_signs_shine_to_the_lidar(scenes: list[Sample]) -> None:
    assert lidar_of(scenes, "sign") > 85 > 2 * lidar_of(scenes, "building")


def test_only_events_tell_that_a_car_moves(scenes: list[Sample]) -> None:
    moving, parked = (values_of(scenes, "event", name).mean() for name in ("moving car", "car"))
    assert moving > 1.7 * parked
    for sensor in ("rgb", "depth"):
        moving, parked = (values_of(scenes, sensor, name) for name in ("moving car", "car"))
        assert (moving.mean() - parked.mean()).abs() < 0.35 * parked.std()


def test_no_class_is_rare(scenes: list[Sample]) -> None:
    labels = torch.stack([sample.labels for sample in scenes])
    share = labels.flatten().bincount(minlength=len(CLASSES)) / labels.numel()
    assert len(share) == len(CLASSES) == len(SyntheticScenes.palette)
    assert share.min() > 0.005
    assert share.max() < 0.45


def test_normalised_values_have_mean_0_and_deviation_1(scenes: list[Sample]) -> None:
    for sensor in synthetic.SENSORS:
        x = torch.stack([sensor.normalise(sample.images[sensor.name]) for sample in scenes])
        x = x.transpose(0, 1).flatten(1).double()
        # of few scenes: exposure differs by half a stop between them
        assert x.mean(1).abs().max() < 0.15
        assert (x.std(1) - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"size": (33, 64)}, ValueError, r"size must be .* multiples of 32; got \(33, 64\)"),
        ({"size": 64}, TypeError, "size must be"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"sensors": "rgb"}, TypeError, "sensors must be a sequence"),
        ({"sensors": ["radar"]}, ValueError, "sensors must be of rgb.*'radar'"),
        ({"sensors": ["rgb", "rgb"]}, ValueError, "unique names"),
        ({"sensors": [Sensor("depth", "depth")]}, ValueError, "depth has 1 channels; got 3"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SyntheticScenes(**arguments)


def test_index_errors() -> None:
    with pytest.raises(IndexError, match=r"0\.\.2; got 3"):
        SyntheticScenes((32, 32), length=3)[3]

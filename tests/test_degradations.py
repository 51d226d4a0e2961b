"""Degradations: identity at 0, worse with severity, the same chance again, values of files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from equiseg_fast.data import (
    DEGRADATIONS,
    Degraded,
    Sample,
    Sensor,
    SyntheticScenes,
    camera,
    degradations_for,
    degrade,
)

SCENES = SyntheticScenes((64, 96), length=4, seed=6)
NAMES = degradations_for(SCENES.sensors)
TOUCHED = {
    "night": {"rgb"},
    "over_exposure": {"rgb"},
    "motion_blur": {"rgb"},
    "fog": {"rgb", "depth", "event", "lidar"},
    "lidar_dropout": {"lidar"},
    "lidar_jitter": {"lidar"},
    "event_noise": {"event"},
    **{f"dead_{name}": {name} for name in ("rgb", "depth", "event", "lidar")},
}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return SCENES.raw(1)


def run(sample: Sample, name: str, severity: float, seed: int = 0) -> dict[str, Tensor]:
    return degrade(sample, SCENES.sensors, name, severity, seed).images


def contrast(x: Tensor) -> float:
    """How much neighbours differ."""
    return float(x.diff(dim=1).abs().mean() + x.diff(dim=2).abs().mean())


def test_names() -> None:
    assert list(TOUCHED) == NAMES == [*DEGRADATIONS, *(n for n in NAMES if n.startswith("dead"))]
    rest = [Sensor("ir", "thermal"), camera("left")]
    assert degradations_for(rest) == [
        *("night", "over_exposure", "motion_blur", "fog"),
        *("dead_ir", "dead_left"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_touched_and_what_is_not(sample: Sample, name: str) -> None:
    before = {key: x.clone() for key, x in sample.images.items()}
    for severity in (0, 0.5, 1):
        after = degrade(sample, SCENES.sensors, name, severity, seed=3)
        changed = {key for key, x in after.images.items() if not torch.equal(x, before[key])}
        assert changed == (TOUCHED[name] if severity else set())
        assert after.labels is sample.labels
        assert torch.equal(after.present, sample.present)
        for sensor in SCENES.sensors:
            x = after.images[sensor.name]
            assert x.shape == before[sensor.name].shape
            assert x.dtype == torch.float32
            assert x.isfinite().all()
            assert x.min() >= 0
            if sensor.kind in ("camera", "event"):
                assert x.max() <= round(1 / sensor.scale)
                assert torch.equal(x, x.round())
    assert all(torch.equal(sample.images[key], x) for key, x in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_chance_follows_from_seed_and_names(sample: Sample, name: str) -> None:
    one, again = (run(sample, name, 0.6, 1) for _ in range(2))
    assert all(torch.equal(one[key], again[key]) for key in one)
    if name.startswith(("over_exposure", "dead")):
        return
    other_name = replace(sample, name="another")
    for other in (run(sample, name, 0.6, 2), run(other_name, name, 0.6, 1)):
        assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_worse_with_severity(name: str) -> None:
    """What is lost of the clean values grows all the way, in every sensor that is touched."""
    steps = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    for key in TOUCHED[name]:
        errors = np.zeros(len(steps))
        for i in range(len(SCENES)):
            clean = SCENES.raw(i)
            for k, severity in enumerate(steps):
                images = degrade(clean, SCENES.sensors, name, severity, seed=0).images
                errors[k] += (images[key] - clean.images[key]).abs().mean()
        assert errors[0] == 0
        # light fog takes no depth, and the last rows that a lidar reads out hold no points
        assert (np.diff(errors) >= 0).all(), (key, errors)
        assert errors[1] > 0 or (name, key) == ("fog", "depth")
        assert errors[-1] > errors[3] > errors[1]


def test_night_is_dark_and_noisy_and_headlights_reach_what_is_near(sample: Sample) -> None:
    clean, night = sample.images["rgb"], run(sample, "night", 0.9)["rgb"]
    assert night.mean() < 0.3 * clean.mean()
    # noise: what neighbours differ by, in proportion to brightness
    assert contrast(night) / night.mean() > 3 * contrast(clean) / clean.mean()
    blind = replace(sample, distance=None)
    lit = night - run(blind, "night", 0.9)["rgb"]
    near = sample.distance < 8
    assert lit[:, near].mean() > 5 * lit[:, ~near].abs().mean()


def test_over_exposure_and_motion_blur(sample: Sample) -> None:
    clean = sample.images["rgb"]
    white = run(sample, "over_exposure", 1)["rgb"]
    assert (white == 255).double().mean() > 0.8
    assert (run(sample, "over_exposure", 0.3)["rgb"] >= clean).all()
    blurred = run(sample, "motion_blur", 1)["rgb"]
    assert contrast(blurred) < 0.5 * contrast(clean)
    before, after = (float(((x / 255) ** 2.2).mean()) for x in (clean, blurred))
    assert after == pytest.approx(before, rel=0.02)  # no light is lost


def test_fog_is_koschmieders(sample: Sample) -> None:
    severity, clean = 0.5, sample.images["rgb"].double()
    clear = torch.exp(-0.15 * severity**2 * sample.distance.double())
    light = (clean / 255) ** 2.2 * clear + 0.65 * (1 - clear)
    expected = (light ** (1 / 2.2) * 255).round()
    foggy = run(sample, "fog", severity)
    assert (foggy["rgb"] - expected).abs().max() <= 1
    depth, before = foggy["depth"], sample.images["depth"]
    lost = (depth == 0) & (before > 0)
    assert sample.distance[lost[0]].min() > 30
    assert torch.equal(depth[~lost], before[~lost])
    thick, before = run(sample, "fog", 1)["lidar"], sample.images["lidar"]
    had, far = before[0] > 0, sample.distance > 12
    assert (thick[0] == before[0])[had & far].double().mean() < 0.1
    assert (thick[0] == before[0])[had & (sample.distance < 6)].double().mean() > 0.1
    backscatter = (thick[0] > 0) & (thick[0] < before[0])
    assert 0.1 < backscatter[had].double().mean() < 0.5
    assert (thick[0] <= before[0]).all()


def test_fog_without_distance_is_that_of_a_flat_road(sample: Sample) -> None:
    gray = replace(sample, distance=None, images={**sample.images})
    gray.images["rgb"] = torch.full((3, 64, 96), 100.0)
    rows = run(gray, "fog", 0.4)["rgb"][0, :, 0]
    assert (rows[:32] == rows[0]).all()
    assert (rows[32:].diff() <= 0).all()
    assert rows[0] > rows[-1] + 30


def test_points_are_lost_for_good_and_stray_among_their_own(sample: Sample) -> None:
    before = sample.images["lidar"]
    less = before
    for severity in (0.3, 0.6, 1):
        now = run(sample, "lidar_dropout", severity)["lidar"]
        assert ((now == less) | (now == 0)).all()
        less = now
    assert (less[0] > 0).sum() < 0.1 * (before[0] > 0).sum()
    strayed = run(sample, "lidar_jitter", 0.5)["lidar"]
    assert set(strayed[1].unique().tolist()) <= set(before[1].unique().tolist())
    assert (strayed[0] > 0).sum() > 0.6 * (before[0] > 0).sum()


def test_event_noise_adds_and_leaves_an_empty_third_channel_empty(sample: Sample) -> None:
    before = sample.images["event"]
    noisy = run(sample, "event_noise", 1)["event"]
    assert (noisy >= before).all()
    assert 0.25 < (noisy > before).double().mean() < 0.4
    assert (noisy == 10).sum() > (before == 10).sum() + 50
    three = Sensor("event", "event")
    images = {"event": torch.cat([before * 25, torch.zeros(1, 64, 96)])}
    given = replace(sample, images=images, present=torch.tensor([True]))
    noisy = degrade(given, [three], "event_noise", 1, 0).images["event"]
    assert not noisy[2].any()
    assert (noisy[:2] > images["event"][:2]).any()
    signed = Sensor("event", "event", 1 / 255, (0.0,), (1.0,))
    given = replace(given, images={"event": before[:1] * 25 - before[1:] * 25})
    noisy = degrade(given, [signed], "event_noise", 1, 0).images["event"]
    assert noisy.min() == -255
    assert noisy.max() == 255


def test_a_dead_sensor_gives_zeros_and_half_a_dead_one_half(sample: Sample) -> None:
    assert not run(sample, "dead_depth", 1)["depth"].any()
    half = run(sample, "dead_rgb", 0.5)["rgb"]
    assert torch.equal(half[:, :32], sample.images["rgb"][:, :32])
    assert not half[:, 32:].any()


def test_absent_sensors_stay_absent(sample: Sample) -> None:
    images = {**sample.images, "event": torch.zeros(2, 64, 96)}
    given = replace(sample, images=images, present=torch.tensor([True, True, False, True]))
    after = degrade(given, SCENES.sensors, "event_noise", 1, 0)
    assert not after.images["event"].any()


def test_cameras_of_other_ranges(sample: Sample) -> None:
    """A camera of floats up to 1 sees the same as one of 8 bits, and is not rounded."""
    floats = Sensor("rgb", "camera", 1.0)
    given = replace(
        sample, images={"rgb": sample.images["rgb"] / 255}, present=torch.tensor([True])
    )
    for name in ("night", "over_exposure", "motion_blur", "fog"):
        x = degrade(given, [floats], name, 0.5, 0).images["rgb"]
        assert 0 <= x.min() <= x.max() <= 1
        assert (x * 255 - run(sample, name, 0.5)["rgb"]).abs().max() < 0.51


def test_degraded_datasets() -> None:
    fog = Degraded(SCENES, "fog", 0.5, seed=2)
    assert len(fog) == 4
    assert (fog.sensors, fog.classes, fog.palette) == (
        SCENES.sensors,
        SCENES.classes,
        SCENES.palette,
    )
    expected = degrade(SCENES.raw(3), SCENES.sensors, "fog", 0.5, 2)
    assert torch.equal(fog.raw(3).images["rgb"], expected.images["rgb"])
    normalised = SCENES.sensors[0].normalise(expected.images["rgb"])
    assert torch.equal(fog[3].images["rgb"], normalised)


@pytest.mark.parametrize(
    ("name", "severity", "says"),
    [
        ("rain", 0.5, "name must be one of night.*'rain'"),
        ("lidar_jitter", 0.5, "name must be one of night.*dead_rgb; got 'lidar_jitter'"),
        ("night", 1.5, r"severity must be in \[0, 1\]; got 1.5"),
        ("night", -0.1, r"severity must be in \[0, 1\]"),
        ("night", float("nan"), "severity must be finite"),
    ],
)
def test_errors(name: str, severity: float, says: str) -> None:
    dataset = SyntheticScenes((32, 32), sensors=["rgb"])
    with pytest.raises(ValueError, match=says):
        Degraded(dataset, name, severity)
    with pytest.raises(ValueError, match=says):
        degrade(dataset.raw(0), dataset.sensors, name, severity, 0)

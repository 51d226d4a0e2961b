"""Pictures for people: colours mean what they should, sheets are whole files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from equiseg_fast.data import Sensor, SyntheticScenes, camera, colour_labels, palette_of, show
from equiseg_fast.data.__main__ import main
from equiseg_fast.data.pictures import sheet


def one(kind: str, channels: int) -> Sensor:
    return Sensor("x", kind, 1.0, (0.0,) * channels, (1.0,) * channels)


def test_a_camera_looks_as_it_is() -> None:
    values = torch.arange(48.0).reshape(3, 4, 4) * 5
    assert np.array_equal(show(camera(), values), values.permute(1, 2, 0).numpy())
    floats = show(one("camera", 1), torch.tensor([[[0.0, 0.5, 2.0]]]))
    assert floats[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["depth", "lidar"])
def test_near_is_yellow_far_is_blue_and_nothing_black(kind: str) -> None:
    near, far, nothing = show(one(kind, 1), np.array([[[2.0, 50.0, 0.0]]], np.float32))[0].tolist()
    assert near[0] > 200 > 60 > near[2]
    assert far[2] > far[0]
    assert nothing == [0, 0, 0]


def test_points_of_large_lidar_images_grow_and_those_of_small_ones_do_not() -> None:
    for side, pixels in ((96, 1), (640, 25)):
        values = torch.zeros(2, side, side)
        values[:, side // 2, side // 2] = 5
        assert (show(one("lidar", 2), values).any(axis=2)).sum() == pixels


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_events_are_red_and_blue_on_white(channels: int) -> None:
    values = torch.zeros(channels, 1, 3)
    values[0, 0, 0] = 4
    if channels == 1:
        values[0, 0, 1] = -4
    else:
        values[1, 0, 1] = 4
    positive, negative, none = show(one("event", channels), values)[0].astype(int).tolist()
    assert positive[0] > positive[2] + 100
    assert negative[2] > negative[0] + 100
    assert none == [255, 255, 255]


def test_values_that_do_not_fit_or_are_no_numbers() -> None:
    with pytest.raises(ValueError, match=r"values of x must be \[2, H, W\]; got \[1, 4, 4\]"):
        show(one("event", 2), torch.zeros(1, 4, 4))
    for kind in ("camera", "thermal", "depth", "event", "lidar", "other"):
        for value in (0.0, 7.0, float("nan"), float("inf")):
            picture = show(one(kind, 2), torch.full((2, 4, 5), value))
            assert picture.shape == (4, 5, 3)
            assert picture.dtype == np.uint8


def test_palettes_and_labels() -> None:
    colours = palette_of(255)
    assert len({tuple(c) for c in colours.tolist()}) == 255
    assert colours.any(axis=1).all()
    assert palette_of(2, [(1, 2, 3), (4, 5, 6)]).tolist() == [[1, 2, 3], [4, 5, 6]]
    labels = torch.tensor([[0, 1], [255, 1]])
    coloured = colour_labels(labels, colours[:2])
    assert coloured[0, 1].tolist() == coloured[1, 1].tolist() == colours[1].tolist()
    assert coloured[1, 0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 or 255; got 2"):
        colour_labels(labels + labels.eq(1), colours[:2])
    with pytest.raises(ValueError, match="3 numbers for each of 3 classes"):
        palette_of(3, [(1, 2, 3)])
    with pytest.raises(ValueError, match="0 to 255"):
        palette_of(1, [(1, 2, 300)])


def test_the_command_writes_sheets_or_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    config = tmp_path / "data.yaml"
    config.write_text("kind: synthetic\nsize: [32, 64]\nsensors: [rgb, lidar]\nheld_out: 4\n")
    out = tmp_path / "sheet.png"
    assert main([str(config), str(out), "--count", "1"]) == 0
    clean = Image.open(out).size
    severities = ["--degradation", "night", "--severity", "0", "1"]
    assert main([str(config), str(out), "--count", "1", *severities]) == 0
    assert Image.open(out).size[1] > 1.5 * clean[1]
    written = out.read_bytes()
    for wrong, says in (
        (["--degradation", "rain"], "degradation must be one of night"),
        (["--count", "0"], "count must be at least 1"),
    ):
        assert main([str(config), str(out), *wrong]) == 2
        assert says in capsys.readouterr().err
    config.write_text("kind: synthetic\nwidth: 3\n")
    assert main([str(config), str(out)]) == 2
    assert "width is no field of data" in capsys.readouterr().err
    assert out.read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.yaml", "sheet.png"]


def test_a_sheet_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    taken = tmp_path / "folder.png"
    taken.mkdir()
    with pytest.raises(OSError, match=r"folder\.png"):
        sheet([("row", [("title", picture), ("none", None)])], taken)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]
    with pytest.raises(ValueError, match="at least one row"):
        sheet([], tmp_path / "x.png")


def test_labels_that_nobody_gave_are_shown_as_none(tmp_path: Path) -> None:
    from dataclasses import replace

    from equiseg_fast.data.pictures import panels

    dataset = SyntheticScenes((32, 32), sensors=["rgb", "event"])
    sample = replace(dataset.raw(0), labels=None, present=torch.tensor([False, True]))
    shown = panels(dataset, sample)
    assert [title for title, _ in shown] == ["rgb", "event", "labels"]
    assert [picture is None for _, picture in shown] == [True, False, True]

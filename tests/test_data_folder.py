"""Folders of sensor files: what belongs together is joined, and what is wrong is named."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from equiseg_fast.data import DataConfig, FolderDataset, Sensor, camera, sensor
from tests.data_on_disk import H, W, picture, save

pytest.importorskip("PIL.Image", reason="needs Pillow (extra train)")
yaml = pytest.importorskip("yaml", reason="needs PyYAML (extra train)")

CLASSES = ("road", "car", "tree")
SENSORS = (camera(), Sensor("thermal", "thermal", 1 / 65535, (0.5,), (0.25,)))


def scene(root: Path, name: str, value: int) -> None:
    """One scene of two sensors and labels."""
    save(root / "rgb" / f"{name}.png", picture(value))
    save(root / "thermal" / f"{name}.png", picture(256 * value, H, W, dtype=np.uint16))
    save(root / "labels" / f"{name}.png", picture(value % 3, H, W))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for value, name in enumerate(("b/2", "b/10", "a.front", "c")):
        scene(tmp_path, name, value)
    return tmp_path


def folder(root: Path, **changes: object) -> FolderDataset:
    modalities = changes.pop("modalities", SENSORS)
    return FolderDataset(root, modalities, **{"classes": CLASSES, **changes})


def test_scenes_are_joined_by_name(root: Path) -> None:
    (root / "rgb" / ".hidden.png").write_bytes(b"")
    (root / "rgb" / "Thumbs.db").write_bytes(b"")
    (root / "rgb" / ".git").mkdir()
    save(root / "rgb" / ".git" / "x.png", picture(0))
    os.link(root / "rgb" / "c.png", root / "rgb" / "notes.txt")
    data = folder(root, palette=[[1, 2, 3]] * 3)
    assert [data.raw(i).name for i in range(len(data))] == ["a.front", "b/10", "b/2", "c"]
    assert data.palette == ((1, 2, 3),) * 3
    for i, value in enumerate((2, 1, 0, 3)):
        raw, sample = data.raw(i), data[i]
        assert torch.equal(raw.images["rgb"], torch.full((3, H, W), float(value)))
        assert torch.equal(raw.images["thermal"], torch.full((1, H, W), 256.0 * value))
        assert torch.equal(raw.labels, torch.full((H, W), value % 3))
        assert raw.present.tolist() == [True, True]
        expected = (value / 255 - 0.485) / 0.229
        torch.testing.assert_close(sample.images["rgb"][0, 0, 0], torch.tensor(expected))
        expected = (256 * value / 65535 - 0.5) / 0.25
        torch.testing.assert_close(sample.images["thermal"][0, 0, 0], torch.tensor(expected))
    assert folder(root, labels=None)[0].labels is None


def test_any_format_in_any_folder(root: Path) -> None:
    (root / "thermal" / "c.png").unlink()
    save(root / "thermal" / "c.npy", picture(0, H, W).astype(np.float32) + 0.5)
    (root / "labels" / "c.png").unlink()
    save(root / "labels" / "c.npy", picture(2, H, W).astype(np.int16))
    raw = folder(root).raw(3)
    assert raw.images["thermal"].unique().tolist() == [0.5]
    assert raw.labels is not None
    assert raw.labels.unique().tolist() == [2]


def test_links_are_followed_but_not_in_circles(root: Path) -> None:
    shutil.move(root / "thermal" / "b", root / "elsewhere")
    (root / "thermal" / "b").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "up").symlink_to(root / "thermal")
    (root / "rgb" / "b" / "here").symlink_to(root / "rgb" / "b")
    assert len(folder(root)) == 4


def test_an_absent_sensor(root: Path) -> None:
    (root / "thermal" / "b" / "10.png").unlink()
    (root / "thermal" / "c.png").unlink()
    with pytest.raises(
        ValueError,
        match=rf"^{root}/rgb/b/10\.png: sensor 'thermal' has no b/10\.\* for it, nor for 1 others",
    ):
        folder(root)
    data = folder(root, missing="absent")
    assert [data.raw(i).present.tolist() for i in range(4)] == [
        [True, i % 2 == 0] for i in (0, 1, 2, 3)
    ]
    sample = data[1]
    assert sample.images["thermal"].shape == (1, H, W)
    assert not sample.images["thermal"].any()
    shutil.rmtree(root / "rgb")
    message = r"labels/b/10\.png: no sensor has b/10\.\* for it, nor"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="rgb"):
        folder(root, missing="absent")
    for name in ("b/10", "c"):
        (root / "labels" / f"{name}.png").unlink()
    with pytest.warns(UserWarning, match="has no folder for rgb"):
        data = folder(root, missing="absent")
    assert data[0].present.tolist() == [False, True]
    assert data[0].images["rgb"].shape == (3, H, W)


def no_labels(root: Path) -> None:
    (root / "labels" / "c.png").unlink()


def orphan(root: Path) -> None:
    save(root / "labels" / "d.png", picture(0, H, W))


def twice(root: Path) -> None:
    save(root / "rgb" / "c.jpg", picture(0))


def no_folder(root: Path) -> None:
    (root / "thermal").rename(root / "Thermal")


def empty(root: Path) -> None:
    shutil.rmtree(root / "thermal")
    (root / "thermal").mkdir()
    (root / "thermal" / "x.tif").write_bytes(b"")


def other_size(root: Path) -> None:
    save(root / "thermal" / "c.png", picture(0, H, W - 1))


def other_size_of_labels(root: Path) -> None:
    save(root / "labels" / "c.png", picture(0, H + 1, W))


def unknown_label(root: Path) -> None:
    save(root / "labels" / "c.png", np.arange(H * W, dtype=np.uint8).reshape(H, W) // 7)


def broken(root: Path) -> None:
    (root / "rgb" / "c.png").write_bytes(b"x")


def too_deep(root: Path) -> None:
    save(root / "rgb" / "c.npy", picture(256, H, W, 3, dtype=np.uint16))
    (root / "rgb" / "c.png").unlink()


def other_channels(root: Path) -> None:
    save(root / "thermal" / "c.png", np.stack([picture(i, H, W) for i in range(3)], axis=2))


AT_ONCE = {
    no_labels: r"/rgb/c\.png: the folder of labels has no c\.\* for it$",
    orphan: r"/labels/d\.png: no sensor has d\.\* for it$",
    twice: r"/rgb/c\.png: is the same scene as .*/rgb/c\.jpg; keep one of them$",
    no_folder: r"/thermal: must be a folder; .* has Thermal, labels, rgb$",
    empty: r"/thermal: must hold files \.png, .*; there is none$",
}
WHEN_READ = {
    other_size: r"/thermal/c\.png: must have .* of .*/rgb/c\.png, \[4, 6\]; got \[4, 5\]$",
    other_size_of_labels: r"/labels/c\.png: must have .* \[4, 6\]; got \[5, 6\]$",
    unknown_label: r"/labels/c\.png: labels must be 0\.\.2 or 255 .*; got 3 at row 3, column 3$",
    broken: r"/rgb/c\.png: cannot be read",
    too_deep: r"/rgb/c\.npy: must hold values of 8 bits.*'rgb' has the scale 1/255; got 256",
    other_channels: r"/thermal/c\.png: must have 1 channels",
}


@pytest.mark.parametrize("change", AT_ONCE, ids=lambda f: f.__name__)
def test_what_names_show_is_an_error_at_once(root: Path, change) -> None:
    folder(root)
    change(root)
    with pytest.raises(ValueError, match=f"^{re.escape(str(root))}{AT_ONCE[change]}"):
        folder(root)


@pytest.mark.parametrize("change", WHEN_READ, ids=lambda f: f.__name__)
def test_what_pixels_show_is_an_error_when_they_are_read(root: Path, change) -> None:
    folder(root)[3]
    change(root)
    data = folder(root)
    data[2]
    with pytest.raises(ValueError, match=f"^{re.escape(str(root))}{WHEN_READ[change]}"):
        data[3]


def test_bad_arguments_are_named(root: Path) -> None:
    for wrong, error, message in (
        ({"missing": "no"}, ValueError, "missing must be one of error, absent"),
        ({"modalities": "rgb"}, TypeError, "sensors must be a sequence"),
        ({"modalities": [3]}, TypeError, "sensors must be Sensor or names"),
        ({"modalities": ["radar"]}, ValueError, "called rgb, .*; got 'radar'"),
        ({"modalities": ["rgb", "rgb"]}, ValueError, "unique"),
        ({"classes": "road"}, TypeError, "classes must be a sequence"),
        ({"classes": ["a", "a"]}, ValueError, "classes must be 1 to 256 unique"),
        ({"classes": []}, ValueError, "classes must be 1 to 256"),
        ({"labels": "rgb"}, ValueError, "labels must be a folder of its own"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"palette": [[1, 2, 3]]}, ValueError, "palette must have 3 colours.*got 1"),
        ({"palette": [[1, 2, 256]] * 3}, ValueError, "palette must have colours of three"),
    ):
        with pytest.raises(error, match=message):
            folder(root, **wrong)
    with pytest.raises(TypeError, match="root must be a path; got 5"):
        folder(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nowhere: must be a folder of data"):
        folder(root / "nowhere")
    with pytest.raises(IndexError, match=r"0\.\.3; got 4"):
        folder(root)[4]


def test_usual_sensors() -> None:
    assert sensor("rgb") == camera("rgb")
    assert sensor("RGB").name == "RGB"
    assert sensor("img").kind == "camera"
    assert (sensor("lidar").kind, sensor("lidar").channels) == ("lidar", 1)
    assert (sensor("hha").kind, sensor("hha").channels) == ("depth", 3)
    for name in ("thermal", "depth", "event"):
        assert sensor(name).kind == name
        assert sensor(name).normalise(torch.full((sensor(name).channels, 1, 1), 255.0)).eq(1).all()


def test_config_opens_folders(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).mkdir()
        for name in ("rgb", "thermal", "labels"):
            shutil.copytree(root / name, root / split / name)
    section = yaml.safe_load(f"""
        kind: folder
        root: {root}
        sensors:
          - rgb
          - {{name: thermal, scale: 1.5e-5, mean: [0.5], std: [0.25]}}
        classes: [road, car, tree]
        palette: [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    """)
    config = DataConfig.from_dict(section)
    assert config.sensors == (camera(), Sensor("thermal", "thermal", 1.5e-5, (0.5,), (0.25,)))
    assert (config.labels, config.ignore_index, config.missing) == ("labels", 255, "error")
    data = config.open("val")
    assert len(data) == 4
    assert data.classes == CLASSES
    assert data.palette == ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    with pytest.raises(ValueError, match=r"/test: must be a folder; .* has labels, rgb, "):
        config.open("test")
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'all'"):
        config.open("all")
    (root / "train/thermal/c.png").unlink()
    with pytest.raises(ValueError, match="sensor 'thermal' has no"):
        config.open("train")
    absent = DataConfig.from_dict({**section, "missing": "absent", "ignore_index": 2})
    assert absent.open("train").raw(3).present.tolist() == [True, False]
    assert absent.open("train").ignore_index == 2

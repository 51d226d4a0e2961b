"""DeLiVER and MUSES: trees as they are unpacked, with everything that misleads other loaders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from equiseg_fast.data import MUSES, DataConfig, DeLiVER, Sensor, camera
from equiseg_fast.data import deliver as deliver_module
from equiseg_fast.data import muses as muses_module
from tests.data_on_disk import H, W, picture, save

pytest.importorskip("PIL.Image", reason="needs Pillow (extra train)")
cv2 = pytest.importorskip("cv2", reason="needs OpenCV (extra train)")

DELIVER = {"img": "rgb", "hha": "depth", "depth": "depth", "event": "event", "lidar": "lidar"}


def deliver_frame(root: Path, where: str, frame: str, number: int) -> None:
    """One frame in every folder; where: "<weather>/<split>/<scene>"."""
    for i, (name, kind) in enumerate(DELIVER.items()):
        array = picture(10 * number + i)
        if name == "depth":
            array = array[..., 0]
        if name == "lidar":
            array = np.dstack([array, picture(255, H, W)])
        if name == "event" and where.endswith("eventlowres"):
            array = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3)
        save(root / name / where / f"{frame}_{kind}_front.png", array)
    labels = np.zeros((H, W, 4), np.uint8)
    labels[..., 0] = np.resize([0, 1, 25, 255, number], (H, W))
    labels[..., 1:3] = np.random.default_rng(number).integers(0, 256, (H, W, 2))  # instances
    save(root / "semantic" / where / f"{frame}_semantic_front.png", labels)


@pytest.fixture
def deliver(tmp_path: Path) -> Path:
    # folders above that a replacement of /img or _rgb, or a search for "rain", would hit
    root = tmp_path / "img_data" / "rain_rgb" / "DELIVER"
    for number, (where, frame) in enumerate(
        [
            ("cloud/train/MAP_1_point1", "000050"),
            ("fog/train/MAP_1_point1", "000050"),
            ("night/train/MAP_2_point1_motionblur", "000050"),
            ("rain/train/MAP_2_point2", "000100"),
            ("rain/train/MAP_2_point2", "000050"),
            ("sun/train/MAP_3_point1_eventlowres", "000050"),
            ("rain/val/MAP_4_point1", "000050"),
            ("sun/val/MAP_4_point2_lidarjitter", "000050"),
        ],
        start=2,
    ):
        deliver_frame(root, where, frame, number)
    return root


def test_deliver(deliver: Path) -> None:
    data = DeLiVER(deliver, "train")
    names = [data.raw(i).name for i in range(len(data))]
    assert names == [
        "cloud/MAP_1_point1/000050",
        "fog/MAP_1_point1/000050",
        "night/MAP_2_point1_motionblur/000050",
        "rain/MAP_2_point2/000050",
        "rain/MAP_2_point2/000100",
        "sun/MAP_3_point1_eventlowres/000050",
    ]
    assert [x.name for x in data.sensors] == ["rgb", "depth", "event", "lidar"]
    assert [x.kind for x in data.sensors] == ["camera", "depth", "event", "lidar"]
    raw = data.raw(3)
    for i, name in enumerate(("rgb", "depth", None, "event", "lidar")):  # depth is hha
        if name:
            assert torch.equal(raw.images[name], torch.full((3, H, W), 60.0 + i)), name
    sample = data[3]
    torch.testing.assert_close(
        sample.images["rgb"][1, 0, 0], torch.tensor((60 / 255 - 0.456) / 0.224)
    )
    torch.testing.assert_close(sample.images["lidar"][1, 0, 0], torch.tensor(64 / 255))


def test_deliver_labels(deliver: Path) -> None:
    labels = DeLiVER(deliver, "train").raw(3).labels
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.flatten()[:5].tolist() == [255, 0, 24, 255, 5]
    where = deliver / "semantic/rain/train/MAP_2_point2/000050_semantic_front.png"
    save(where, picture(26, H, W))
    with pytest.raises(ValueError, match=rf"^{where}: labels must be 0\.\.24 .*; got 25"):
        DeLiVER(deliver, "train").raw(3)


def test_deliver_events_of_low_resolution_are_brought_to_size(deliver: Path) -> None:
    raw = DeLiVER(deliver, "train", cases=["eventlowres"]).raw(0)
    expected = np.arange(6).reshape(2, 3).repeat(2, axis=0).repeat(2, axis=1)
    assert torch.equal(raw.images["event"], torch.from_numpy(expected).float().expand(3, H, W))
    alone = DeLiVER(deliver, "train", ["event"], cases=["eventlowres"]).raw(0)
    assert alone.images["event"].shape == (3, H, W)  # that of the labels
    where = "lidar/sun/train/MAP_3_point1_eventlowres/000050_lidar_front.png"
    save(deliver / where, picture(0, 2, 3))
    with pytest.raises(ValueError, match=rf"{where}: must have the height and width"):
        DeLiVER(deliver, "train", cases=["eventlowres"]).raw(0)


@pytest.mark.parametrize(
    ("split", "cases", "count"),
    [
        ("train", ["rain"], 2),  # not all that have "train" in their path
        ("val", ["rain"], 1),
        ("train", ["sun"], 1),
        ("train", ["cloud", "fog"], 2),
        ("train", ["motionblur"], 1),
        ("train", ["motionblur", "eventlowres"], 2),
        ("train", ["night", "motionblur", "eventlowres"], 1),
        ("val", ["lidarjitter"], 1),
        ("val", [], 2),
    ],
)
def test_deliver_cases(deliver: Path, split: str, cases: list[str], count: int) -> None:
    assert len(DeLiVER(deliver, split, cases=cases)) == count


def test_deliver_says_what_is_wrong(deliver: Path) -> None:
    for arguments, message in (
        (("training",), "split must be one of train, val, test; got 'training'"),
        (
            ("train", ["rgb", "radar"]),
            "modalities must be of rgb, depth, event, lidar; got 'radar'",
        ),
        (("test",), r"img: has no \*_rgb_front\.\* of split 'test'$"),
    ):
        with pytest.raises(ValueError, match=message):
            DeLiVER(deliver, *arguments)
    with pytest.raises(ValueError, match=r"cases must be one of cloud, .*; got 'raining'"):
        DeLiVER(deliver, "train", cases=["raining"])
    with pytest.raises(ValueError, match="of split 'train' of the cases chosen"):
        DeLiVER(deliver, "train", cases=["lidarjitter"])
    with pytest.raises(ValueError, match=r"img_data/img: must be a folder; .* has rain_rgb"):
        DeLiVER(deliver.parent.parent, "train")
    (deliver / "lidar/fog/train/MAP_1_point1/000050_lidar_front.png").unlink()
    with pytest.raises(ValueError, match=r"_rgb_front\.png: sensor 'lidar' has no fog/MAP_1"):
        DeLiVER(deliver, "train")
    assert DeLiVER(deliver, "train", missing="absent").raw(1).present.tolist() == [1, 1, 1, 0]
    own = Sensor("lidar", "lidar", 1.0, (1.797,) * 3, (7.786,) * 3)
    assert DeLiVER(deliver, "train", ["rgb", own], cases=["rain"]).sensors == (camera(), own)


def test_deliver_leaves_other_views(deliver: Path) -> None:
    for name, kind in (*DELIVER.items(), ("semantic", "semantic")):
        where = deliver / name / "cloud/train/MAP_1_point1"
        shutil.copy(where / f"000050_{kind}_front.png", where / f"000050_{kind}_left.png")
    assert len(DeLiVER(deliver, "train")) == 6


LIDAR = np.zeros((H, W, 3), np.float32)
LIDAR[1, 2] = (40.5, 120, -3.5)
LIDAR[2, 3] = (7.25, 0.5, 2)
EVENTS = np.zeros((H, W, 3), np.uint8)
EVENTS[0, 1] = (3, 0, 0)
EVENTS[3, 4] = (1, 7, 0)


def muses_scene(root: Path, where: str, name: str, suffix: str) -> None:
    """A scene with projections as the SDK saves them; where: "<split>/<weather>/<time>"."""
    save(root / "frame_camera" / where / f"{name}_frame_camera.png", picture(9))
    for sensor_name in ("event_camera", "lidar"):
        path = root / "projected_to_rgb" / sensor_name / where / f"{name}_{sensor_name}{suffix}"
        array = EVENTS if sensor_name == "event_camera" else LIDAR
        if suffix == ".png":
            path.parent.mkdir(parents=True, exist_ok=True)
            if sensor_name == "lidar":
                array = ((array + 100) * 150).astype(np.uint16)
            cv2.imwrite(str(path), array)
        else:
            save(path, array)
    labels = np.resize(np.array([0, 18, 255, 7], np.uint8), (H, W))
    for kind, array in (("labelTrainIds", labels), ("labelIds", labels + 1)):
        save(root / "gt_semantic" / where / f"{name}_gt_{kind}.png", array)


@pytest.fixture
def muses(tmp_path: Path) -> Path:
    root = tmp_path / "rain_day"
    muses_scene(root, "train/clear/day", "REC0001_frame_000001", ".npz")
    muses_scene(root, "train/rain/night", "REC0001_frame_000002", ".npy")
    muses_scene(root, "train/rain/day", "REC0002_frame_000001", ".png")
    muses_scene(root, "val/snow/day", "REC0003_frame_000001", ".npz")
    muses_scene(root, "test/fog/day", "REC0004_frame_000001", ".npz")
    shutil.rmtree(root / "gt_semantic/test")
    return root


def test_muses_gives_the_same_values_of_every_format(muses: Path) -> None:
    data = MUSES(muses, "train")
    names = [data.raw(i).name for i in range(len(data))]
    assert names == [
        "clear/day/REC0001_frame_000001",
        "rain/day/REC0002_frame_000001",
        "rain/night/REC0001_frame_000002",
    ]
    for i in range(3):
        raw = data.raw(i)
        assert torch.equal(raw.images["event"], torch.from_numpy(EVENTS).permute(2, 0, 1).float())
        lidar = torch.from_numpy(LIDAR).permute(2, 0, 1)
        torch.testing.assert_close(raw.images["lidar"], lidar, rtol=0, atol=1 / 150)
        assert raw.images["lidar"][:, 0, 0].tolist() == [0, 0, 0]  # no point is 0, exactly
        assert raw.labels is not None
        assert raw.labels.flatten()[:4].tolist() == [0, 18, 255, 7]  # what is ignored stays so
    sample = data[0]
    expected = (40.5 - 4.917) / 13.347
    torch.testing.assert_close(sample.images["lidar"][0, 1, 2], torch.tensor(expected))
    torch.testing.assert_close(sample.images["event"][1, 3, 4], torch.tensor((7 - 0.1273) / 0.4763))


def test_muses_splits_and_cases(muses: Path) -> None:
    assert MUSES(muses, "test").raw(0).labels is None
    assert len(MUSES(muses, "val")) == 1
    assert len(MUSES(muses, "train", cases=["rain"])) == 2
    assert len(MUSES(muses, "train", cases=["night"])) == 1
    assert len(MUSES(muses, "train", cases=["day"])) == 2
    assert len(MUSES(muses, "train", cases=["rain", "day"])) == 1
    with pytest.raises(ValueError, match=r"cases must be one of clear, .*; got 'cloud'"):
        MUSES(muses, "train", cases=["cloud"])
    shutil.rmtree(muses / "gt_semantic/val")
    with pytest.raises(ValueError, match=r"gt_semantic: has no .* of split 'val'"):
        MUSES(muses, "val")


def test_muses_without_projections_says_how_to_make_them(muses: Path) -> None:
    shutil.rmtree(muses / "projected_to_rgb/lidar")
    command = "python scripts/project_sensors_to_rgb.py --muses_root .* --lidar --motion_comp"
    with pytest.raises(ValueError, match=f"for which lidar must be downloaded: {command}"):
        MUSES(muses, "train")
    (muses / "lidar").mkdir()
    with pytest.raises(ValueError, match=f"The SDK of MUSES writes it: {command}"):
        MUSES(muses, "train")
    assert MUSES(muses, "train", ["rgb", "event"]).raw(0).present.tolist() == [True, True]
    save(
        muses / "projected_to_rgb/lidar/train/clear/day/REC0001_frame_000001_lidar.png", picture(9)
    )
    data = MUSES(muses, "train", ["lidar"], missing="absent", cases=["clear"])
    with pytest.raises(ValueError, match=r"_lidar\.png: must have 16 bits"):
        data.raw(0)


def test_classes_are_those_of_the_benchmarks(deliver: Path, muses: Path) -> None:
    for data, count, some in (
        (DeLiVER(deliver, "train"), 25, {0: "Building", 6: "Road", 22: "TwoWheeler", 24: "Truck"}),
        (MUSES(muses, "train"), 19, {0: "road", 10: "sky", 13: "car", 18: "bicycle"}),
    ):
        assert len(data.classes) == count
        assert {i: data.classes[i] for i in some} == some
        assert data.ignore_index == 255
        assert data.palette is not None
        assert len(set(data.palette)) == count
        road = [x.lower() for x in data.classes].index("road")
        assert data.palette[road] == (128, 64, 128)


def test_config_opens_benchmarks(deliver: Path, muses: Path) -> None:
    config = DataConfig(kind="deliver", root=deliver, cases=["rain"])
    assert config.sensors == deliver_module.SENSORS
    assert len(config.open("train")) == 2
    config = DataConfig(
        kind="deliver", root=deliver, sensors=["rgb", {"name": "lidar", "scale": 1}]
    )
    assert [x.scale for x in config.open("val").sensors] == [1 / 255, 1]
    assert config.open("val").sensors[1].kind == "lidar"
    config = DataConfig(kind="muses", root=str(muses), sensors=["lidar", "rgb"])
    assert config.sensors == (muses_module.SENSORS[2], muses_module.SENSORS[0])
    assert [x.name for x in config.open("test").sensors] == ["lidar", "rgb"]

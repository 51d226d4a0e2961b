"""The section of a configuration that says which data: it survives files, and names bad fields."""

import copy
import json
from pathlib import Path

import pytest

from equiseg_fast._files import to_yaml
from equiseg_fast.data import DataConfig, synthetic

yaml = pytest.importorskip("yaml", reason="needs PyYAML (extra train)")

CONFIGS = [
    DataConfig(),
    DataConfig(size=[32, 64], length=7, held_out=2, seed=5, sensors=["lidar", "rgb"]),
    DataConfig(
        kind="folder", root="x", sensors=["rgb", "lidar"], classes=["a"], palette=[[1, 2, 3]]
    ),
    DataConfig(kind="deliver", root="x", cases=("rain", "motionblur"), missing="absent"),
    DataConfig(kind="muses", root="~/x", sensors=("event",)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_config_survives_json_and_yaml(config: DataConfig) -> None:
    for there_and_back in (
        lambda d: json.loads(json.dumps(d)),
        lambda d: yaml.safe_load(yaml.safe_dump(d)),
        copy.deepcopy,
    ):
        again = DataConfig.from_dict(there_and_back(config.to_dict()))
        assert again == config
        assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ([], TypeError, "data must be a mapping"),
        ({"kind": "kitti"}, ValueError, "kind must be one of folder, deliver, muses, synthetic"),
        ({"kind": "folder", "rot": "x"}, ValueError, "rot is no field of data; there are kind, ro"),
        ({"kind": "folder"}, ValueError, "root must be given for kind 'folder'"),
        ({"kind": "folder", "root": 5}, TypeError, "root must be a string; got 5"),
        ({"kind": "folder", "root": "x"}, ValueError, "sensors must be given"),
        (
            {"kind": "muses", "root": "x", "seed": 1},
            ValueError,
            "seed is a field of kind synt",
        ),
        ({"kind": "muses", "root": "x", "cases": "rain"}, TypeError, "cases must be a sequence"),
        ({"kind": "muses", "root": "x", "cases": ["sun"]}, ValueError, "cases .* got 'sun'"),
        (
            {"kind": "muses", "root": "x", "sensors": ["depth"]},
            ValueError,
            "sensors must be of rgb",
        ),
        ({"sensors": [["rgb"]]}, ValueError, r"sensors must be of rgb, .*; got \['rgb'\]"),
        ({"kind": "muses", "root": "x", "missing": "no"}, ValueError, "missing must be one of"),
        ({"size": 96}, TypeError, "size must be a sequence of height and width; got 96"),
        ({"size": [96]}, ValueError, "size must be height and width"),
        ({"size": [96, 0]}, ValueError, r"size\[1\] must be at least 1"),
        ({"length": 1.5}, TypeError, "length must be an integer"),
        ({"held_out": 0}, ValueError, "held_out must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
    ],
)
def test_config_names_the_field(section: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DataConfig.from_dict(section)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sensors": "rgb"}, TypeError, "sensors must be a sequence"),
        ({"sensors": ["radar"]}, ValueError, "sensors must be declared .* got 'radar'"),
        ({"sensors": [{"scale": 1}]}, ValueError, r"sensors\[0\] must have a name"),
        ({"sensors": ["rgb", {"name": "x", "men": 0}]}, ValueError, r"sensors\[1\] .*'men'"),
        (
            {"sensors": [{"name": "rgb", "std": [0, 1, 1]}]},
            ValueError,
            r"sensors\[0\]: std\[0\]",
        ),
        (
            {"sensors": [{"name": "depth", "mean": [0, 0]}]},
            ValueError,
            r"sensors\[0\]: mean and",
        ),
        ({"classes": ["a", 1]}, TypeError, "classes must be a sequence of names; got 1 in it"),
        ({"labels": ""}, ValueError, "labels must not be empty"),
        ({"ignore_index": "x"}, TypeError, "ignore_index must be an integer"),
        ({"palette": [[0, 0, 0]]}, ValueError, "palette must have 2 colours"),
    ],
)
def test_config_of_folders_names_the_field(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    good = {"kind": "folder", "root": "x", "sensors": ["rgb"], "classes": ["a", "b"]}
    DataConfig.from_dict(good)
    with pytest.raises(error, match=message):
        DataConfig.from_dict({**good, **fields})


def test_config_opens_scenes_that_no_split_or_seed_shares() -> None:
    assert DataConfig().sensors == synthetic.SENSORS
    data = [
        DataConfig(size=(32, 32), length=3, held_out=2, seed=seed).open(split)
        for seed in (0, 1)
        for split in ("train", "val", "test")
    ]
    assert [len(x) for x in data] == [3, 2, 2] * 2
    scenes = [x.raw(i).images["rgb"].numpy().tobytes() for x in data for i in range(2)]
    assert len(set(scenes)) == len(scenes)
    own = {"name": "lidar", "mean": [0, 0]}
    chosen = DataConfig(size=(32, 32), sensors=[own, "rgb"]).open("val")
    assert [x.name for x in chosen.sensors] == ["lidar", "rgb"]
    assert chosen.sensors[0].mean == (0, 0)
    assert chosen.sensors[0].scale == synthetic.SENSORS[3].scale
    assert list(chosen[0].images) == ["lidar", "rgb"]


def test_numbers_of_a_file_need_no_dot(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    sensor = "{name: ir, kind: thermal, scale: 1e-3, mean: [-2E+1], std: [1e0]}"
    path.write_text(f"kind: folder\nroot: 1e3x\nclasses: [a, b]\nsensors: [{sensor}]\n")
    config = DataConfig.load(path)
    assert config.root == "1e3x"
    (found,) = config.sensors or ()
    assert (found.scale, found.mean, found.std) == (1e-3, (-20.0,), (1.0,))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Strings that look like numbers, too."""
    config = DataConfig(kind="folder", root="1e5", sensors=["rgb"], classes=["1e3", "2", "yes"])
    path = tmp_path / "data.yaml"
    path.write_text(to_yaml(config.to_dict()))
    assert DataConfig.load(path) == config

"""The command that evaluates, on a tiny folder of files and a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from equiseg_fast import EQUISeg, evaluate
from equiseg_fast.data import FolderDataset, camera, collate, sensor
from equiseg_fast.robustness import Condition, summary

CLASSES = ("road", "car", "tree")
SENSORS = (camera(), sensor("thermal"))
PALETTE = ((128, 64, 128), (107, 142, 35), (0, 0, 142))
# The second is of an odd size.
SIZES = ((32, 64), (33, 41), (32, 64))


@pytest.fixture(scope="module")
def model() -> EQUISeg:
    torch.manual_seed(0)
    return EQUISeg.from_name(
        "nano",
        modalities=("rgb", "thermal"),
        in_channels=(3, 1),
        num_classes=3,
        class_names=CLASSES,
        palette=PALETTE,
        sensors=SENSORS,
    ).eval()


@pytest.fixture(scope="module")
def kept(model: EQUISeg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _load_once(model: EQUISeg, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`whole` has loaded the model from its folder; again and again, that takes the longest."""
    load = EQUISeg.from_pretrained

    def loaded(folder: Any, **options: Any) -> EQUISeg:
        return model if Path(folder) == kept else load(folder, **options)

    monkeypatch.setattr(EQUISeg, "from_pretrained", loaded)


def write_folder(root: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    rng = np.random.default_rng(0)
    for name in ("rgb", "thermal", "labels"):
        (root / "val" / name).mkdir(parents=True)
    for i, size in enumerate(sizes):
        for name, shape in (("rgb", (*size, 3)), ("thermal", size)):
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
        labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        Image.fromarray(labels).save(root / "val" / "labels" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


def run(*arguments: Any) -> int:
    return evaluate.main([str(a) for a in arguments])


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


def scores_of(content: dict[str, Any]) -> dict[str, float]:
    """By what is unique of a condition."""
    return {json.dumps(r["condition"]): r["miou"] for r in content["results"]}


@pytest.fixture(scope="module")
def whole(kept: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed, without degradations."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = ("--protocols", "clean,emm,rmm,nm,masked", "--sheet", 1)
    assert run(kept, folder, "--out", out, *options) == 0
    return out


def test_scores_are_those_of_the_model(whole: Path, model: EQUISeg, folder: Path) -> None:
    content = read(whole)
    dataset = FolderDataset(folder / "val", SENSORS, classes=CLASSES)
    matrix = np.zeros((3, 3), np.int64)
    with torch.no_grad():
        for i in range(len(dataset)):
            batch = collate([dataset[i]])
            guess, truth = model(batch.images).argmax(dim=1).numpy(), batch.labels.numpy()
            np.add.at(matrix, (truth[truth != 255], guess[truth != 255]), 1)
    right = np.diag(matrix)
    ious = right / (matrix.sum(0) + matrix.sum(1) - right)
    clean = content["results"][0]
    assert clean["condition"]["protocol"] == "clean"
    assert [math.nan if x is None else x for x in clean["iou"]] == pytest.approx(ious, nan_ok=True)
    assert clean["miou"] == pytest.approx(np.nanmean(ious))
    assert clean["images"] == 3
    assert content["classes"] == list(CLASSES)
    assert content["versions"]["torch"] == torch.__version__
    assert content["what"]["seed"] == 0

    # 2 sensors: 2 subsets beside the clean one, for EMM, masked, and each of three ratios
    counts = {p: 0 for p in ("clean", "emm", "rmm", "nm", "masked")}
    for result in content["results"]:
        counts[result["condition"]["protocol"]] += 1
    assert counts == {"clean": 1, "emm": 2, "rmm": 6, "nm": 3, "masked": 2}
    scores = {Condition(**r["condition"]): r["miou"] for r in content["results"]}
    assert content["summary"]["miou"] == summary(scores, ["rgb", "thermal"])
    assert not list(whole.glob(".*")), "temporary files stayed"


def test_sheet_shows_inputs_and_colours_of_classes(whole: Path) -> None:
    sheet = np.asarray(Image.open(whole / "sheet.png").convert("RGB"))
    height, width = sheet.shape[:2]
    # 2 rows for one sample; 2 sensors and 4 more columns
    assert width > 6 * 200
    assert height > 2 * 100
    for colour in (*PALETTE, (214, 39, 40)):
        assert (sheet == np.array(colour)).all(axis=-1).mean() > 0.005


def test_goes_on_after_an_interruption(
    whole: Path,
    kept: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = evaluate.evaluate_dataset, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["condition"])
        if len(calls) == 4:
            kwargs["progress"] = stop
        return original(*args, **kwargs)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_dataset", stopping)
    command = (kept, folder, "--out", tmp_path, "--sheet", 0)
    assert run(*command, "--protocols", "clean,emm,nm") == 130
    said = capsys.readouterr().err
    assert "3/6 EMM, zero: thermal: mIoU 0." in said, "no progress where there is no terminal"
    assert "the same command goes on" in said
    first = list(calls)
    assert len(read(tmp_path)["results"]) == 3
    # More protocols than before, in one more run.
    assert run(*command, "--protocols", "clean,emm,nm,masked") == 0
    assert first[3] in calls[4:], "what was interrupted runs again"
    assert len(calls) == 4 + (8 - 3), "what was finished does not"
    undisturbed = scores_of(read(whole))
    found = scores_of(read(tmp_path))
    assert found == {condition: undisturbed[condition] for condition in found}
    assert run(*command, "--protocols", "clean,emm,nm,masked") == 0
    assert len(calls) == 9, "nothing is left to run"
    assert "0 conditions run, 8 kept" in capsys.readouterr().out.replace("\n", " ")


def test_results_of_something_else_are_not_taken_for_these(
    whole: Path, kept: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "evaluation.json").read_bytes()
    assert run(kept, folder, "--out", whole, "--seed", 1) == 2
    assert "with other seed; choose another --out" in capsys.readouterr().err
    assert run(kept, folder, "--out", whole, "--limit", 2) == 2
    assert "with other data, samples;" in capsys.readouterr().err
    assert (whole / "evaluation.json").read_bytes() == before


def test_changed_files_and_weights_are_something_else(
    kept: Path, model: EQUISeg, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", ((32, 32), (32, 32)))
    command = (data, "--out", tmp_path / "out", "--protocols", "clean", "--sheet", 0)
    assert run(kept, *command) == 0
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(data / "val" / "labels" / "1.png")
    assert run(kept, *command) == 2
    assert "with other samples;" in capsys.readouterr().err
    weights = {
        k: v + 1 if k == "head.linear_pred.bias" else v for k, v in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    assert run(tmp_path / "model", *command) == 2
    assert "with other weights, samples;" in capsys.readouterr().err
    for text in ('{"format": 1, "resu', '{"format": 2}', "[]"):
        (tmp_path / "out" / "evaluation.json").write_text(text)
        assert run(kept, *command) == 2
        assert "evaluation.json is no evaluation of this version" in capsys.readouterr().err


def test_batches_change_nothing(kept: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", ((32, 32),) * 3)
    found = []
    for size in (1, 2):
        out = tmp_path / f"out{size}"
        options = ("--protocols", "clean,nm", "--sheet", 0, "--batch-size", size)
        assert run(kept, data, "--out", out, *options) == 0
        found.append(scores_of(read(out)))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_dry_run_reads_and_writes_nothing(
    kept: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(kept, folder, "--out", out, "--dry-run", "--protocols", "emm,nm,masked") == 0
    assert not out.exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "8 conditions of 3 images: 24 passes" in said
    assert "Sensors that fail, in turn: rgb, thermal." in said


def test_degradations_of_rendered_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    EQUISeg.from_name("nano", modalities=("rgb",), num_classes=13).save_pretrained(tmp_path)
    options = ("--protocols", "clean,degradations", "--limit", 1, "--sheet", 1)
    assert run(tmp_path, "synthetic", "--out", tmp_path / "out", *options) == 0
    content = read(tmp_path / "out")
    names = ["night", "over_exposure", "motion_blur", "fog", "dead_rgb"]
    assert list(content["summary"]["miou"]["degradations"]) == names
    assert len(content["results"]) == 1 + 4 * len(names)
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if "night" in line)
    figures = [float(x) for x in row.split("│")[2:-1]]
    night = [r["miou"] for r in content["results"] if r["condition"]["name"] == "night"]
    shown = [100 * x for x in (content["summary"]["miou"]["clean"], *night)]
    assert figures == pytest.approx(shown, abs=0.0051)


def test_absent_sensors_and_yaml_in_another_order(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", ((32, 32), (32, 32)))
    (data / "val" / "rgb" / "1.png").unlink()
    assert run(kept, data, "--out", tmp_path / "out") == 2
    assert "1.png" in capsys.readouterr().err
    section = {
        "kind": "folder",
        "root": str(data),
        "sensors": ["thermal", "rgb"],
        "classes": list(CLASSES),
        "missing": "absent",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"data": section, "epochs": 3}))
    options = ("--protocols", "clean,masked", "--out", tmp_path / "out", "--sheet", 2)
    assert run(kept, tmp_path / "train.yaml", *options) == 0
    left_out = {
        tuple(r["condition"]["sensors"]): (r["images"], r["left_out"])
        for r in read(tmp_path / "out")["results"]
    }
    assert left_out == {(): (2, 0), ("rgb",): (2, 0), ("thermal",): (1, 1)}
    assert "not counted: 1 under masked: thermal" in " ".join(capsys.readouterr().out.split())


def test_logits_that_are_not_finite_fail(
    model: EQUISeg, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(model.state_dict())
    state["head.linear_pred.bias"] = torch.full_like(state["head.linear_pred.bias"], math.nan)
    model.save_pretrained(tmp_path / "model", state_dict=state)
    options = ("--protocols", "clean", "--sheet", 0, "--out", tmp_path / "out")
    assert run(tmp_path / "model", folder, *options) == 1
    assert "logits of 3 images were not finite under clean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sensors": ["rgb"]}, "modalities of the model are rgb, thermal; the data has rgb and"),
        (
            {"sensors": ["thermal", {"name": "rgb", "mean": [0], "std": [1]}]},
            "in_channels of the model is 3 for rgb; the data has 1",
        ),
        ({"classes": ["road", "tree", "car"]}, "class_names of the model are road, car, tree"),
        ({"classes": ["road"]}, "class_names of the model are road, car, tree; the data has road"),
        ({"root": "/not/there"}, "/not/there"),
        ({"colour": 1}, "data.yaml: colour is no field of data"),
        (None, "data.yaml must hold fields and values; got NoneType"),
    ],
)
def test_says_where_data_and_model_disagree(
    fields: dict[str, Any] | None, says: str, model: EQUISeg, folder: Path, tmp_path: Path
) -> None:
    base = {"kind": "folder", "root": str(folder), "sensors": ["rgb", "thermal"]}
    content = None if fields is None else {**base, "classes": list(CLASSES), **fields}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=says):
        evaluate.agree(evaluate.read_data(str(path), model.config).open("val"), model.config)


def test_order_and_normalisation_are_those_of_the_model(model: EQUISeg, tmp_path: Path) -> None:
    thermal = {"name": "thermal", "scale": 0.5, "mean": [3.0], "std": [2.0]}
    fields = {"kind": "folder", "root": ".", "sensors": [thermal, "rgb", "lidar"], "classes": ["a"]}
    (tmp_path / "data.yml").write_text(yaml.safe_dump(fields))
    assert evaluate.read_data(str(tmp_path / "data.yml"), model.config).sensors == SENSORS
    folder = evaluate.read_data(str(tmp_path), model.config)
    assert (folder.classes, folder.palette) == (CLASSES, PALETTE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--protocols", "emm,dark"), "protocols must be one of clean"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--batch-size", "0"), "batch-size must be at least 1"),
        (("--sheet", "-1"), "sheet must be at least 0"),
        (("--split", "train"), "train: must be a folder"),
        (("--split", "all"), "split must be one of train, val, test"),
        (("--device", "none"), "device must be one that PyTorch sees"),
        (("--precision", "int8"), "invalid choice: 'int8'"),
        (("--batch-size", "2"), "all samples of a batch must have one size"),
    ],
)
def test_says_which_option_is_wrong(
    options: tuple[str, ...],
    says: str,
    kept: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(kept, folder, "--out", tmp_path / "out", *options) == 2
    assert says in capsys.readouterr().err


def test_says_what_is_no_model_and_no_data(
    kept: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, folder) == 2
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err
    for data in (tmp_path / "nowhere", kept / "config.json"):
        assert run(kept, data) == 2
        assert f"got {data}" in capsys.readouterr().err

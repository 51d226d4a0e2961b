"""`python -m equiseg_fast.predict`: what it writes, what it makes of what is missing, and how it
goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiseg_fast import EQUISeg, predict
from equiseg_fast.data import FolderDataset, sensor
from equiseg_fast.sliding import sliding_window

SENSORS = tuple(map(sensor, ("rgb", "thermal", "lidar")))
CLASSES = ("road", "sky", "car", "person [x]", "tree")
PALETTE = ((128, 64, 128), (70, 130, 180), (0, 0, 142), (220, 20, 60), (107, 142, 35))
SIZES = {"a": (33, 50), "b": (33, 50), "c.1": (33, 50), "far/d": (40, 64)}
"""Of the images; "b" lacks its thermal one, and nobody has lidar."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "model"
    EQUISeg.from_name(
        "nano",
        modalities=[x.name for x in SENSORS],
        in_channels=[x.channels for x in SENSORS],
        sensors=SENSORS,
        num_classes=len(CLASSES),
        class_names=CLASSES,
        palette=PALETTE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for stem, size in SIZES.items():
        for name, shape in (("rgb", (*size, 3)), ("thermal", size)):
            if (stem, name) != ("b", "thermal"):
                path = tmp_path / "images" / name / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def run(*arguments: object) -> int:
    return predict.main([*map(str, arguments), "--workers", "0", "--device", "cpu"])


def labels_in(out: Path) -> dict[str, np.ndarray]:
    folder = out / "labels"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in paths}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


def expected(model: Path, images: Path, window: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """By way of the model and the dataset alone."""
    network = EQUISeg.from_pretrained(model).fold_()
    found = {}
    for stem in SIZES:
        here = [x for x in SENSORS if (images / x.name / f"{stem}.png").exists()]
        dataset = FolderDataset(images, here, classes=CLASSES, labels=None, missing="absent")
        (sample,) = (x for x in dataset if x.name == stem)
        batch = {name: x[None] for name, x in sample.images.items()}
        present = {x.name for x in here}
        with torch.no_grad():
            if window:
                logits = sliding_window(network, batch, window=window, present=present)
            else:
                logits = network(batch, present=present)
        found[f"{stem}.png"] = logits[0].argmax(dim=0).numpy()
    return found


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_labels_and_colours(
    model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    window: tuple[int, int] | None,
) -> None:
    out = tmp_path / "out"
    assert run(model, images, out, *(("--window", *window) if window else ())) == 0
    labels = labels_in(out)
    assert same(labels, expected(model, images, window))
    assert len(np.unique(np.concatenate([x.ravel() for x in labels.values()]))) > 2
    palette = np.array(PALETTE)
    for name, classes in labels.items():
        assert classes.dtype == np.uint8
        assert Image.open(out / "labels" / name).mode == "L"
        coloured = Image.open(out / "colour" / name).convert("RGB")
        assert np.array_equal(np.asarray(coloured), palette[classes])

    text = capsys.readouterr().out
    assert "4 images of rgb, thermal, lidar" in text
    assert "thermal is missing in 1" in text
    assert "lidar is missing in 4" in text
    pixels = np.bincount(np.concatenate([x.ravel() for x in labels.values()]))
    for share, name in zip(pixels / pixels.sum(), CLASSES, strict=False):
        assert (f"{share:8.3%}  {name}\n" in text) == (share > 0)


def test_images_of_one_form_go_together(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    forward = EQUISeg.forward

    def watched(self: EQUISeg, x: dict[str, torch.Tensor], **options: object) -> object:
        shapes.append((*x["rgb"].shape[::2], options["present"]))
        return forward(self, x, **options)

    monkeypatch.setattr(EQUISeg, "forward", watched)
    (images / "thermal/c.1.png").unlink()
    assert run(model, images, tmp_path / "out", "--batch-size", 4) == 0
    pair = ["rgb", "thermal"]
    assert shapes == [(1, 33, pair), (2, 33, ["rgb"]), (1, 40, pair)]
    assert run(model, images, tmp_path / "one") == 0
    together, alone = labels_in(tmp_path / "out"), labels_in(tmp_path / "one")
    for name, classes in together.items():
        assert (classes == alone[name]).mean() > 0.999


def test_goes_on_where_it_was_stopped(
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(model, images, whole) == 0
    _write, count = predict._write, 0

    def stops(path: Path, image: Image.Image) -> None:
        nonlocal count
        count += 1
        if count == 4:  # the second image has labels, and half a picture
            path.with_name(f".{path.name}.new").write_bytes(b"\x89PNG")
            raise KeyboardInterrupt
        _write(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write", stops)
        patch.setattr(predict, "WRITERS", 1)
        assert run(model, images, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    done = {path: path.stat().st_mtime_ns for path in (out / "colour").rglob("[!.]*.png")}
    assert 0 < len(done) < len(SIZES)

    assert run(model, images, out) == 0
    assert f"{len(done)} of 4 images done" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert same(labels_in(out), labels_in(whole))
    assert not list(out.rglob(".*"))

    assert run(model, images, out) == 0
    assert "4 of 4 images done, 0 to do" in capsys.readouterr().out


def test_results_of_another_run_are_refused(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, images, out) == 0
    first = labels_in(out)
    capsys.readouterr()
    assert run(model, images, out, "--window", 32, 32) == 2
    assert "holds results of window None, now [32, 32]" in capsys.readouterr().err

    torch.manual_seed(4)
    other = tmp_path / "other"
    EQUISeg(EQUISeg.from_pretrained(model).config).save_pretrained(other)
    assert run(other, images, out) == 2
    assert "holds results of model '" in capsys.readouterr().err
    assert same(labels_in(out), first)

    (images / "rgb/a.png").unlink()
    (images / "thermal/a.png").unlink()
    assert run(other, images, out, "--overwrite", "--dry-run") == 0
    assert same(labels_in(out), first)
    assert run(other, images, out, "--overwrite") == 0
    second = labels_in(out)
    assert second.keys() == first.keys() - {"a.png"}
    assert not any(np.array_equal(second[name], first[name]) for name in second)
    assert run(other, images, out) == 0

    (out / "predict.json").write_text("[]")
    assert run(other, images, out) == 2
    assert "is damaged; --overwrite starts anew" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_files_of_others_are_left_alone(
    model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "a.png").write_bytes(b"precious")
    assert run(model, images, out, *more) == 2
    assert "must be new, empty, or of an earlier run" in capsys.readouterr().err
    assert (out / "labels" / "a.png").read_bytes() == b"precious"


@pytest.mark.parametrize("workers", [0, 1])
def test_others_go_on_where_a_file_is_broken(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    out, path = tmp_path / "out", images / "thermal" / "a.png"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    assert predict.main([str(model), str(images), str(out), f"--workers={workers}"]) == 1
    error = capsys.readouterr().err
    assert f"error: 1 of 4 images cannot be read:\n  {path}: " in error
    assert labels_in(out).keys() == {f"{stem}.png" for stem in SIZES} - {"a.png"}

    path.write_bytes(content)
    assert run(model, images, out) == 0
    assert same(labels_in(out), expected(model, images, None))


def test_running_out_of_memory_is_no_traceback(
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(EQUISeg, "forward", too_large)
    assert run(model, images, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "out of memory at a: choose a smaller --window or --batch-size (tried" in error


def test_dry_run_writes_nothing(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, images, tmp_path / "out", "--dry-run") == 0
    assert "0 of 4 images done, 4 to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_the_numbers_mean(model: Path, images: Path, tmp_path: Path) -> None:
    assert run(model, images, tmp_path / "out", "--window", 32, 64, "--overlap", 0.25) == 0
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert record["classes"] == list(CLASSES)
    assert (record["window"], record["overlap"]) == ([32, 64], 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 0), "batch_size must be at least 1; got 0"),
        (("--workers", -1), "workers must be at least 0; got -1"),
        (("--window", 0, 8), "window[0] must be at least 1; got 0"),
        (("--window", 8, 8, "--overlap", 1), "overlap must be in [0, 1); got 1"),
        (("--window", 8), "--window: expected 2 arguments"),
        (("--device", "gpu"), "device must be one that PyTorch sees"),
        (("--precision", "int8"), "argument --precision: invalid choice"),
    ],
)
def test_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert predict.main([*map(str, (tmp_path, tmp_path, tmp_path, *options))]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_not_what_they_should_be(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(images, images, out) == 2
    assert "config.json" in capsys.readouterr().err
    assert run(model, images / "thermal", out) == 2
    assert f"{images / 'thermal' / 'rgb'}: must be a folder" in capsys.readouterr().err
    out.write_text("a file")
    assert run(model, images, out) == 2
    assert f"{out}: Not a directory" in capsys.readouterr().err

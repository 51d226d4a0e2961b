"""The command that trains: what it reads, what it computes, and that nothing stops it for good."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
from collections.abc import Iterator
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from equiseg_fast import EQUISeg
from equiseg_fast._command import Failed, Interrupted
from equiseg_fast.train import main
from equiseg_fast.training import TrainConfig, loop, train
from equiseg_fast.training.config import field_names
from equiseg_fast.training.distributed import Place
from equiseg_fast.training.files import load
from equiseg_fast.training.optimise import adamw, lr_ratio
from equiseg_fast.training.plan import make_plan

from . import train_worker

SMALL: dict[str, Any] = {
    "data": {
        "kind": "synthetic",
        "size": [32, 32],
        "length": 4,
        "held_out": 1,
        "sensors": ["rgb", "lidar"],
    },
    "model": {"variant": "nano"},
    "epochs": 3,
    "batch_size": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 2,
    "save_every": 3,
    "device": "cpu",
}
"""Six steps, with checkpoints after the second, third, fourth and sixth."""


def configuration(out: Path, **fields: Any) -> TrainConfig:
    sections = {name: SMALL[name] | fields.pop(name, {}) for name in ("data", "model")}
    return TrainConfig.from_dict({**SMALL, **fields, **sections, "out": str(out)})


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(actual: Path, expected: Path) -> None:
    """The same weights, optimiser and log, bit by bit."""
    a, b = load(actual / "checkpoint.pt"), load(expected / "checkpoint.pt")
    for part in ("model", "optimiser", "average"):
        assert a[part].keys() == b[part].keys()
        for name, x in a[part].items():
            assert torch.equal(x, b[part][name]), f"{part} {name}"
    for part in ("step", "validated", "best", "sums", "scaler"):
        assert a[part] == b[part]
    assert lines_of(actual) == lines_of(expected)
    pairs = [EQUISeg.from_pretrained(out / "model").state_dict() for out in (actual, expected)]
    assert all(torch.equal(x, pairs[1][name]) for name, x in pairs[0].items())


class Killed(Exception):
    """Stands for a SIGKILL: nothing is tidied up after it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends in the middle of step `step`, counted from 0."""
    original = loop.loss_of

    def loss_of(model: nn.Module, batch: Any, now: int, *more: Any) -> Any:
        if now == step:
            raise Killed
        return original(model, batch, now, *more)

    monkeypatch.setattr(loop, "loss_of", loss_of)


COMBINATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "fp32": ((1, 3), {"ema": 0.9, "clip": 1.0}),
    "bf16": ((3,), {"precision": "bf16", "workers": 1, "model": {"modality_dropout": 0.5}}),
    "fp16": ((1, 3), {"precision": "fp16", "log_every": 1, "validate_on": "none"}),
}
"""Where they are ended: before the first checkpoint, with and without a line in the log, and in the
middle of an epoch and of what is summed for the log; and their fields."""


@pytest.mark.parametrize("name", COMBINATIONS)
def test_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, fields = COMBINATIONS[name]
    train(configuration(tmp_path / "whole", **fields))
    config = configuration(tmp_path / "pieces", **fields)
    for step in ends:
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train(config)
    outcome = train(config)
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")
    before = torch.get_rng_state()
    assert train(config) == outcome  # nothing is left to do
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_ends_the_step_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it validates; then the checkpoint is not yet that of a validated model."""
    config = configuration(tmp_path / "pieces")
    original = loop.loss_of

    def loss_of(model: nn.Module, batch: Any, step: int, *more: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch, step, *more)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss_of", loss_of)
        with pytest.raises(Interrupted, match="after step 3") as stop:
            train(config)
    assert stop.value.number == signal.SIGTERM
    assert load(tmp_path / "pieces/checkpoint.pt")["step"] == 3

    def validate(*more: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        more[-1]()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", validate)
        with pytest.raises(Interrupted, match="while validating after step 4") as stop:
            train(config)
    assert stop.value.number == signal.SIGINT
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = load(tmp_path / "pieces/checkpoint.pt")
    assert (saved["step"], saved["validated"]) == (4, 2)
    train(config)
    train(configuration(tmp_path / "whole"))
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")


def test_the_status_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """143 for SIGTERM, with a sentence; what was given on the command line counts."""
    file = tmp_path / "config.yaml"
    file.write_text(configuration(tmp_path / "there").to_yaml())

    def loss_of(*_: Any) -> None:
        raise Interrupted(signal.SIGTERM, "stopped after step 7; the same command goes on")

    monkeypatch.setattr(loop, "loss_of", loss_of)
    command = [str(file), "--out", str(tmp_path / "here"), "--model.sgm-weight=0.25"]
    assert main(command) == 143
    said = capsys.readouterr()
    assert said.err == (
        "python -m equiseg_fast.train: stopped after step 7; the same command goes on\n"
    )
    assert "model.sgm_weight      0.25" in said.out
    assert not (tmp_path / "there").exists()
    assert TrainConfig.load(tmp_path / "here/config.yaml").model.sgm_weight == 0.25


class Children:
    """Trainings in processes forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # The last three are imported late, for the first optimiser, image and log.
        self.context.set_forkserver_preload(
            [
                train_worker.__name__,
                "equiseg_fast.training",
                *("torch._dynamo", "cv2", "tensorboard"),
            ]
        )
        self.folder = folder
        self.started: list[BaseProcess] = []

    def start(self, config: TrainConfig, name: str, **environment: str) -> BaseProcess:
        file = self.folder / f"{name}.yaml"
        file.write_text(config.to_yaml())
        arguments = ([str(file)], self.folder / f"{name}.txt", environment)
        process = self.context.Process(target=train_worker.run, args=arguments)
        process.start()
        self.started.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path)
    yield children
    for process in children.started:
        process.kill()
        process.join()


def test_killed_at_random_moments(tmp_path: Path, children: Children) -> None:
    """SIGKILL three times, whatever it does then: the same bits as without."""
    fields: dict[str, Any] = {"epochs": 4, "save_every": 1, "ema": 0.9}
    train(configuration(tmp_path / "whole", **fields))
    config = configuration(tmp_path / "pieces", **fields)
    log = tmp_path / "pieces/metrics.jsonl"
    chance = random.Random()
    delays = [chance.uniform(0.0, 1.0) for _ in range(3)]
    print("seconds after the first line of the log that is new:", delays)
    for delay in delays:
        before = log.read_bytes() if log.exists() else b""
        process = children.start(config, "pieces")
        while process.is_alive() and (not log.exists() or log.read_bytes() == before):
            process.join(0.02)
        process.join(delay)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), children.said("pieces")
    process = children.start(config, "pieces")
    process.join()
    assert process.exitcode == 0, children.said("pieces")
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_two_processes_equal_one(distributed: str, tmp_path: Path, children: Children) -> None:
    """Loss and gradients of the same global batch, with batch norms, hard pixels, dropped
    modalities and prototypes; and the score of the same images to validate."""
    fields: dict[str, Any] = {
        "distributed": distributed,
        "sync_bn": True,
        "batch_size": 4,
        "steps": 2,
        "lr": 1e-6,
        "log_every": 1,
        "ema": 0.5,
        "data": {"held_out": 3},
        "model": {"drop_path": 0.0, "head_dropout": 0.0, "modality_dropout": 0.9},
    }
    train(configuration(tmp_path / "one", **fields))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    config = configuration(tmp_path / "two", **fields)
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **address}
        ranks.append(children.start(config, f"rank{rank}", **place))
    for rank, process in enumerate(ranks):
        process.join()
        assert process.exitcode == 0, children.said(f"rank{rank}")
    assert "mIoU" in children.said("rank0")
    assert "mIoU" not in children.said("rank1")
    for actual, expected in zip(
        lines_of(tmp_path / "two"), lines_of(tmp_path / "one"), strict=True
    ):
        if expected["split"] == "train":
            for name in ("loss", "seg", "sgm", "grad_norm"):
                assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
            assert actual["contributions"] == pytest.approx(expected["contributions"], abs=1e-6)
        else:
            assert actual == expected
    a, b = (load(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    for part in ("optimiser", "model", "average"):
        assert a[part].keys() == b[part].keys()
        for kind in ("exp_avg", "exp_avg_sq") if part == "optimiser" else ("",):
            names = [name for name in b[part] if name.endswith(kind)]
            norm = torch.stack([b[part][name].double().norm() for name in names]).norm()
            for name in names:
                difference = (a[part][name].double() - b[part][name].double()).norm()
                assert difference <= 1e-5 * norm, name


def test_a_loss_that_is_not_finite_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 1, the names of the images, and what it takes to see it again."""
    file = tmp_path / "config.yaml"
    file.write_text(configuration(tmp_path / "out", lr=1e30, warmup=0.0, ema=0.5).to_yaml())
    assert main([str(file)]) == 1
    said = capsys.readouterr().err
    assert "step 2 is not finite: loss nan" in said
    failed = torch.load(tmp_path / "out/failed.pt", weights_only=True)
    assert failed["step"] == 1
    assert all(name in said for name in failed["batch"]["names"])
    assert len(failed["batch"]["names"]) == 2
    # Weights are those that the first step left; running statistics know nothing of the second.
    config = TrainConfig.load(tmp_path / "out/config.yaml")
    model = EQUISeg(config.model_for(config.data.open("train"))).train()
    running = [x for name, x in failed["model"].items() if "running" in name]
    assert all(x.isfinite().all() for x in running)
    model.load_state_dict(failed["model"])
    loss, _ = model(failed["batch"]["images"], labels=failed["batch"]["labels"])
    assert not loss.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops, but where gradients are scaled: those overflow, and the scale is halved."""
    original = loop.loss_of

    def loss_of(model: nn.Module, batch: Any, step: int, *more: Any) -> Any:
        loss, parts = original(model, batch, step, *more)
        p = next(model.parameters())
        return loss + (0 * p.sum()).sqrt() if step == 1 else loss, parts

    monkeypatch.setattr(loop, "loss_of", loss_of)
    config = configuration(tmp_path / "out", precision=precision, steps=2, validate_on="none")
    if precision == "fp32":
        with pytest.raises(Failed, match=r"step 2 is not finite: loss \d.*, grad_norm nan"):
            train(config)
        return
    train(config)
    saved = load(tmp_path / "out/checkpoint.pt")
    assert saved["scaler"]["scale"] < 2.0**16
    assert all(x.isfinite().all() for x in saved["model"].values())


def test_validated_logits_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are said and counted; the model knows the names and colours of the data."""
    original = loop.validate

    def validate(model: EQUISeg, *more: Any) -> Any:
        model.head.linear_pred.bias.data.fill_(torch.inf)
        return original(model, *more)

    monkeypatch.setattr(loop, "validate", validate)
    config = configuration(tmp_path / "out", steps=1)
    said = StringIO()
    train(config, console=Console(file=said))
    assert "validated images whose logits are not finite: 1" in said.getvalue()
    assert lines_of(tmp_path / "out")[-1]["not_finite"] == 1
    model, data = EQUISeg.from_pretrained(tmp_path / "out/model").config, config.data.open("val")
    assert (model.class_names, model.palette) == (data.classes, data.palette)
    assert model.palette is not None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_a_gpu_alone(device: str, tmp_path: Path) -> None:
    plan = make_plan(configuration(tmp_path), Place(0, 1, torch.device(device)))
    assert plan.batches(0, 0).pin_memory == (device == "cuda")


def test_where_it_cannot_or_must_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says why, and nothing of what is there changes."""
    config = configuration(tmp_path / "run", steps=2, validate_on="none")
    train(config)
    there = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = configuration(tmp_path / "run", steps=3, validate_on="none", lr=0.5)
    with pytest.raises(ValueError, match=r"another run.*: steps 2 there, 3 now; lr 0.001 there"):
        train(other)
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(ValueError, match=r"lr 0.001 there"):
        train(other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").touch()
    with pytest.raises(ValueError, match=r"must be a new folder, or that of a run; .*photos"):
        train(configuration(tmp_path / "photos"))
    (tmp_path / "photos/me.png").rename(tmp_path / "photos/.config.yaml.new")
    monkeypatch.setenv("HOME", str(tmp_path))
    # A kill while its first file was written is no reason not to go on.
    train(configuration(Path("~/photos"), steps=1, validate_on="none"))
    assert (tmp_path / "photos/checkpoint.pt").exists()
    (tmp_path / "photos/me.png").touch()
    with pytest.raises(NotADirectoryError, match=r"me.png"):
        train(configuration(tmp_path / "photos/me.png/out"))
    for path, content in there.items():
        assert path.name == "config.yaml" or path.read_bytes() == content
    (tmp_path / "run/checkpoint.pt").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
        train(config)


def test_fields_can_be_mended_after_a_start_that_failed(tmp_path: Path) -> None:
    """A run that a missing file stopped before its first line is not held to its fields."""
    first = {"steps": 1, "validate_on": "none"}
    with pytest.raises(FileNotFoundError, match=r"mit_b9.pth"):
        train(configuration(tmp_path / "run", backbone=str(tmp_path / "mit_b9.pth"), **first))
    mended = configuration(tmp_path / "run", **first)
    train(mended)
    assert TrainConfig.load(tmp_path / "run/config.yaml") == mended
    with pytest.raises(ValueError, match=r"another run.*: lr 0.001 there, 0.5 now"):
        train(configuration(tmp_path / "run", lr=0.5, **first))


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path / "out", validate_on="none")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        assert main([str(file)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.endswith(f" error: {config.out}/checkpoint.pt: File too large\n")
    assert not [path.name for path in Path(config.out).iterdir() if "checkpoint" in path.name]
    assert main([str(file)]) == 0


def test_one_training_at_a_time(tmp_path: Path, children: Children) -> None:
    import fcntl

    config = configuration(tmp_path / "out", steps=1, validate_on="none")
    train(config)
    with (tmp_path / "out/metrics.jsonl").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = children.start(config, "second")
        process.join()
    assert process.exitcode == 2
    assert "one training at a time" in children.said("second")


def test_the_board_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configuration(tmp_path / "out", log_every=1, save_every=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(config)
    train(config)
    board = EventAccumulator(str(tmp_path / "out/tensorboard"))
    board.Reload()
    assert [x.step for x in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [x.step for x in board.Scalars("val/miou")] == [2, 4, 6]
    assert {"train/contributions/lidar", "val/iou/road"} <= set(board.Tags()["scalars"])
    values = [line["loss"] for line in lines_of(tmp_path / "out") if line["split"] == "train"]
    assert values == pytest.approx([x.value for x in board.Scalars("train/loss")])


class TestConfiguration:
    def test_survives_its_file(self, tmp_path: Path) -> None:
        config = configuration(
            tmp_path / "out", crop=[16, 32], ema=0.99, model={"sgm_stages": [1, 4], "gate": False}
        )
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert TrainConfig.load(tmp_path / "config.yaml") == config
        assert set(field_names()) >= {"lr", "data.sensors", "model.gate_tau"}

    def test_the_command_line_counts(self, tmp_path: Path) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("lr: 1e-4\nout: a\nmodel: {variant: b1}\n")  # a string, says YAML 1.1
        config = TrainConfig.load(file)
        assert (config.lr, config.model.variant, config.data.kind) == (1e-4, "b1", "synthetic")
        given = {
            "lr": "2e-3", "crop": "32,64", "sync_bn": "true", "steps": "none",
            "data.size": "[8, 16]",
            "data.sensors": "rgb,lidar", "model.variant": "nano", "model.sgm_stages": "",
            "model.gate": "false", "backbone": "mit_b0.pth",
        }  # fmt: skip
        config = TrainConfig.load(file, given)
        assert (config.lr, config.crop, config.sync_bn, config.steps) == (
            2e-3,
            (32, 64),
            True,
            None,
        )
        assert [x.name for x in config.data.sensors or ()] == ["rgb", "lidar"]
        assert (config.model.sgm_stages, config.model.gate) == ((), False)
        assert (config.data.size, config.backbone) == ((8, 16), "mit_b0.pth")

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("lr: [", (), "config.yaml is no YAML"),
            ("out: x\nlr: 1\nlr: 2", (), "config.yaml is no YAML: lr is there twice in"),
            ("[" * 5000, (), "config.yaml is no YAML: maximum recursion depth"),
            ("- 1", (), "config.yaml must hold fields and values; got list"),
            ("epoch: 3\nout: x", (), "epoch is no field; did you mean epochs?"),
            ("model: {varient: b0}\nout: x", (), "model.varient is no field; did you mean model.v"),
            ("data: {held_out: many}\nout: x", (), "data.held_out must be an integer; got 'many'"),
            ("data: 3\nout: x", (), "data must be a mapping of fields; got 3"),
            ("model: {num_classes: 3}\nout: x", (), "model.num_classes follows from the data"),
            ("lr: 1", (), "out must be given"),
            ("out: x", ("--lr", "fast"), "lr must be a number; got 'fast'"),
            ("out: x", ("--lr", "-1"), "lr must be positive; got -1.0"),
            ("out: x", ("--lr", "nan"), "lr must be a number; got 'nan'"),
            ("out: x", ("--epochs", "2.5"), "epochs must be an integer; got '2.5'"),
            ("out: x", ("--epochs", "0"), "epochs must be at least 1; got 0"),
            ("out: x", ("--sync-bn", "maybe"), "sync_bn must be true or false; got 'maybe'"),
            ("out: x", ("--precision", "int8"), "precision must be one of fp32, bf16, fp16; got"),
            ("out: x", ("--crop", "32"), "crop must be a list of 2, with commas on a command"),
            ("out: x", ("--scale", "2,1"), "scale must be lowest and highest; got (2.0, 1.0)"),
            ("out: x", ("--warmup", "1"), "warmup must be in [0, 1)"),
            ("out: x", ("--model", "b0"), "model has fields of its own: write --model.FIELD VALUE"),
            ("out: x", ("--modle.variant", "b0"), "modle.variant is no field; did you mean model."),
            ("out: x", ("--model.drop_path", "2"), "model.drop_path must be in [0, 1); got 2.0"),
            ("out: x", ("--data.kind", "web"), "data.kind must be one of folder, deliver, muses"),
            ("out: x", ("--lr",), "--lr needs a value"),
            ("", ("--out", "--dry-run"), "--out needs a value"),
            ("out: x", ("--batch_size", "5"), "batch_size must be at most the number of training"),
            ("out: x", ("--device", "cuda:77"), "device must be one that PyTorch sees"),
        ],
    )  # fmt: skip
    def test_says_what_is_wrong(
        self, text: str, options: tuple[str, ...], message: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        file = tmp_path / "config.yaml"
        file.write_text(text.replace("out: x", f"out: {tmp_path}/out"))
        assert main([str(file), *(("--data.length", "4") if "out" in text else ()), *options]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_help_has_every_field(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        words = capsys.readouterr().out.split()
        assert {f"--{name}" for name in field_names()} <= set(words)

    def test_dry_run_writes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "config.yaml"
        file.write_text(configuration(tmp_path / "out").to_yaml())
        assert main([str(file), "--dry-run", "--weight_decay=0.5"]) == 0
        said = capsys.readouterr().out
        assert "weight_decay          0.5" in said
        assert "steps: 6, 2 an epoch" in said
        assert "first batch (" in said
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_rate_follows_the_formula(tmp_path: Path) -> None:
    """Of 200 steps 10 rise from a tenth; the others fall by (1 - t)^0.9, never to 0."""
    config = configuration(tmp_path)
    ratios = [lr_ratio(step, 200, config) for step in range(200)]
    assert ratios[:10] == pytest.approx([0.1 + 0.09 * i for i in range(10)])
    assert ratios[10] == 1.0
    assert ratios[105] == pytest.approx(0.5**0.9)
    assert ratios[199] == pytest.approx((1 / 190) ** 0.9)
    still = configuration(tmp_path, warmup=0.0, power=0.0)
    assert {lr_ratio(step, 7, still) for step in range(7)} == {1.0}


def test_norms_biases_and_scales_do_not_decay(tmp_path: Path) -> None:
    model = EQUISeg.from_name("nano", modalities=("rgb", "lidar"), num_classes=3)
    decaying, still = adamw(model, configuration(tmp_path)).param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.01, 0.0)
    expected = {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        or name in ("bias", "dw_bias", "pw_bias", "layer_scale_1", "layer_scale_2")
    }
    assert {id(p) for p in still["params"]} == expected
    assert len(decaying["params"]) + len(expected) == len(list(model.parameters()))


def test_learns(tmp_path: Path) -> None:
    """In 40 steps the loss falls by a quarter, and the mIoU is three times that of calling
    everything the most frequent class."""
    config = configuration(
        tmp_path / "out", steps=40, batch_size=4, log_every=10, save_every=1000, validate_every=0,
        data={"length": 40, "held_out": 10, "sensors": None},
    )  # fmt: skip
    outcome = train(config)
    assert outcome is not None
    assert outcome.miou is not None
    losses = [line["loss"] for line in lines_of(tmp_path / "out") if line["split"] == "train"]
    val = config.data.open("val")
    labels = torch.stack([val[i].labels for i in range(len(val))])  # type: ignore[misc]
    counts = torch.bincount(labels[labels != val.ignore_index], minlength=len(val.classes))
    majority = (counts.max() / counts.sum() / (counts > 0).sum()).item()
    print(f"loss {losses}, mIoU {outcome.miou:.3f}, of the most frequent class {majority:.3f}")
    assert losses[-1] < 0.75 * losses[0]
    assert outcome.miou > 3 * majority

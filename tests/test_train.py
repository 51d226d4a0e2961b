"""The command that trains: what it reads, what it computes, and that nothing stops it for good."""

import json
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from equiseg_fast import EQUISeg
from equiseg_fast._command import Interrupted
from equiseg_fast.train import main
from equiseg_fast.training import TrainConfig, loop, train
from equiseg_fast.training.files import load

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


COMBINATIONS = {
    "fp32": {"ema": 0.9, "clip": 1.0},
    "bf16": {"precision": "bf16", "workers": 1, "model": {"modality_dropout": 0.5}},
    "fp16": {"precision": "fp16", "steps": 5, "validate_on": "none"},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before the first checkpoint, and in the middle of an epoch."""
    fields = COMBINATIONS[name]
    train(configuration(tmp_path / "whole", **fields))
    config = configuration(tmp_path / "pieces", **fields)
    for step in (1, 3):
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
    assert "mIoU" not in children.said("rank1") and "mIoU" in children.said("rank0")
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

"""The command that trains: what it reads, what it computes, and that nothing stops it for good."""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from equiseg_fast import EQUISeg, EQUISegConfig
from equiseg_fast._command import Failed, Interrupted
from equiseg_fast.data import DataConfig
from equiseg_fast.train import main
from equiseg_fast.training import TrainConfig, loop, train
from equiseg_fast.training.config import field_names
from equiseg_fast.training.files import load
from equiseg_fast.training.optimise import adamw, lr_ratio

from . import train_worker

SMALL: dict[str, Any] = {
    "data": {"kind": "synthetic", "size": [32, 64], "length": 8, "held_out": 2},
    "model": {"variant": "nano"},
    "epochs": 2,
    "batch_size": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 3,
    "save_every": 3,
    "device": "cpu",
}
"""Eight steps, with a checkpoint after the third, fourth, sixth and eighth."""


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
    "fp16": {"precision": "fp16", "steps": 7, "validate_on": "none"},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the first steps, between checkpoints and in the second epoch."""
    fields = COMBINATIONS[name]
    train(configuration(tmp_path / "whole", **fields))
    config = configuration(tmp_path / "pieces", **fields)
    for step in (1, 5, 6):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train(config)
    outcome = train(config)
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")
    before = torch.get_rng_state()
    assert train(config) == outcome  # nothing is left to do
    assert torch.equal(torch.get_rng_state(), before)

"""Where commands write: what cannot be is said first, nothing is lost, and how to go on."""

from __future__ import annotations

import errno
import importlib
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import INTERRUPTED, main
from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.machines import calibrate
from benchmarks.measure.plan import Case
from benchmarks.measure.record import Record, Writer, read
from benchmarks.measure.runner import Runner
from benchmarks.versions import against
from equiseg_fast.ops import _backend

RUN = (
    "run", "--at", "stage=4,height=64,width=96,modalities=2", "--device", "cpu", "--mode", "fwd",
    "--op", "add_layer_norm,guided_gate", "--provider", "torch", "--no-report",
)  # fmt: skip
COMMANDS: dict[str, Sequence[str]] = {
    "run": RUN,
    "resume": (*RUN, "--resume"),
    "against": ("against", "--base", "HEAD", "--device", "cpu", "--op", "add_layer_norm"),
    "profile": ("profile", "--op", "add_layer_norm", "--device", "cpu"),
    "calibrate": ("calibrate", "--device", "cpu"),
    "host": ("host", "--device", "cpu"),
    "predict": ("predict",),
    "visit": ("visit", "--device", "cpu"),
    "dry": ("dry", "--count"),
}
if _backend.TRITON_INSTALLED:
    COMMANDS |= {"tune": ("tune", "--device", "cpu"), "resources": ("resources",)}


@pytest.fixture(autouse=True)
def _no_repository_and_limits_that_need_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "_git", lambda *_: "0" * 40)
    limits = Limits(1e9, {"fp32": 1e9}, 1e9)
    monkeypatch.setattr(calibrate, "device_limits", lambda *_: limits)


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that exits with 2 says, in one line."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    return shown.err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_can_be_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, below a file, and where the system makes no files."""
    file = tmp_path / "file"
    file.write_text("precious")
    option = "--cache" if name == "dry" else "--out"
    places = [file, file / "below", Path("/proc/nowhere")]
    if name == "host":  # which writes a file
        places = [tmp_path, *(place / "host.json" for place in places)]
    for place in places:
        said = refusal([*COMMANDS[name], option, str(place)], capsys)
        assert f"error: {option} must be a f" in said
        assert str(place.parent if name == "host" and place != tmp_path else place) in said
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("run", "results.jsonl"),
        ("run", "plots"),
        ("against", "base"),
        ("profile", "trace.json"),
        pytest.param("tune", "tuned.json", marks=pytest.mark.skipif(
            not _backend.TRITON_INSTALLED, reason="triton is not installed"
        )),
    ],
)  # fmt: skip
def test_nothing_is_overwritten(
    name: str, holds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / holds).write_text("of yesterday")
    said = refusal([*COMMANDS[name], "--out", str(tmp_path)], capsys)
    assert f"{tmp_path} has {holds} of an earlier run" in said
    assert ("; --resume goes on with that" in said) == (name == "run")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(holds, "of yesterday")]


def test_a_run_goes_on_only_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.json").write_text('{"device": "another chip"}')
    said = refusal([*RUN, "--out", str(tmp_path), "--resume"], capsys)
    assert "--resume goes on where it was measured, on another chip; this is " in said


def test_names_that_nobody_has(tmp_path: Path) -> None:
    assert outputs.fresh(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert outputs.fresh(tmp_path / "run") == tmp_path / "run-3"


@pytest.mark.parametrize("device", ["mps", "meta", "gpu", "cuda:x", "cpu:1", ""])
@pytest.mark.parametrize(
    "name", ["run", "against", "profile", "calibrate", "host", "visit", "exercise"]
)
def test_devices_that_cannot_be_measured(
    name: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal([*COMMANDS.get(name, (name,)), f"--device={device}"], capsys)
    assert f"--device must be cpu, cuda or, as in cuda:1, one of them; got {device!r}" in said


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Runner.run
    out = tmp_path / "out"
    command = [*RUN, "--out", str(out)]

    def run(self: Runner, case: Case, *others: Any) -> list[Record]:
        if case.op.name == "guided_gate":
            signal.raise_signal(signal.SIGINT)
        return right(self, case, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", run)
        assert main(command) == INTERRUPTED
    shown = capsys.readouterr().out
    assert f"interrupted; what was measured is in {out}; with --resume --out {out} it" in shown
    before = read(out)
    assert {row.op for row in before} == {"add_layer_norm"}
    assert main([*command, "--resume"]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    after = read(out)
    assert after[: len(before)] == before
    assert {row.op for row in after} == {"add_layer_norm", "guided_gate"}


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("calibrate", "--device", "cpu"), "machines.calibrate.measure"),
        (("predict",), "machines.predictions.predict"),
        (("resources", "--out", "build"), "offline.resources.run"),
        (("env",), "measure.record.environment"),
    ],
)
def test_every_command_can_be_interrupted(
    arguments: Sequence[str],
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, function = where.rpartition(".")

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(importlib.import_module(f"benchmarks.{module}"), function, interrupted)
    assert main(arguments) == INTERRUPTED
    assert "interrupted; the same command" in capsys.readouterr().out


def test_a_full_disk_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the first record that is lost, as those behind it would be, too."""
    right, cases = Writer.add, list[str]()

    def add(self: Writer, records: list[Record]) -> None:
        records = list(records)
        cases.extend(record.op for record in records)
        self.path = Path("/dev/full") if cases[-1] == "guided_gate" else self.path
        right(self, records)

    monkeypatch.setattr(Writer, "add", add)
    said = refusal([*RUN, "--out", str(tmp_path / "out")], capsys)
    assert "error: No space left on device; what was measured is in" in said
    assert f"with --resume --out {tmp_path}/out it goes on there" in said
    assert cases.count("guided_gate") == 1
    assert {row.op for row in read(tmp_path / "out")} == {"add_layer_norm"}


def test_what_is_replaced_is_not_lost_to_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    outputs.write(path, "old")

    def full(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        outputs.write(path, "new and longer")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_report_is_not_begun_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Record("core", "add_layer_norm", asdict(Shape("b0", 1, 64, 64)), "fwd", "torch", "fp32")
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(row)) + "\n")

    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(outputs, "TemporaryFile", read_only)
    said = refusal(["report", str(tmp_path)], capsys)
    assert f"got {tmp_path}: Read-only file system" in said
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]

"""The runs in miniature: commands that go on, and what is made of their evaluations."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.command.options import ROOT
from benchmarks.miniature import experiment as miniature
from benchmarks.miniature import report, run

from .processes import alive, started


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One setting, one seed, one step, one scene."""
    training = {"steps": 1, "batch_size": 1, "crop": [32, 64]}
    data = {"kind": "synthetic", "size": [32, 64], "length": 2, "held_out": 1}
    monkeypatch.setattr(miniature, "TRAINING", miniature.TRAINING | training | {"data": data})
    monkeypatch.setattr(miniature, "SEEDS", (0,))
    monkeypatch.setattr(miniature, "SETTINGS", {"SGM": miniature.SETTINGS["SGM"]})
    monkeypatch.setattr(miniature, "SCENES", 1)
    return


def test_it_is_stopped_and_goes_on(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["miniature", "--out", str(out), "--minutes", "0"]) == 0
    assert "1 of 1 runs are left" in capsys.readouterr().out
    assert main(["miniature", "--out", str(out), "--device", "cpu"]) == 0
    content = json.loads((out / "results.json").read_text())
    (row,) = content["runs"]
    assert row["setting"] == "SGM"
    assert len(row["scores"]) > 100
    assert row["losses"]["seg"] > 0
    (gate,) = content["gates"]
    assert list(gate["shares"]) == ["all well", *(f"{name} blank" for name in gate["sensors"])]
    for table in gate["shares"].values():
        for stage in table:
            assert sum(stage) == pytest.approx(1.0, abs=1e-5)
    for name in ("report.md", "gate.png", "severity.png"):
        assert (out / name).stat().st_size > 500
    assert main(["miniature", "--out", str(out), "--dry-run"]) == 0
    assert "seed 0: done" in capsys.readouterr().out.replace("\n", " ")
    # Another training is not taken for this one.
    monkeypatch.setattr(miniature, "TRAINING", miniature.TRAINING | {"lr": 0.5})
    assert main(["miniature", "--out", str(out), "--dry-run"]) == 0
    assert "seed 0: to do" in capsys.readouterr().out.replace("\n", " ")


def instead(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Of every run."""
    monkeypatch.setattr(run, "commands", lambda run, device: {"train": [*command]})


def test_a_run_that_fails_is_named(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instead(monkeypatch, "/bin/false")
    out = tmp_path / "out"
    assert main(["miniature", "--out", str(out), "--device", "cpu"]) == 1
    assert f"failed: SGM, seed 0; see {out / 'SGM-0' / 'train.log'}" in capsys.readouterr().out


def test_time_that_is_over_ends_its_commands(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instead(monkeypatch, "/bin/bash", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 300")
    assert main(["miniature", "--out", str(tmp_path / "out"), "--minutes", "0.01"]) == 0
    assert "1 of 1 runs are left" in capsys.readouterr().out
    assert not alive(started(tmp_path / "pid"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_it_takes_its_commands_along(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    pid = tmp_path / "pid"
    instead(monkeypatch, "/bin/bash", "-c", f"echo $$ > {pid}; exec sleep 300")

    def terminate() -> None:
        started(pid)
        sleep(0.3)  # until it is waited for
        os.kill(os.getpid(), number)

    killer = Thread(target=terminate)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    try:
        killer.start()
        assert main(["miniature", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
        killer.join()
    finally:
        signal.signal(number, before)
    assert "interrupted; what is finished is in" in capsys.readouterr().out
    assert not alive(started(pid))


def test_tables_have_mean_and_spread() -> None:
    def row(setting: str, seed: int, miou: float) -> dict[str, Any]:
        summary = {
            "clean": miou,
            "EMM_Avg": miou / 2,
            "RMM_Avg": {"0.5": miou},
            "NM": {"low": miou, "high": 0.0},
            "masked_Avg": miou,
            "degradations": {"night": miou, "dead_rgb": miou, "dead_lidar": 0.0, "fog": 0.0},
        }
        scores = {"dead_rgb at 1": miou, "dead_lidar at 1": 0.0}
        losses = {"seg": miou + 1, "sgm": miou}
        results = {"losses": losses, "summary": summary, "scores": scores}
        return {"setting": setting, "seed": seed, **results}

    rows = [row("mean", 0, 0.2), row("mean", 1, 0.3), row("SGM", 0, 0.5), row("sharp gate", 0, 0.1)]
    content = {"training": miniature.TRAINING, "scenes": 100, "runs": rows}
    text = report.report(content)
    cells = [line.rpartition(" |")[0].rpartition(" | ")[0] for line in text.splitlines()]
    cells = [line for line in cells if line.startswith("| ")]
    sgm = "| SGM | 50.0 | 25.0 | 50.0 | 50.0 | 50.0 | 0.0 | 25.0 | 25.0"
    assert cells[1].startswith("| mean | 25.0 (20.0 to 30.0) | 12.5 (10.0 to 15.0) |")
    assert cells[2] == sgm
    assert cells[4:] == [
        "| mean | 20.0 | 10.0 | 20.0 | 20.0 | 20.0 | 0.0 | 10.0 | 10.0 | 120.0 | 20.0",
        f"{sgm} | 150.0 | 50.0",
        "| sharp gate | 10.0 | 5.0 | - | 10.0 | 10.0 | 0.0 | 5.0 | 5.0 | 110.0 | 10.0",
    ]
    assert "ended below 20.0 % clean" in text
    assert report.overview(content) in text


def test_settings_differ_in_what_they_say() -> None:
    fields = [setting["model"] for setting in miniature.SETTINGS.values()]
    assert len({json.dumps(x, sort_keys=True) for x in fields}) == len(fields) == 16
    assert "modality_dropout" not in miniature.SETTINGS["SGM"]["model"]
    assert len(miniature.runs(Path())) == 11 * 3 + 5
    folders = [run.folder for run in miniature.runs(Path())]
    assert len(set(folders)) == len(folders)


def test_committed_report_is_of_the_committed_results() -> None:
    folder = ROOT / "benchmarks" / "results" / "miniature"
    content = json.loads((folder / "results.json").read_text())
    assert report.report(content) == (folder / "report.md").read_text()
    assert {row["setting"] for row in content["runs"]} == set(miniature.SETTINGS)

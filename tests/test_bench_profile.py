"""`python -m benchmarks profile`: what is shown is what ran, and nothing wrong is profiled."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Problem
from benchmarks.command.options import ROOT
from benchmarks.measure import profiling

HERE = ["--at", "height=64,width=96", "--device", "cpu"]


def test_operators_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--op", "depthwise_conv_gelu", "--mode", "step", *HERE, "--out", str(tmp_path)]
    assert main(["profile", *case]) == 0
    out = capsys.readouterr().out
    assert "depthwise_conv_gelu b0 s2 64x96 B1 M3 fp32 step torch on cpu" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    # The middle of Mix-FFN is one convolution forward and one backward.
    for name in ("aten::mkldnn_convolution", "aten::convolution_backward"):
        assert rows[name][-1] == str(profiling.CALLS)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["name"] == "aten::convolution_backward" for e in events) == profiling.CALLS


def test_commands_for_the_gpu_profilers_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for number in ("1", "10"):
        (command,) = re.findall(f"python -m benchmarks (profile .*--only-calls {number})\n", text)
        assert main([*command.split(), "--dry-run"]) == 0
        first, case, *_ = capsys.readouterr().out.splitlines()
        assert first == "attention b0 s2 480x736 B1 M3 fp32 fwd triton on cuda"
        assert case.endswith("fwd: triton")


def test_nothing_wrong_is_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = operations()["add_layer_norm"]

    def build(*arguments: object) -> Problem:
        problem = right.build(*arguments)
        call = problem.calls["torch"]
        problem.calls["torch"] = lambda: tuple(1.01 * x for x in call())
        return problem

    monkeypatch.setitem(operations(), "add_layer_norm", replace(right, build=build))
    with pytest.raises(SystemExit) as error:
        main(["profile", "--op", "add_layer_norm", *HERE, "--out", str(tmp_path / "none")])
    assert error.value.code == 2
    assert "add_layer_norm b0 s2 64x96 B1 M3 fp32 fwd torch: incorrect:" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--op", "add_layer_norm", "--provider", "triton"],
            "unsupported: kernels are timed on a GPU only",
        ),
        (["--op", "atention"], "--op must be among attention"),
        (["--op", "add_layer_norm", "--only-calls", "1"], "--only-calls is for profilers of a GPU"),
        (["--op", "add_layer_norm", "--at", "variant=b9"], "--at variant must be among nano, b0"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["profile", *HERE, *arguments])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())

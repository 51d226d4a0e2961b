"""`python -m benchmarks profile`: what is shown is what ran, and nothing wrong is profiled."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Problem
from benchmarks.measure.profiling import table

HERE = ["--at", "height=64,width=96", "--device", "cpu"]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every row of the table, by its first."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_operators_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "profile",
        "--op",
        "depthwise_conv_gelu",
        *HERE,
        "--calls",
        "4",
        "--top",
        "5",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--mode", "step"]) == 0
    out = capsys.readouterr().out
    assert "depthwise_conv_gelu b0 s2 64x96 B1 M3 fp32 step torch on cpu" in out
    shown = rows(out)
    # The middle of Mix-FFN is one convolution forward and one backward.
    for name in ("aten::mkldnn_convolution", "aten::convolution_backward"):
        assert shown[name][-1] == "1.00"
    shares = [float(cells[1]) for cells in shown.values() if cells[-2:-1] == ["%"]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["name"] == "aten::convolution_backward" for e in events) == 4


def test_table_counts_own_time_per_call() -> None:
    x = torch.randn(300, 300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        for _ in range(6):
            x @ x
    shown = table(prof, calls=2, top=1, cuda=False)
    [(cells, *_)] = shown.rows
    own = next(e for e in prof.key_averages() if e.key == "aten::mm").self_cpu_time_total
    assert cells[0] == "aten::mm"
    assert float(cells[1]) == pytest.approx(own / 2, rel=0.01)
    assert cells[4] == "3.00"


def test_commands_of_the_gpu_profilers_name_the_very_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space"
    chosen = [
        "profile",
        "--op",
        "add_layer_norm",
        "--mode",
        "bwd",
        "--dtype",
        "bf16",
        "--suite",
        "core",
    ]
    at = "batch=2,stage=3,variant=b0,height=512,width=512,modalities=4"
    chosen += ["--at", at, "--seed", "7"]
    assert main([*chosen, "--device", "cuda", "--dry-run", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    commands = [line.strip() for line in text.splitlines() if "--only-calls" in line]
    for tool, command in zip(("ncu", "nsys"), commands, strict=True):
        words = shlex.split(command)
        assert words[:5] == ["mkdir", "-p", str(out), "&&", tool]
        again = words[words.index("benchmarks") + 1 :]
        # Pasted, the command says that it would profile the same.
        assert main([*again, "--dry-run"]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first == text.splitlines()[0]
    assert first == "add_layer_norm b0 s3 512x512 B2 M4 bf16 bwd triton on cuda"
    assert "--seed 7" in commands[0]
    assert "--clock-control none" in commands[0]


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
        (["--op", "add_layer_norm", "--calls", "0"], "--calls must be at least 1; got 0"),
        (["--op", "add_layer_norm", "--only-calls"], "--only-calls is for profilers of a GPU"),
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

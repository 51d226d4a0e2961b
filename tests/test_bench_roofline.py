"""Peaks of known GPUs, what is measured of a device, and the floors predicted from either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.cost import Limits, total
from benchmarks.cases.common.problem import Shape
from benchmarks.machines import calibrate, gpus, roofline
from benchmarks.machines.calibrate import Measurement, Sizes
from benchmarks.measure.launches import cost_of
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES

CPU = torch.device("cpu")

# ---- peaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gpus.GPUS)
def test_published_peaks_agree_with_one_another(name: str) -> None:
    """Clock times SMs times what one does per clock: a wrong figure, or one with
    sparsity, would be off by far more than boost clocks differ."""
    gpu = gpus.by_name(name)
    assert gpu.peak["bf16"] == pytest.approx(gpu.tensor * gpu.num_sms * gpu.clock, rel=0.03)
    lanes = 64 if gpu.capability == 80 else 128
    assert gpu.peak["fp32"] == pytest.approx(2 * lanes * gpu.num_sms * gpu.clock, rel=0.15)
    assert gpu.peak["bf16"] == gpu.peak["fp16"] == pytest.approx(2 * gpu.peak["tf32"], rel=0.03)
    assert gpu.exps == 16 * gpu.num_sms * gpu.clock
    assert 0.5e12 < gpu.bandwidth < 10e12
    assert gpu.source


def test_h200_is_the_one_on_the_datasheet() -> None:
    gpu = gpus.by_name("H200")
    published = (gpu.bandwidth, gpu.peak["bf16"], gpu.peak["fp32"])
    assert published == pytest.approx((4.8e12, 989.4e12, 66.9e12))
    assert gpu.exps == pytest.approx(3.87e12, rel=1e-2)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA H100 NVL", None),
        ("Some CPU", None),
    ],
)
def test_devices_are_recognised(device: str, name: str | None) -> None:
    assert gpus.of_device(device) is (gpus.GPUS[name] if name else None)


# ---- calibration --------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate.SIZES, "cpu", Sizes(copy=2**12, matrix=64, exps=2**10))


@pytest.mark.usefixtures("small")
def test_a_cpu_is_measured() -> None:
    found = {m.name: m for m in calibrate.measure(CPU, calibrate.DTYPES)}
    assert list(found) == ["copy", "fp32", "bf16", "fp16", "exps"]
    assert found["copy"].amount == 2 * 4 * 2**12
    assert found["bf16"].amount == 2 * 64**3
    assert found["exps"].amount == 2**10
    for m in found.values():
        assert 0 < m.best <= m.p20 <= m.p50 <= m.p80
        assert m.rate >= m.median_rate > 0
    limits = calibrate.limits_of(list(found.values()))
    assert limits.bandwidth == found["copy"].rate
    assert limits.peak == {name: found[name].rate for name in ("fp32", "bf16", "fp16")}
    assert limits.exps == found["exps"].rate


@pytest.mark.usefixtures("small")
def test_limits_of_a_run_always_have_fp32() -> None:
    limits = calibrate.device_limits(CPU, {"bf16": torch.bfloat16})
    assert set(limits.peak) == {"fp32", "bf16"}


def test_what_multiplies_slowly_gets_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SLOW_PRODUCT", 0.0)
    assert calibrate._product("fp16", torch.float16, 64, CPU, None).amount == 2 * 16**3


def test_time_is_counted_and_not_the_rate() -> None:
    calls = []

    def sleeps() -> None:
        calls.append(None)
        sleep(2e-3)

    m = calibrate._timed("x", "1/s", 10, sleeps, CPU)
    assert 2e-3 <= m.best < 1.0
    assert m.rate == 10 / m.best
    assert len(calls) == m.n + 1  # the first call is warm-up


@pytest.mark.usefixtures("small")
def test_calibrate_writes_what_roofline_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", "--out", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert "matrix product bf16" in shown
    assert f"written to {tmp_path}/c/calibration.json" in shown
    result = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert result["datasheet"] is None
    names = [m["name"] for m in result["measurements"]]
    assert names == ["copy", "fp32", "bf16", "fp16", "exps", "launch"]
    assert result["env"]["torch"] == torch.__version__
    limits = calibrate.read(tmp_path / "c")
    assert (
        limits
        == Limits.read(result["limits"])
        == calibrate.read(tmp_path / "c" / "calibration.json")
    )
    assert limits.exps > 0

    (tmp_path / "env.json").write_text(json.dumps({"limits": result["limits"]}))
    assert calibrate.read(tmp_path) == limits
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json has no limits"):
        calibrate.read(tmp_path / "other.json")


def test_calibrate_dry_run_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *a: pytest.fail("it measured"))
    assert main(["calibrate", "--device", "cpu", "--dry-run"]) == 0
    assert "nothing was run" in capsys.readouterr().out


def test_the_datasheet_stands_beside_a_known_gpu() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    copy = Measurement("copy", "B/s", 2**31, 2**31 / 4.32e12, 5e-4, 5e-4, 6e-4, 50)
    launch = Measurement("launch", "s", 1, 2e-6, 2e-6, 3e-6, 4e-6, 200)
    console.print(calibrate.table([copy, launch], "NVIDIA H200", gpus.by_name("h200")))
    text = console.export_text()
    assert "4.32 TB/s" in text
    assert "4.8 TB/s" in text
    assert "90 %" in text
    assert "2.00 us" in text


def test_the_exponential_kernel_takes_exponentials() -> None:
    """In the interpreter: every element has gone through exp2(-x) so many times."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = """
import torch
from benchmarks.machines.exp_kernel import BLOCK, exponentials
out = torch.empty(2 * BLOCK)
assert exponentials(out, steps=3) == 2 * BLOCK * 3
x = torch.arange(2 * BLOCK, dtype=torch.float32) * 1e-9
for _ in range(3):
    x = torch.exp2(-x)
torch.testing.assert_close(out, x)
print("equal")
"""
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert "equal" in done.stdout, done.stderr[-2000:]


def test_measured_rows_are_held_against_all_four_limits() -> None:
    """With exponentials as the only thing that takes time, the floor is theirs."""
    op = operations()["attention"]
    shape = Shape("b0", 1, 64, 64, 1, 2)
    case = Case(op, shape, "fp32", ("fwd", "step"), ("torch",))
    suite = replace(SUITES["quick"], seconds=0.0, rounds=(2, 2))
    limits = Limits(1e30, {"fp32": 1e30}, exps=1e6)
    rows = {r.mode: r for r in Runner(Options(), limits, suite=suite).run(case)}
    scores = 2 * 16 * 16 * 4
    for mode, passes in (("fwd", 1), ("step", 2)):
        seconds = rows[mode].p50_us / 1e6
        assert rows[mode].roofline_pct == pytest.approx(100 * passes * scores / 1e6 / seconds)
        assert rows[mode].tflops == pytest.approx(
            total(cost_of(op, shape, 4).of(mode)).flops / seconds / 1e12
        )


# ---- predictions --------------------------------------------------------------------------------


def test_floor_of_the_model_is_no_less_than_that_of_its_bytes() -> None:
    shape = Shape("b0", 0, 256, 256, 1, 4)
    limits = gpus.by_name("a100").limits
    for mode in ("fwd", "step"):
        works = roofline.model_works(shape, "bf16", mode)
        assert limits.floor(works, "bf16") >= total(works).bytes / limits.bandwidth


def test_a_training_step_takes_longer_and_a_better_gpu_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def last(*arguments: str) -> float:
        size = ["--size", "256x320", "--modalities", "3"]
        assert main(["roofline", *size, *arguments]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("prediction, not measured") == 3
        return float(out.rsplit("at least ", 1)[1].split(" ms")[0])

    h200 = last("--gpu", "h200")
    assert last("--gpu", "h200", "--mode", "step") > 2.5 * h200
    assert last("--gpu", "a100") > 1.5 * h200
    assert last("--gpu", "h200", "--dtype", "fp32") > 1.5 * h200
    assert last("--gpu", "h200", "--batch", "4") > 3 * h200


def test_a_calibration_replaces_the_datasheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.json"
    limits = {"bandwidth": 1e9, "peak": {"fp32": 1e9, "bf16": 1e9}, "exps": None}
    path.write_text(json.dumps({"limits": limits}))
    arguments = ["roofline", "--gpu", "h200", "--size", "64x64", "--calibration", str(path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "not known" in out
    assert "0.001" in out
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--dtype", "fp16"])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert "dtype must be among fp32, bf16" in captured.err
    assert "at least" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "--gpu must be one of h200, h100, h100-pcie, a100"),
        (["--gpu", "h200", "--size", "1000x64"], "multiples of 32"),
        (["--gpu", "h200", "--size", "64"], "must be like 1024x1024"),
        (["--gpu", "h200", "--modalities", "9"], "--modalities must be 1 to 8"),
        (["--gpu", "h200", "--batch", "0"], "--batch must be 1 to"),
        (["--gpu", "h200", "--variant", "b9"], "variant must be one of"),
    ],
)
def test_usage_errors_of_roofline(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["roofline", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_roofline_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--gpu", "b200", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "nothing was computed" in out
    assert " ms" not in out
    assert main(["roofline", "--gpu", "b200", "--size", "64x64"]) == 0
    out = capsys.readouterr().out
    assert "SMs" in out
    assert "148" in out
    assert "unconfirmed" in out

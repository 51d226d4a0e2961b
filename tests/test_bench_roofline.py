"""Peaks of known GPUs, what is measured of a device, and the floors predicted from either."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.cost import Limits, total
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.machines import calibrate, gpus, roofline
from benchmarks.measure import timing
from benchmarks.measure.launches import cost_of
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES
from benchmarks.measure.timing import Timing

CPU = torch.device("cpu")

# ---- peaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gpus.GPUS)
def test_published_peaks_agree_with_one_another(name: str) -> None:
    """Clock times SMs times what one does per clock: a wrong figure, or one with
    sparsity, would be off by far more than boost clocks differ."""
    gpu = gpus.GPUS[name]
    tensor = {"a100": 2048, "b200": 8192, "l40s": 1024, "rtx4090": 512, "rtx5090": 512}
    bf16 = tensor.get(name, 4096) * gpu.num_sms * gpu.clock
    assert gpu.peak["fp16"] == gpu.peak["bf16"] == pytest.approx(bf16, rel=0.03)
    lanes = 64 if gpu.capability == 80 else 128
    assert gpu.peak["fp32"] == pytest.approx(2 * lanes * gpu.num_sms * gpu.clock, rel=0.15)
    assert gpu.limits.exps == 16 * gpu.num_sms * gpu.clock
    assert 0.5e12 < gpu.bandwidth < 10e12
    assert gpu.source


def test_h200_is_the_one_on_the_datasheet() -> None:
    gpu = gpus.GPUS["h200"]
    published = (gpu.bandwidth, gpu.peak["bf16"], gpu.peak["fp32"])
    assert published == pytest.approx((4.8e12, 989.4e12, 66.9e12))
    assert gpu.limits.exps == pytest.approx(3.87e12, rel=1e-2)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", None),
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
    monkeypatch.setitem(calibrate.SIZES, "cpu", (2**12, 64, 2**10))


@pytest.mark.usefixtures("small")
def test_amounts_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The amount is that of one call, the rate that of the best of them."""
    taken = Timing(3.0, 4.0, 5.0, 2.0, 9, "wall")
    calls = []

    def measure_cpu(timed: dict[str, Callable[[], Any]], **_: Any) -> dict[str, Timing]:
        (name,) = timed
        calls.append(timed[name])
        return {name: taken}

    monkeypatch.setattr(timing, "measure_cpu", measure_cpu)
    found = calibrate.measure(CPU, DTYPES)
    amounts = {
        "copy": 2 * 4 * 2**12, "fp32": 2 * 64**3, "bf16": 2 * 64**3, "fp16": 2 * 64**3,
        "exps": 2**10, "launch": 200,
    }  # fmt: skip
    assert {m["name"]: m["rate"] for m in found} == {n: x / 2e-6 for n, x in amounts.items()}
    assert {m["name"]: m["median"] for m in found} == {n: x / 4e-6 for n, x in amounts.items()}
    assert calls[1]().dtype == torch.float32
    assert calls[2]().dtype == torch.bfloat16
    limits = calibrate.device_limits(CPU, {"bf16": torch.bfloat16})
    assert limits == Limits(
        2**15 / 2e-6, dict.fromkeys(("fp32", "bf16"), 2**19 / 2e-6), 2**10 / 2e-6
    )


@pytest.mark.usefixtures("small")
def test_calibrate_writes_limits_and_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "of_device", lambda name: gpus.GPUS["h200"])
    assert main(["calibrate", "--device", "cpu", "--out", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^copy: \S+ B/s, median \S+, 0 % of the datasheet$", shown, re.M)
    assert re.search(r"^launch: \S+ launches/s, median \S+$", shown, re.M)
    assert f"written to {tmp_path}/c/calibration.json" in shown
    result = json.loads((tmp_path / "c" / "calibration.json").read_text())
    names = [m["name"] for m in result["measurements"]]
    assert names == ["copy", "fp32", "bf16", "fp16", "exps", "launch"]
    assert all(0 < m["median"] <= m["rate"] for m in result["measurements"])
    assert result["env"]["torch"] == torch.__version__
    assert Limits.read(result["limits"]).exps > 0


def test_calibrate_dry_run_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *a: pytest.fail("it measured"))
    assert main(["calibrate", "--device", "cpu", "--dry-run"]) == 0
    assert "nothing was run" in capsys.readouterr().out


def test_the_exponential_kernel_takes_exponentials() -> None:
    """In the interpreter: every element has gone through exp2(-x) so many times."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = """
import torch
from benchmarks.machines.exp_kernel import BLOCK, exp2_kernel
out = torch.empty(2 * BLOCK)
exp2_kernel[(2,)](out, 3, BLOCK, num_warps=4)
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


def test_floors_of_the_model() -> None:
    limits = gpus.GPUS["a100"].limits
    shape = Shape("b0", 0, 256, 256, 1, 4)
    works = {mode: roofline.model_works(shape, "bf16", mode) for mode in ("fwd", "step")}
    floors = {mode: limits.floor(works[mode], "bf16") for mode in works}
    assert floors["fwd"] >= total(works["fwd"]).bytes / limits.bandwidth
    assert floors["step"] > 2.5 * floors["fwd"]


def test_a_table_of_floors(capsys: pytest.CaptureFixture[str]) -> None:
    def table(*arguments: str) -> dict[str, list[float]]:
        """Floors in ms by operation, the last row too."""
        size = ["--height", "256", "--width", "320", "--modalities", "3"]
        assert main(["roofline", *size, *arguments]) == 0
        out = capsys.readouterr().out
        assert "prediction, not measured" in " ".join(out.split())
        found: dict[str, list[float]] = {}
        for line in out.splitlines():
            if row := re.match(
                r" *(whole model|\w+) .* ([\d.e-]+) +(bytes|\w+ FLOPs|exps) *$", line
            ):
                found.setdefault(row[1], []).append(float(row[2]))
        return found

    h200 = table("--gpu", "H200")
    assert list(h200) == [*(op.name for op in operations().values() if op.function), "whole model"]
    assert len(h200["attention"]) == 4
    (whole,) = h200["whole model"]
    assert table("--gpu", "a100")["whole model"][0] > 1.5 * whole
    assert table("--gpu", "h200", "--dtype", "fp32")["whole model"][0] > 1.5 * whole
    assert table("--gpu", "h200", "--batch", "4")["whole model"][0] > 3 * whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "argument --gpu: invalid choice: 'v100' (choose from"),
        (["--gpu", "h200", "--height", "0"], "--height, --width and --batch must be positive"),
        (["--gpu", "h200", "--modalities", "9"], "argument --modalities: invalid choice: 9"),
        (["--gpu", "h200", "--variant", "b9"], "argument --variant: invalid choice: 'b9'"),
    ],
)
def test_usage_errors_of_roofline(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["roofline", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err

"""The scripts of `examples/`, shortened."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_one_layer() -> None:
    assert example("one_layer").main(["--steps", "50"]) > 0.9


def test_accelerate_segformer(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("accelerate_segformer")
    assert 0 < module.main(["--size", "64", "--seconds", "0.05"]) < 1e-5
    assert "16 modules" in capsys.readouterr().out


def test_profile_attention(capsys: pytest.CaptureFixture[str]) -> None:
    medians = example("profile_attention").main(["--side", "32", "--seconds", "0.05"])
    assert medians.keys() == {"equiseg_fast", "SDPA"}
    assert "Self CPU" in capsys.readouterr().out


def test_failing_sensor(tmp_path: Path) -> None:
    out = tmp_path / "failing.png"
    found = example("failing_sensor").main(["--steps", "2", "--images", "1", "--out", str(out)])
    assert found.keys() == {"all sensors", "depth is blank", "depth is absent"}
    assert all(0 <= miou <= 1 for miou in found.values())
    assert out.read_bytes()[1:4] == b"PNG"

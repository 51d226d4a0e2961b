"""What runs leave behind and how it is read; the benchmarks under pytest-benchmark."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import operations
from benchmarks.cases.common.problem import Shape
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import UNTIMED, Record, Writer, read, read_environment, write_jsonl
from benchmarks.measure.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape("b0", 1, 64, 96, batch=1, modalities=3)


def record(provider: str = "torch", **fields: Any) -> Record:
    row = Record("quick", "add_layer_norm", asdict(SHAPE), "fwd", provider, "fp32", p50_us=5.0, n=3)
    return replace(row, **fields)


# ---- writing ------------------------------------------------------------------------------------


def test_lines_grow_and_the_last_of_a_measurement_counts(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("of an earlier run\n")
    writer = Writer(tmp_path)
    assert read(tmp_path) == []
    early = record(p50_us=None, reason=UNTIMED)
    second = record("flex", status="unsupported", reason='no "backward", on a CPU', p50_us=None)
    writer.add([early])
    assert read(tmp_path) == [early]
    assert not early.final
    writer.add([second, record()])
    assert read(tmp_path) == [record(), second]
    assert second.final
    assert record().final
    Writer(tmp_path, resume=True).add([record(p50_us=4.0)])
    assert read(tmp_path) == [record(p50_us=4.0), second]


# ---- reading ------------------------------------------------------------------------------------


def test_a_folder_and_its_file_are_read(tmp_path: Path) -> None:
    rows = [record(), record("baseline", peak_mib=1.5), record("flex", status="oom", p50_us=None)]
    write_jsonl(rows, tmp_path / "results.jsonl")
    (tmp_path / "env.json").write_text('{"device": "a chip"}')
    for path in (tmp_path, tmp_path / "results.jsonl"):
        assert read(path) == rows
        assert read_environment(path) == {"device": "a chip"}
    (tmp_path / "env.json").unlink()
    assert read_environment(tmp_path) == {}


GOOD = json.dumps(asdict(record()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(asdict(record(schema=2))), "schema must be 1; got 2"),
        (GOOD.replace('"mode": "fwd", ', ""), "missing 1 required positional argument: 'mode'"),
        (GOOD.replace('"height": 64', '"depth": 64'), "unexpected keyword argument 'depth'"),
        ("[1, 2]", "schema must be 1; got None"),
        ("{not json", "Expecting property name"),
        ("\x80", "Expecting value"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "results.jsonl").write_bytes(f"{GOOD}\n{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.jsonl line 2: ") as error:
        read(tmp_path)
    assert message in str(error.value)


def test_results_of_earlier_versions_have_more_fields(tmp_path: Path) -> None:
    line = json.dumps(asdict(record()) | {"max_ratio": 1.5})
    (tmp_path / "results.jsonl").write_text(line + "\n")
    assert read(tmp_path) == [record()]


def test_no_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.jsonl")


def test_the_committed_results_can_be_read() -> None:
    for folder in ("cpu-2-cores", "cpu-2-cores-512"):
        path = ROOT / "benchmarks" / "results" / folder
        assert read(path)
        assert read_environment(path)["torch"]


# ---- under pytest-benchmark ---------------------------------------------------------------------

TINY = """\
from dataclasses import replace

from benchmarks.cases import operations
from benchmarks.measure.suites import SUITES, Grid

grid = Grid(("b0",), ((64, 96),), modalities=(3,), stages=(2,))
SUITES["quick"] = replace(SUITES["quick"], grids=(grid,), seconds=0.0, rounds=(3, 3))


def wrong(right):
    def build(*arguments):
        problem = right.build(*arguments)
        torch = problem.calls["torch"]
        problem.calls["torch"] = lambda: tuple(1.01 * x for x in torch())
        return problem

    return replace(right, build=build)


for name in ("add_layer_norm", "model"):
    operations()[name] = wrong(operations()[name])
"""


def test_pytest_times_what_is_right_and_fails_what_is_wrong(tmp_path: Path) -> None:
    """In its own process, tiny, with add_layer_norm and model wrong."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "timings.json"
    (tmp_path / "tiny.py").write_text(TINY)
    # Of the model only one provider, which then has nobody before it to be compared with.
    chosen = "add_layer_norm or query_hub or (model and torch)"
    # Without "-rs" the summary repeats what failed, where a variable `CI` is set in full.
    command = (
        sys.executable, "-m", "pytest", "benchmarks", "-p", "tiny", "-q", "-rs",
        "--benchmark-only", "--benchmark-json", str(path), "-k", chosen,
    )  # fmt: skip
    # A worker of pytest-xdist tells its children so, and benchmarks refuse to time in one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    search = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("incorrect: logits") == 1
    assert done.stdout.count("incorrect: total") == 2
    assert "kernels are timed on a GPU only" in done.stdout
    found = json.loads(path.read_text())["benchmarks"]
    rows = {tuple(b["extra_info"][k] for k in ("op", "provider", "mode")) for b in found}
    modes = ("fwd", "step")
    assert rows == {
        *(("add_layer_norm", p, mode) for p in ("baseline", "reference") for mode in modes),
        *(("query_hub", p, mode) for p in ("baseline", "reference", "torch") for mode in modes),
    }
    for b in found:
        assert b["extra_info"]["status"] == "ok"
        assert b["extra_info"]["peak_mib"] > 0
        assert b["extra_info"]["budget"] <= 1
        assert b["stats"]["rounds"] == 3
    assert "add_layer_norm b0 s2 64x96 B1 M3 fp32 step" in {b["group"] for b in found}


NORM = Case(
    operations()["add_layer_norm"],
    Shape("b0", 2, 64, 64, 1, 2),
    "fp32",
    ("step", "bwd"),
    ("torch",),
)


def test_a_mode_that_fails_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    right = timing.call_in_mode

    def call_in_mode(forward: Any, leaves: Any, mode: str, *others: Any) -> Any:
        if mode == "bwd":
            raise RuntimeError("no backward twice, says /usr/lib/some/where/code.py")
        return right(forward, leaves, mode, *others)

    monkeypatch.setattr(timing, "call_in_mode", call_in_mode)
    step, bwd = Runner(Options()).run(NORM)
    assert step.status == "ok"
    assert step.p50_us > 0
    # Folders are those of a machine, and nobody else's business.
    assert (bwd.status, bwd.reason) == (
        "error",
        "RuntimeError: no backward twice, says code.py",
    )


def test_compiled_backwards_that_are_repeated_keep_what_they_need() -> None:
    for modes, donated in ((("step", "bwd"), False), (("fwd", "step"), True)):
        Runner(Options()).prepare(replace(NORM, modes=modes, providers=("compile",)))
        assert torch._functorch.config.donated_buffer is donated


def test_asking_whether_a_provider_is_there_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(importlib.import_module("benchmarks.measure.runner"), "unavailable", broken)
    assert {row.status for row in Runner(Options()).run(NORM)} == {"error"}

"""What runs leave behind: lines, a table, files of pytest-benchmark, and how they are read."""

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

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Shape
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import (
    MACHINE_INFO,
    UNTIMED,
    Record,
    Writer,
    read,
    read_environment,
    write_jsonl,
)
from benchmarks.measure.runner import Prepared, Runner

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape("b0", 1, 64, 96, batch=1, modalities=3)


def record(provider: str = "torch", **fields: Any) -> Record:
    row = Record("quick", "add_layer_norm", asdict(SHAPE), "fwd", provider, "fp32", p50_us=5.0, n=3)
    return replace(row, **fields)


def benchmark_json(path: Path, *rows: dict[str, Any]) -> Path:
    """A file as pytest-benchmark writes it, as far as it is read here."""
    entries = [{"name": f"test_case[{i}]", "extra_info": row} for i, row in enumerate(rows)]
    whole = {"machine_info": {MACHINE_INFO: {"device": "a chip"}}, "benchmarks": entries}
    path.write_text(json.dumps(whole, indent=4))
    return path


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


def test_three_kinds_of_results_are_read(tmp_path: Path) -> None:
    rows = [record(), record("baseline", peak_mib=1.5)]
    folder = tmp_path / "run"
    folder.mkdir()
    write_jsonl(rows, folder / "results.jsonl")
    (folder / "env.json").write_text('{"device": "a chip"}')
    by_pytest = benchmark_json(tmp_path / "timings.json", *map(asdict, rows))
    for path in (folder, folder / "results.jsonl", by_pytest):
        assert read(path) == rows
        assert read_environment(path) == {"device": "a chip"}
    (folder / "env.json").unlink()
    assert read_environment(folder) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1; got 2"),
        ({"schema": None}, "schema must be 1; got None"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"status": "fine"}, "status must be one of ok, unsupported"),
        ({"case": {"variant": "b0"}}, "case must have variant, stage, height"),
        ({"case": 7}, "case must be an object; got 7"),
        ({"case": asdict(SHAPE) | {"variant": "b9"}}, "variant must be one of nano, b0"),
        ({"case": asdict(SHAPE) | {"height": "64"}}, "height must be a positive integer; got '64'"),
        ({"p50_us": "fast"}, "p50_us must be a number or null; got 'fast'"),
        ({"p50_us": True}, "p50_us must be a number or null; got True"),
        ({"p50_us": float("nan")}, "p50_us must be finite and not negative; got nan"),
        ({"p80_us": float("inf")}, "p80_us must be finite and not negative; got inf"),
        ({"p20_us": -1.0}, "p20_us must be finite and not negative; got -1.0"),
        ({"min_us": 0}, "min_us must be positive; got 0"),
        ({"peak_mib": float("-inf")}, "peak_mib must be finite and not negative; got -inf"),
        ({"op": None}, "op must be a string; got None"),
        ({"dtype": ["fp32"]}, "dtype must be a string; got ['fp32']"),
        ({"n": 2.5}, "n must be an integer; got 2.5"),
        ({"noisy": 1}, "noisy must be true or false; got 1"),
        ({"status": 0}, "status must be a string; got 0"),
        ({"mode": ...}, "field 'mode' is missing"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = {k: v for k, v in (asdict(record()) | change).items() if v is not ...}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(record())) + "\n" + json.dumps(values) + "\n")
    with pytest.raises(ValueError, match="line 2: ") as error:
        read(tmp_path)
    assert message in str(error.value)
    assert f"{tmp_path.name}/results.jsonl" in str(error.value)

    path = benchmark_json(tmp_path / "timings.json", asdict(record()), values)
    with pytest.raises(ValueError, match=r"timings.json benchmark 2 \(test_case\[1\]\): ") as error:
        read(path)
    if "schema" not in message or "2" in message:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json\n", "results.jsonl line 1: not JSON"),
        ("[1, 2]\n", "results.jsonl line 1: must be an object; got list"),
        ('{"benchmarks": [{"name": "theirs", "extra_info": {}}]}', "extra_info has no record"),
        ('{"benchmarks": [{"name": "theirs"}]}', r"benchmark 1 \(theirs\): extra_info has no"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


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


# Of the model only one provider, which then has nobody before it to be compared with.
CHOSEN = "add_layer_norm or training or (model and torch)"


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmarks under pytest in their own process, tiny, add_layer_norm and model wrong."""
    (folder / "tiny.py").write_text(TINY)
    search = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Without "-rs" the summary repeats what failed, where a variable `CI` is set in full.
    command = (sys.executable, "-m", "pytest", "benchmarks", "-p", "tiny", "-q", "-rs", *arguments)
    # A worker of pytest-xdist tells its children so, and benchmarks refuse to time in one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_pytest_times_what_is_right_and_fails_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "timings.json"
    options = ("--benchmark-only", "--benchmark-json", str(path), "-k", CHOSEN)
    done = run_pytest(tmp_path, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("incorrect: logits") == 1
    assert done.stdout.count("incorrect: total") == 2
    assert "kernels are timed on a GPU only" in done.stdout
    rows = {(row.op, row.provider, row.mode): row for row in read(path)}
    trusted = {"baseline", "reference"}
    assert rows.keys() == {
        *(("add_layer_norm", provider, mode) for provider in trusted for mode in ("fwd", "step")),
        *(("training", provider, "step") for provider in {*trusted, "torch"}),
        *(("block_training", provider, "step") for provider in {*trusted, "torch"}),
    }
    for row in rows.values():
        assert (row.status, row.method, row.n, row.suite) == ("ok", "wall", 3, "quick")
        assert 0 < row.min_us <= row.p20_us <= row.p50_us <= row.p80_us
        assert row.peak_mib > 0
        assert row.budget <= 1
    groups = {b["group"] for b in json.loads(path.read_text())["benchmarks"]}
    assert "add_layer_norm b0 s2 64x96 B1 M3 fp32 step" in groups
    env = read_environment(path)
    assert {row.env_id for row in rows.values()} == {env["env_id"]}
    assert "node" not in json.loads(path.read_text())["machine_info"]


def test_pytest_without_timing_is_a_smoke_test(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = run_pytest(tmp_path, "--benchmark-disable", "-k", "guided_gate or query_hub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed, 4 skipped" in done.stdout
    done = run_pytest(tmp_path, "--benchmark-disable", "--bench-suite", "slow")
    assert "invalid choice: 'slow'" in done.stderr


@pytest.mark.parametrize(("method", "number"), [("graph", 8), ("events", 1)])
def test_on_a_gpu_rounds_are_replays_and_records_are_events(
    method: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what only a GPU has: events, graphs and the wait for them."""
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_bench_suite

    happened: list[str] = []
    events = timing.Timing(4.0, 5.0, 6.0, 3.0, 20, method)
    monkeypatch.setattr(
        Runner, "_measure", lambda self, calls, *_: {method: dict.fromkeys(calls, events)}
    )
    monkeypatch.setattr(timing, "captured", lambda sets: (lambda: happened.append("replay"), 8))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))

    class Benchmark:
        group = "a case"

        def pedantic(self, call: Any, rounds: int) -> None:
            happened.clear()
            call()
            assert rounds >= 2

    declared = operations()["guided_gate"]
    case = Case(declared, replace(SHAPE, stage=2), "fp32", ("fwd",), ("reference", "torch"))
    prepared = Runner(Options()).prepare(case)
    prepared.check("torch")
    benchmark = Benchmark()
    single = [lambda: happened.append("call")]
    test_bench_suite._on_gpu(benchmark, prepared, "torch", "fwd", single)
    assert happened == ["replay" if method == "graph" else "call", "wait"]
    assert benchmark.group == ("a case, 8 calls a round" if number > 1 else "a case")
    row = prepared.record("torch", "fwd")
    assert (row.p20_us, row.p50_us, row.p80_us, row.n, row.method) == (4.0, 5.0, 6.0, 20, method)
    assert row.status == "ok"
    assert row.gbps > 0


def test_what_fails_before_it_is_timed_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_bench_suite

    def calls(self: Prepared, mode: str, providers: list[str]) -> dict[str, Any]:
        self.fail(providers, RuntimeError("no such kernel image"))
        return {}

    monkeypatch.setattr(Prepared, "calls", calls)
    case = Case(operations()["guided_gate"], replace(SHAPE, stage=2), "fp32", ("fwd",), ("torch",))
    prepared = Runner(Options()).prepare(case)
    with pytest.raises(pytest.fail.Exception, match="error: RuntimeError: no such kernel image"):
        test_bench_suite.test_case(None, prepared, "fwd", "torch", "")


def test_a_case_that_nobody_can_do_is_skipped() -> None:
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_bench_suite

    alone = replace(SHAPE, modalities=1)
    case = Case(operations()["query_hub"], alone, "fp32", ("fwd",), ("torch",))
    prepared = Runner(Options()).prepare(case)
    with pytest.raises(pytest.skip.Exception, match="two modalities or more"):
        test_bench_suite.test_case(None, prepared, "fwd", "torch", "")


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
        runner = Runner(Options())
        runner.prepare(replace(NORM, modes=modes, providers=("compile",)))
        assert torch._functorch.config.donated_buffer is donated


def test_asking_whether_a_provider_is_there_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(importlib.import_module("benchmarks.measure.runner"), "unavailable", broken)
    assert {row.status for row in Runner(Options()).run(NORM)} == {"error"}


def test_limits_of_an_earlier_calibration(tmp_path: Path) -> None:
    limits = {"bandwidth": 1e9, "peak": {"fp32": 2e9}, "exps": 3e9}
    (tmp_path / "calibration.json").write_text(json.dumps({"limits": limits}))
    run = [
        "run",
        "--op",
        "add_layer_norm",
        "--provider",
        "torch",
        "--mode",
        "fwd",
        "--device",
        "cpu",
    ]
    for found, same in ((tmp_path, True), (tmp_path / "none.json", False)):
        out = tmp_path / f"out-{same}"
        assert main([*run, "--calibration", str(found), "--out", str(out)]) == 0
        env = json.loads((out / "env.json").read_text())
        assert (env["limits"] == limits) is same

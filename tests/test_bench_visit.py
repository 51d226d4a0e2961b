"""A visit to a GPU machine: time limits hold, nothing done is lost, a second call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.record import Record, read, write_jsonl
from benchmarks.measure.resume import AGAIN
from benchmarks.visiting import orphans, summary, tasks, visit
from benchmarks.visiting.outcomes import Outcomes
from benchmarks.visiting.tasks import Task
from benchmarks.visiting.visit import LOG_BYTES, USABLE, State, pack, share

from .processes import alive, gone, started

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def shell(name: str, script: str, seconds: float = 2.0, **options: Any) -> Task:
    return Task(name, ("bash", "-c", script), seconds, **options)


def carried_out(folder: Path, *plan: list[Task], seconds: float = 20.0) -> State:
    """The tasks of each list at once, one list after the other; scripts run in the folder."""
    state = State(folder / "visit.json")
    moved = [
        [replace(t, command=(*t.command[:2], f"cd {folder}; {t.command[2]}")) for t in together]
        for together in plan
    ]
    visit.carry_out(moved, state, folder, time.monotonic() + seconds)
    return State(folder / "visit.json")


# ---- time limits --------------------------------------------------------------------------------


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; sleep 300 & echo $! > child; echo partial; wait; sleep 300"
    started = time.monotonic()
    plan = [shell("slow", stubborn, 1.0)], [shell("next", "echo fine")]
    state = carried_out(tmp_path, *plan, seconds=9.0)
    assert time.monotonic() - started < 20
    assert state.tasks["slow"]["state"] == "cut off"
    assert 3 < state.tasks["slow"]["seconds"] < 10
    assert (tmp_path / "logs/slow.log").read_text() == "partial\n"
    assert not alive(int((tmp_path / "child").read_text()))
    assert state.tasks["next"] | {"seconds": 0, "started": ""} == {
        "state": "done", "rc": 0, "attempts": 1, "seconds": 0, "started": "",
    }  # fmt: skip


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    count = "echo x >> {0}; echo {0} $(wc -l < {0})".format
    slow = shell("slow", count("slow") + "; [ $(wc -l < slow) = 2 ] || sleep 300")
    plan = (
        [shell("first", count("first"))], [shell("fails", count("fails") + "; exit 3")], [slow],
        [shell("never", "true", impossible="no tool")],
    )  # fmt: skip
    state = carried_out(tmp_path, *plan, seconds=5.0)
    states = {name: (values["state"], values.get("rc")) for name, values in state.tasks.items()}
    assert states["first"] == ("done", 0)
    assert states["fails"] == ("done", 3)
    assert states["slow"][0] == "cut off"
    assert states["never"] == ("not possible", None)
    state = carried_out(tmp_path, *plan)
    assert state.tasks["slow"]["state"] == "done"
    assert (tmp_path / "logs/slow.log").read_text() == "slow 2\n"
    # What had ended was not run again, not even what had failed.
    lines = {name: (tmp_path / name).read_text().count("x") for name in ("first", "fails", "slow")}
    assert lines == {"first": 1, "fails": 1, "slow": 2}


def test_what_was_running_when_everything_was_killed_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "visit.json").write_text(
        json.dumps({"tasks": {"task": {"state": "running", "attempts": 1}}})
    )
    state = carried_out(tmp_path, [shell("task", "echo again")])
    assert (state.tasks["task"]["state"], state.tasks["task"]["attempts"]) == ("done", 2)


VISIT = """
import sys, time
from pathlib import Path
from benchmarks.visiting import orphans
from benchmarks.visiting.tasks import Task
from benchmarks.visiting.visit import State, carry_out
folder = Path(sys.argv[1])
script = f"cd {folder}; setsid sleep 300 & echo $! > child; echo $$ > leader; wait"
task = Task("t", ("bash", "-c", script), 1.0)
with orphans.ended_with_this_process(str(folder)):
    carry_out([[task]], State(folder / "visit.json"), folder, time.monotonic() + 99)
"""


def test_a_visit_that_is_killed_takes_along_what_it_has_started(tmp_path: Path) -> None:
    """Also what has left its session, and what runs on when its own parent has ended."""
    visit = subprocess.Popen((sys.executable, "-c", VISIT, str(tmp_path)), cwd=ROOT)
    pids = [started(tmp_path / name) for name in ("child", "leader")]
    visit.kill()
    visit.wait()
    assert all(map(gone, pids))
    assert State(tmp_path / "visit.json").tasks["t"]["state"] == "cut off"


def test_the_next_visit_ends_what_is_left_and_no_stranger(tmp_path: Path) -> None:
    env = {**os.environ, orphans.MARK: str(tmp_path)}
    script = f"sleep 300 & echo $! > {tmp_path}/child; exit"
    subprocess.run(("bash", "-c", script), env=env, start_new_session=True, check=True)
    stranger = subprocess.Popen(("sleep", "300"), env={**env, orphans.MARK: f"{tmp_path}/other"})
    try:
        child = started(tmp_path / "child")
        assert orphans.end(str(tmp_path)) == 1
        assert gone(child)
        assert stranger.poll() is None
        assert orphans.end(str(tmp_path)) == 0
    finally:
        stranger.kill()
        stranger.wait()


def test_what_can_bring_nothing_leaves_its_time_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    script = "echo Error: Device not supported.; sleep 300"
    refused = shell("refused", script, 60.0, hopeless="not supp")
    started = time.monotonic()
    state = State(tmp_path / "visit.json")
    plan = [[refused], [shell("next", "true")]]
    visit.carry_out(plan, state, tmp_path, started + 60, said=said.append)
    assert time.monotonic() - started < 20
    assert state.tasks["refused"]["state"] == "hopeless"
    assert state.tasks["next"]["state"] == "done"
    assert "refused: Error: Device not supported." in said
    assert State(tmp_path / "visit.json").over(refused)


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    state = carried_out(tmp_path, [shell("task", "touch ran")], seconds=1.0)
    assert state.tasks["task"]["state"] == "not started"
    assert not (tmp_path / "ran").exists()


def test_what_comes_first_has_its_time_even_if_there_is_little() -> None:
    plan = [[shell("a", "", 10.0), shell("b", "", 5.0)], [shell("c", "", 30.0)]]
    found = [share(plan, seconds) for seconds in (80.0, 40.0, 20.0, 5.0)]
    assert found == [20.0, 10.0, 10.0, 5.0]


def test_a_task_that_ends_early_leaves_its_time(tmp_path: Path) -> None:
    plan = [shell("quick", "echo {minutes}", 9.0)], [shell("last", "echo {minutes}", 1.0)]
    carried_out(tmp_path, *plan, seconds=60.0)
    quick, last = (float((tmp_path / f"logs/{n}.log").read_text()) for n in ("quick", "last"))
    assert quick == pytest.approx(0.9 * USABLE, rel=0.02)
    assert 0.9 * USABLE < last <= USABLE


def test_tasks_at_once(tmp_path: Path) -> None:
    # Each waits for the file of the other.
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.05; done".format
    state = carried_out(tmp_path, [shell("a", meet("x", "y")), shell("b", meet("y", "x"))])
    assert {values["state"] for values in state.tasks.values()} == {"done"}


@pytest.mark.parametrize("end", [f"exit {AGAIN}", "kill -9 $$"])
def test_what_wants_to_be_started_again_is(tmp_path: Path, end: str) -> None:
    script = f"echo x >> count; [ $(wc -l < count) = 3 ] || {end}"
    once = shell("once", script.replace("count", "other"), restarts=1)
    state = carried_out(tmp_path, [shell("task", script, restarts=5), once])
    assert (state.tasks["task"]["state"], state.tasks["task"]["rc"]) == ("done", 0)
    assert state.tasks["once"]["rc"] in (AGAIN, -9)
    # It has not finished: a second visit goes on there.
    assert state.tasks["once"]["state"] == "cut off"
    assert (tmp_path / "other").read_text().count("x") == 2


def test_variables_are_set_and_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWANTED", "1")
    task = shell("task", "echo $WANTED-$UNWANTED", variables={"WANTED": "2", "UNWANTED": None})
    carried_out(tmp_path, [task])
    assert (tmp_path / "logs/task.log").read_text() == "2-\n"


# ---- outcomes of tests --------------------------------------------------------------------------

TESTS = """
import os, pathlib, pytest
def test_passes(): pass
def test_dies():
    if not pathlib.Path("died").exists():
        pathlib.Path("died").touch()
        os._exit(9)
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.fixture
def broken(): raise KeyError("fixture")
def test_of_broken_fixture(broken): pass
"""
STICKY = """
import os, pathlib
def note():
    with pathlib.Path("processes").open("a") as file:
        file.write(f"{os.getpid()}\\n")
def test_error():
    note()
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
def test_after(): note()
"""


def counts(found: Outcomes) -> dict[str, int]:
    return dict(Counter(line["outcome"] for line in found.ended.values()))


def pytest_with_outcomes(folder: Path, source: str, *options: str) -> int:
    (folder / "test_some.py").write_text(source)
    command = (
        sys.executable, "-m", "pytest", "-p", "benchmarks.visiting.outcomes",
        "--outcomes", "out.jsonl", "-p", "no:cacheprovider",
        "--rootdir", str(folder), *options, "test_some.py",
    )  # fmt: skip
    # A worker of pytest-xdist tells its children so.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    # Of PyTorch it needs to know that there is no GPU; the real one takes seconds to import.
    (folder / "torch.py").write_text("class cuda:\n    is_available = lambda: False\n")
    path = os.pathsep.join((str(folder), str(ROOT)))
    env = {**clean, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode


def test_outcomes_survive_a_death_and_are_not_asked_for_twice(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, TESTS) == 9
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert (counts(found), found.started) == ({"passed": 1}, ["test_some.py::test_dies"])
    assert found.device == "the CPU, interpreted"

    assert pytest_with_outcomes(tmp_path, TESTS) == 1
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert counts(found) == {"passed": 2, "failed": 2, "skipped": 1}
    assert found.started == []
    # What was under way when it died came last.
    assert list(found.ended)[-1] == "test_some.py::test_dies"
    reasons = {test.split("::")[1]: line["reason"] for test, line in found.ended.items()}
    assert reasons["test_skipped"] == "not today"
    assert "one is not two" in reasons["test_fails"]
    assert "fixture" in reasons["test_of_broken_fixture"]

    length = len((tmp_path / "out.jsonl").read_text().splitlines())
    assert pytest_with_outcomes(tmp_path, TESTS) == 1  # no test is left, and some had failed
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == length + 1


ORDERED = """
class TestExport:
    def test_export(self): pass
class TestOther:
    def test_b(self): pass
class TestParity:
    def test_a(self): pass
"""


def test_parity_first_and_nothing_left_is_no_failure(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, ORDERED) == 0
    names = [test.split("::")[-1] for test in Outcomes.read(tmp_path / "out.jsonl").ended]
    assert names == ["test_a", "test_b", "test_export"]
    # Finished by whoever went on when the visit was killed.
    pytest.importorskip("xdist")
    for options in ((), ("-p", "xdist", "-n", "1", "--dist", "load")):
        assert pytest_with_outcomes(tmp_path, ORDERED, *options) == 0


def test_outcomes_of_several_processes(tmp_path: Path) -> None:
    """A process that dies takes its test along and nothing else; what ended is chosen by nobody."""
    pytest.importorskip("xdist")
    options = ("-p", "xdist", "-n", "2", "--dist", "load")
    assert pytest_with_outcomes(tmp_path, TESTS, *options) == 1
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert counts(found) == {"passed": 1, "failed": 3, "skipped": 1}
    died = next(line for test, line in found.ended.items() if "test_dies" in test)
    assert "crashed" in died["reason"]
    assert pytest_with_outcomes(tmp_path, TESTS, *options) == 1
    assert Outcomes.read(tmp_path / "out.jsonl").ended == found.ended


def test_an_error_of_the_device_starts_a_new_process(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, STICKY) == AGAIN
    assert list(Outcomes.read(tmp_path / "out.jsonl").ended) == ["test_some.py::test_error"]
    assert pytest_with_outcomes(tmp_path, STICKY) == 1  # what is left passes, what has failed stays
    assert counts(Outcomes.read(tmp_path / "out.jsonl")) == {"failed": 1, "passed": 1}


def test_an_error_of_the_device_ends_one_of_several_processes(tmp_path: Path) -> None:
    """Nobody is blamed but the test that had it, and the others go on."""
    pytest.importorskip("xdist")
    options = ("-p", "xdist", "-n", "1", "--dist", "load")
    assert pytest_with_outcomes(tmp_path, STICKY, *options) == 1
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert counts(found) == {"failed": 1, "passed": 1}
    assert "illegal memory access" in found.ended["test_some.py::test_error"]["reason"]
    assert len({*(tmp_path / "processes").read_text().split()}) == 2


def test_half_a_line_is_no_outcome(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"test": "a"}\n{"test": "a", "outcome": "pas')
    found = Outcomes.read(path)
    assert (found.started, dict(found.ended)) == (["a"], {})


# ---- kernels on small shapes --------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
def test_exercise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["exercise", "--op", "guided_gate", "--dtype", "fp32", "--device", "cpu"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "guided_gate b0 s1 96x68 B1 M3 fp32" in out
    assert "exercised guided_gate: 0 wrong" in out

    right = operations()["guided_gate"]

    def build(*given: object) -> Problem:
        problem = right.build(*given)
        call = problem.calls["triton"]
        problem.calls["triton"] = lambda: tuple(
            torch.where(x == x.max(), float("nan"), x) for x in call()
        )
        return problem

    monkeypatch.setitem(operations(), "guided_gate", replace(right, build=build))
    assert main(arguments) == 1
    assert "wrong: guided_gate b0 s4 96x96 B2 M2 fp32: not finite" in capsys.readouterr().out

    def fails(*given: object) -> Problem:
        raise RuntimeError("no such kernel image\nin some/file")

    monkeypatch.setitem(operations(), "guided_gate", replace(right, build=fails))
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "wrong: guided_gate b0 s1 96x68 B1 M3 fp32: RuntimeError: no such kernel image" in out
    assert "exercised guided_gate: 2 wrong" in out


def test_exercise_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cuda", "--op", "add_layer_norm", "--dtype", "bf16", "--dry-run"]
    assert main(["exercise", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "add_layer_norm b0 s1 96x68 B1 M3 bf16", "add_layer_norm b0 s4 96x96 B2 M2 bf16",
        "nothing was run",
    ]  # fmt: skip


def test_exercise_needs_kernels_that_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from equiseg_fast.ops import _backend

    with pytest.raises(SystemExit):
        main(["exercise", "--device", "cpu", "--op", "model"])
    assert "--op must be among attention" in capsys.readouterr().err
    monkeypatch.setattr(_backend, "INTERPRET", False)
    with pytest.raises(SystemExit):
        main(["exercise", "--device", "cpu"])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


# ---- the visit ----------------------------------------------------------------------------------


def plan_of(folder: Path, device: torch.device = CUDA) -> dict[str, Task]:
    planned = tasks.tasks(folder, device, folder / "triton-cache")
    return {task.name: task for together in planned for task in together}


H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=79 * 2**30)


def option(task: Task, name: str) -> str:
    words = task.command[3:]  # behind python -m and a module
    return words[words.index(name) + 1]


def test_plan_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.shutil, "which", lambda name, path="": f"/opt/{name}")
    planned = plan_of(tmp_path)
    assert list(dict.fromkeys(name.split("/")[0] for name in planned)) == [
        "prepare", "kernels", "host", "headline", "parity", "operations", "memcheck", "compilers",
        "report", "tune",
    ]  # fmt: skip
    groups = tasks.tasks(tmp_path, CUDA, tmp_path)
    assert sum(max(task.seconds for task in together) for together in groups) <= 9 * 60
    with_kernels = [op.name for op in operations().values() if op.function]
    assert {f"kernels/{name}" for name in with_kernels} == {
        n for n in planned if n[:8] == "kernels/"
    }
    tests, large, workflows = (planned[f"parity/{n}"] for n in ("kernels", "large", "workflows"))
    for name in with_kernels:
        assert f"tests/test_{name}.py" in tests.command
        assert (ROOT / "tests" / f"test_{name}.py").is_file()
    # The interpreter would prove nothing about compiled kernels.
    assert {t.variables["TRITON_INTERPRET"] for t in (tests, large, workflows)} == {None}
    assert (option(tests, "-m"), option(large, "-m")) == ("not large_memory", "large_memory")
    gpu_only = {p.name for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text()}
    gpu_only -= {Path(__file__).name}
    assert {Path(w).name for w in workflows.command if w.startswith("tests/")} == gpu_only
    timed = planned["headline"], planned["operations"]
    ops = [op for task in timed for op in option(task, "--op").split(",")]
    assert ops[0] == "training"
    assert {*ops} == {case.op.name for case in plan(Options(suite="core"))}
    assert len(ops) == len({*ops})
    quick = option(timed[1], "--provider").split(",")
    assert not {"compile", "flex", "tuned"} & {*quick}
    assert {"baseline", "sdpa_flash", "sdpa_cudnn", "triton"} <= {*quick}
    assert {"compile", "flex"} <= {*option(planned["compilers"], "--provider").split(",")}
    for check in ("memcheck", "racecheck"):
        task = planned[f"memcheck/{check}"]
        assert task.command[0] == "/opt/compute-sanitizer"
        assert task.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    monkeypatch.setattr(tasks.shutil, "which", lambda name, path="": None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    missing = plan_of(tmp_path)["memcheck/memcheck"].impossible
    assert missing == "compute-sanitizer is not on the PATH"


def test_marked_are_the_tests_that_need_much_memory() -> None:
    """Those that allocate gigabytes at once are not run beside others on a GPU."""
    for path in {*ROOT.glob("tests/test_*.py")} - {Path(__file__)}:
        text = path.read_text()
        marks = text.count("@pytest.mark.large_memory\n")
        assert text.count("    def test_strides_beyond") == marks, path.name


@pytest.mark.parametrize("device", [CUDA, CPU])
def test_every_planned_command_is_understood(
    tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as it can be asked without a GPU."""
    asked = set()
    planned = plan_of(tmp_path, device)
    for task in planned.values():
        words = list(task.command[task.command.index("-m") + 2 :] if "-m" in task.command else ())
        if "benchmarks" not in task.command or words[0] in ("env", "report"):
            continue
        words = [word.replace("{minutes}", "1") for word in words]
        assert main([*words, "--dry-run"]) == 0
        assert "nothing was run" in capsys.readouterr().out or words[0] in ("dry", "host")
        asked.add(words[0])
    assert asked == {"run", "exercise", "calibrate", "dry", "host", "tune"}
    # The search is rehearsed in the interpreter.
    interpret = None if device == CUDA else "1"
    assert planned["tune"].variables["TRITON_INTERPRET"] == interpret


def test_nothing_that_is_written_down_ends_a_visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such column")

    monkeypatch.setattr(visit, "tasks", lambda *_: [[shell("fine", "echo done")]])
    monkeypatch.setattr(visit, "write_summary", broken)
    out = ("--out", str(tmp_path / "v"), "--archive", str(tmp_path / "a.tar.gz"))
    assert main(["visit", "--device", "cpu", *out]) == 0
    assert "no summary: ValueError: no such column" in capsys.readouterr().out
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert "visit/logs/fine.log" in tar.getnames()


def test_archive(tmp_path: Path) -> None:
    folder, archive = tmp_path / "visit", tmp_path / "home" / "visit.tar.gz"
    for name, text in (
        ("summary.md", "# Visit"), ("a/results.jsonl", "{}"),
        ("logs/a.log", "x" * LOG_BYTES + "end"), ("triton-cache/k.cubin", "binary"),
        ("visit.json", "{}"),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    pack(folder, archive)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [
            "visit/summary.md", "visit/a/results.jsonl", "visit/logs/a.log", "visit/visit.json",
        ]  # fmt: skip
        log = tar.extractfile("visit/logs/a.log").read()
    assert (len(log), log[-4:]) == (LOG_BYTES, b"xend")
    assert [path.name for path in archive.parent.iterdir()] == ["visit.tar.gz"]


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none"
    assert main(["visit", "--dry-run", "--device", "cuda", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "env -u EQUISEG_FAST_BACKEND -u TRITON_INTERPRET python -m pytest" in text
    assert "memcheck/memcheck: " in text
    assert not out.exists()


@pytest.mark.long
def test_rehearsal_cut_off_and_continued(tmp_path: Path) -> None:
    folder, archive = tmp_path / "visit", tmp_path / "home.tar.gz"

    def rehearse(minutes: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
        command = (
            sys.executable, "-m", "benchmarks", "visit", "--device", "cpu", "--minutes", minutes,
            "--out", str(folder), "--archive", str(archive),
        )  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done, json.loads((folder / "visit.json").read_text())["tasks"]

    started = time.monotonic()
    done, tasks = rehearse("0.2")
    assert time.monotonic() - started < 40
    # Nothing came of most steps, which is no rehearsal.
    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not fit" in done.stdout
    assert "brought nothing: " in done.stdout
    before = {name for name, values in tasks.items() if values["state"] == "done"}
    assert "report" not in before

    done, tasks = rehearse("9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {v["state"] for v in tasks.values()} <= {"done", "not possible"}
    assert all(tasks[name]["attempts"] == 1 for name in before)
    assert {row.op for row in read(folder / "headline")} == {"training", "model", "encoder"}
    assert {row.op for row in read(folder / "operations")} == {"guided_gate", "query_hub"}
    assert (folder / "results" / "report.md").is_file()
    with tarfile.open(archive) as tar:
        text = tar.extractfile("visit/summary.md").read().decode()
    assert text == (folder / "summary.md").read_text()
    assert "10 passed, 0 failed, 0 skipped on the CPU, interpreted" in text
    assert "exercised guided_gate: 0 wrong" in text
    assert "| training step b0 64x96 B1 M2 fp32 | torch |" in text
    assert "Predicted and measured" in text
    assert str(tmp_path) not in text

    started = time.monotonic()
    done, again = rehearse("9")
    assert time.monotonic() - started < 30
    assert again == tasks


def test_a_failed_command_is_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(visit, "tasks", lambda *_: [[shell("wrong", "echo [broken]; exit 4")]])
    assert main(["visit", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "[broken]" in capsys.readouterr().out
    assert "| wrong | failed | 4 |" in (tmp_path / "summary.md").read_text()


def test_terminated_it_takes_its_commands_along(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from benchmarks.visiting import visit\n"
        "from benchmarks.__main__ import main\n"
        "from benchmarks.visiting.tasks import Task\n"
        "task = Task('t', ('bash', '-c', 'echo $$ > pid; sleep 300'), 1.0)\n"
        "visit.ROOT = Path(sys.argv[1])\n"
        "visit.tasks = lambda *_: [[task]]\n"
        "sys.exit(main(['visit', '--device', 'cpu', '--out', sys.argv[1]]))\n"
    )
    command = (sys.executable, "-c", script, str(tmp_path))
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = started(tmp_path / "pid")
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 130
    assert not alive(pid)
    assert State(tmp_path / "visit.json").tasks["t"]["state"] == "cut off"


# ---- without what a GPU machine may lack --------------------------------------------------------

MISSING = (
    "hypothesis", "pytest_benchmark", "pytest_timeout", "safetensors", "scipy", "skimage",
    "transformers", "build",
)  # fmt: skip


def without_optional_packages(folder: Path, *words: str, status: int = 0) -> str:
    """Standard output of python with these words, in which importing any of MISSING fails."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n"
    )
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # From the repository root, nothing installed: only the blocker is on the path.
    env["PYTHONPATH"] = str(folder)
    command = (sys.executable, *words)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_all_parity_tests_are_found_without_optional_packages(tmp_path: Path) -> None:
    files = [f"tests/test_{stem}.py" for stem in (*tasks.HOTTEST, *tasks.GPU_ONLY)]
    out = without_optional_packages(tmp_path, "-m", "pytest", "--collect-only", "-q", *files)
    assert int(out.strip().splitlines()[-1].split()[0]) > 1000
    out = without_optional_packages(
        tmp_path, "-m", "pytest", "-q", "tests/test_guided_gate.py", "-k", "test_rho"
    )
    assert " passed" in out


def test_benchmarks_run_without_optional_packages(tmp_path: Path) -> None:
    run = ("-m", "benchmarks", "run", "--device", "cpu", "--op", "guided_gate", "--mode", "fwd")
    out = without_optional_packages(tmp_path, *run, "--threads", "1", "--out", str(tmp_path / "r"))
    assert {row.status for row in read(tmp_path / "r")} == {"ok", "unsupported"}
    arguments = ("-m", "benchmarks", "visit", "--device", "cpu", "--minutes", "0.01")
    out = without_optional_packages(tmp_path, *arguments, "--out", str(tmp_path / "v"), status=1)
    assert "without transformers: no provider transformers" in out


def test_a_measurement_is_not_lost_to_a_later_failure(tmp_path: Path) -> None:
    case = asdict(Shape("b0", 1, 64, 64))
    good = Record("core", "add_layer_norm", case, "fwd", "torch", "fp32", p50_us=2.0)
    bad = replace(good, status="oom", p50_us=None)
    other = replace(good, provider="baseline")
    found = {"headline": [bad], "operations": [good, other], "compilers": [bad]}
    for name, rows in found.items():
        (tmp_path / name).mkdir()
        write_jsonl(rows, tmp_path / name / "results.jsonl")
        (tmp_path / name / "env.json").write_text("{}")
    assert summary.merge(tmp_path) == [good, other]
    assert read(tmp_path / "results") == [good, other]


def test_commands_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

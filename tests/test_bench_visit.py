"""A visit to a GPU machine: time limits hold, nothing done is lost, a second call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.record import Record, read_jsonl, write_jsonl
from benchmarks.measure.resume import AGAIN
from benchmarks.visiting import orphans, steps, summary, visit
from benchmarks.visiting.archive import LOG_BYTES, pack
from benchmarks.visiting.budget import USABLE, State, Step, Task, Visit, share
from benchmarks.visiting.outcomes import Outcomes
from benchmarks.visiting.simulate import simulate

from .processes import alive, gone, started

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def shell(name: str, script: str, **options: object) -> Task:
    return Task(name, ("bash", "-c", script), f"logs/{name}.log", **options)


def carry_out(folder: Path, steps: list[Step], seconds: float = 20.0) -> State:
    state = State(folder / "visit.json")
    Visit(steps, state, folder, folder, time.monotonic() + seconds).run()
    return State(folder / "visit.json")


# ---- time limits --------------------------------------------------------------------------------


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; sleep 300 & echo $! > child; echo partial; wait; sleep 300"
    steps = [
        Step("slow", "", 1.0, (shell("slow", stubborn),)),
        Step("next", "", 1.0, (shell("next", "echo fine"),)),
    ]
    started = time.monotonic()
    state = carry_out(tmp_path, steps, seconds=14.0)
    assert time.monotonic() - started < 25
    assert state.tasks["slow"]["state"] == "cut off"
    assert 6 < state.tasks["slow"]["seconds"] < 13
    assert (tmp_path / "logs/slow.log").read_text() == "partial\n"
    assert not alive(int((tmp_path / "child").read_text()))
    assert state.tasks["next"] | {"seconds": 0, "started": ""} == {
        "state": "done", "rc": 0, "attempts": 1, "seconds": 0, "started": "",
    }  # fmt: skip


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    count = "echo x >> {0}; echo {0} $(wc -l < {0})".format
    tasks = (
        shell("first", count("first")),
        shell("fails", count("fails") + "; exit 3"),
        shell("slow", count("slow") + "; [ $(wc -l < slow) = 2 ] || sleep 300"),
    )
    steps = [Step("all", "", 1.0, tasks), Step("never", "", 1.0, tasks[:1], impossible="no tool")]
    state = carry_out(tmp_path, steps, seconds=4.0)
    states = {name: (values["state"], values["rc"]) for name, values in state.tasks.items()}
    assert states["first"] == ("done", 0)
    assert states["fails"] == ("done", 3)
    assert states["slow"][0] == "cut off"
    state = carry_out(tmp_path, steps)
    assert state.tasks["slow"]["state"] == "done"
    assert (tmp_path / "logs/slow.log").read_text() == "slow 2\n"
    # What had ended was not run again, not even what had failed.
    lines = {name: (tmp_path / name).read_text().count("x") for name in ("first", "fails", "slow")}
    assert lines == {"first": 1, "fails": 1, "slow": 2}


def test_what_was_running_when_everything_was_killed_is_run_again(tmp_path: Path) -> None:
    task = shell("task", "echo again")
    (tmp_path / "visit.json").write_text(
        json.dumps({"tasks": {"task": {"state": "running", "attempts": 1}}})
    )
    state = carry_out(tmp_path, [Step("step", "", 1.0, (task,))])
    assert (state.tasks["task"]["state"], state.tasks["task"]["attempts"]) == ("done", 2)


VISIT = """
import sys, time
from pathlib import Path
from benchmarks.visiting import orphans
from benchmarks.visiting.budget import State, Step, Task, Visit
folder = Path(sys.argv[1])
script = "setsid sleep 300 & echo $! > child; echo $$ > leader; wait"
step = Step("t", "", 1.0, (Task("t", ("bash", "-c", script), "t.log"),))
with orphans.ended_with_this_process(str(folder)):
    Visit((step,), State(folder / "visit.json"), folder, folder, time.monotonic() + 99).run()
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
    refused = shell("refused", "echo Error: Device not supported.; sleep 300", hopeless="not supp")
    step = Step("refused", "", 60.0, (refused,))
    after = Step("next", "", 1.0, (shell("next", "true"),))
    started = time.monotonic()
    state = State(tmp_path / "visit.json")
    Visit([step, after], state, tmp_path, tmp_path, started + 60, progress=said.append).run()
    assert time.monotonic() - started < 20
    assert state.tasks["refused"]["state"] == "hopeless"
    assert state.tasks["next"]["state"] == "done"
    assert "refused: Error: Device not supported." in said
    assert State(tmp_path / "visit.json").over(refused)


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    state = carry_out(tmp_path, [Step("step", "", 1.0, (shell("task", "touch ran"),))], seconds=1.0)
    assert state.tasks["task"]["state"] == "not started"
    assert not (tmp_path / "ran").exists()


def test_what_comes_first_has_its_time_even_if_there_is_little() -> None:
    steps = [Step(name, "", seconds, ()) for name, seconds in (("a", 10.0), ("b", 30.0))]
    assert share(steps, 80.0) == 20.0
    assert share(steps, 40.0) == 10.0
    assert share(steps, 20.0) == 10.0
    assert share(steps, 5.0) == 5.0


def test_tasks_share_by_weight(tmp_path: Path) -> None:
    tasks = tuple(shell(n, "echo {minutes}", weight=w) for n, w in (("long", 9.0), ("short", 1.0)))
    carry_out(tmp_path, [Step("step", "", 1.0, tasks)], seconds=1000.0)
    told = [60 * float((tmp_path / f"logs/{n}.log").read_text()) for n in ("long", "short")]
    assert told[0] == pytest.approx(0.9 * 1000 * USABLE, rel=0.01)
    assert told[1] == pytest.approx(1000 * USABLE, rel=0.01)  # the first left all of its time


def test_a_step_that_ends_early_leaves_its_time(tmp_path: Path) -> None:
    quick = Step("quick", "", 9.0, (shell("quick", "true"),))
    last = Step("last", "", 1.0, (shell("last", "echo {minutes}"),))
    carry_out(tmp_path, [quick, last], seconds=60.0)
    told = float((tmp_path / "logs/last.log").read_text())
    assert 0.9 * USABLE < told <= USABLE


def test_tasks_of_a_step_at_once(tmp_path: Path) -> None:
    # Each waits for the file of the other.
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.05; done".format
    tasks = (shell("a", meet("x", "y")), shell("b", meet("y", "x")))
    state = carry_out(tmp_path, [Step("both", "", 1.0, tasks, at_once=2)])
    assert {values["state"] for values in state.tasks.values()} == {"done"}


@pytest.mark.parametrize("end", [f"exit {AGAIN}", "kill -9 $$"])
def test_what_wants_to_be_started_again_is(tmp_path: Path, end: str) -> None:
    script = f"echo x >> count; [ $(wc -l < count) = 3 ] || {end}"
    state = carry_out(tmp_path, [Step("s", "", 1.0, (shell("task", script, restarts=5),))])
    assert (state.tasks["task"]["state"], state.tasks["task"]["rc"]) == ("done", 0)
    script = script.replace("count", "other")
    state = carry_out(tmp_path, [Step("s", "", 1.0, (shell("once", script, restarts=1),))])
    assert state.tasks["once"]["rc"] in (AGAIN, -9)
    # It has not finished: a second visit goes on there.
    assert state.tasks["once"]["state"] == "cut off"
    assert (tmp_path / "other").read_text().count("x") == 2


def test_variables_are_set_and_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWANTED", "1")
    task = shell("task", "echo $WANTED-$UNWANTED", variables={"WANTED": "2", "UNWANTED": None})
    carry_out(tmp_path, [Step("step", "", 1.0, (task,))])
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


def pytest_with_outcomes(folder: Path, source: str, *options: str) -> int:
    (folder / "test_some.py").write_text(source)
    command = (
        sys.executable, "-m", "pytest", "-p", "benchmarks.visiting.outcomes",
        "--outcomes", "out.jsonl", "-p", "no:cacheprovider",
        "--rootdir", str(folder), *options, "test_some.py",
    )  # fmt: skip
    # A worker of pytest-xdist tells its children so.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = {**clean, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode


def test_outcomes_survive_a_death_and_are_not_asked_for_twice(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, TESTS) == 9
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert (dict(found.counts()), found.started) == ({"passed": 1}, ["test_some.py::test_dies"])
    assert found.device == "the CPU, interpreted"

    assert pytest_with_outcomes(tmp_path, TESTS) == 1
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert dict(found.counts()) == {"passed": 2, "failed": 2, "skipped": 1}
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
    assert dict(found.counts()) == {"passed": 1, "failed": 3, "skipped": 1}
    died = next(line for test, line in found.ended.items() if "test_dies" in test)
    assert "crashed" in died["reason"]
    assert pytest_with_outcomes(tmp_path, TESTS, *options) == 1
    assert Outcomes.read(tmp_path / "out.jsonl").ended == found.ended


def test_an_error_of_the_device_starts_a_new_process(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, STICKY) == AGAIN
    assert list(Outcomes.read(tmp_path / "out.jsonl").ended) == ["test_some.py::test_error"]
    assert pytest_with_outcomes(tmp_path, STICKY) == 1  # what is left passes, what has failed stays
    counts = Outcomes.read(tmp_path / "out.jsonl").counts()
    assert dict(counts) == {"failed": 1, "passed": 1}


def test_an_error_of_the_device_ends_one_of_several_processes(tmp_path: Path) -> None:
    """Nobody is blamed but the test that had it, and the others go on."""
    pytest.importorskip("xdist")
    options = ("-p", "xdist", "-n", "1", "--dist", "load")
    assert pytest_with_outcomes(tmp_path, STICKY, *options) == 1
    found = Outcomes.read(tmp_path / "out.jsonl")
    assert dict(found.counts()) == {"failed": 1, "passed": 1}
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
    assert (
        main(
            [
                "exercise",
                "--device",
                "cuda",
                "--op",
                "add_layer_norm",
                "--dtype",
                "bf16",
                "--dry-run",
            ]
        )
        == 0
    )
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


def plan_of(folder: Path, device: torch.device = CUDA) -> dict[str, Step]:
    return {step.name: step for step in steps.steps(folder, device, folder / "triton-cache")}


H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=79 * 2**30)


def option(task: Task, name: str) -> str:
    words = task.command[3:]  # behind python -m and a module
    return words[words.index(name) + 1]


def test_plan_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.shutil, "which", lambda name, path="": f"/opt/{name}")
    planned = plan_of(tmp_path)
    assert list(planned) == [
        "prepare", "kernels", "host", "headline", "parity", "operations", "memcheck", "compilers",
        "report", "tune",
    ]  # fmt: skip
    assert sum(step.seconds for step in planned.values()) <= 9 * 60
    with_kernels = [op.name for op in operations().values() if op.function]
    assert {task.name.split("/")[1] for task in planned["kernels"].tasks} == {*with_kernels}
    tests, large, workflows = planned["parity"].tasks
    for name in with_kernels:
        assert f"tests/test_{name}.py" in tests.command
        assert (ROOT / "tests" / f"test_{name}.py").is_file()
    # The interpreter would prove nothing about compiled kernels.
    assert {t.variables["TRITON_INTERPRET"] for t in planned["parity"].tasks} == {None}
    assert (option(tests, "-m"), option(large, "-m")) == ("not large_memory", "large_memory")
    gpu_only = {p.name for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text()}
    gpu_only -= {Path(__file__).name}
    assert {Path(w).name for w in workflows.command if w.startswith("tests/")} == gpu_only
    timed = [planned[name].tasks[0] for name in ("headline", "operations")]
    ops = [op for task in timed for op in option(task, "--op").split(",")]
    assert ops[0] == "training"
    assert {*ops} == {case.op.name for case in plan(Options(suite="core"))}
    assert len(ops) == len({*ops})
    quick = option(timed[1], "--provider").split(",")
    assert not {"compile", "flex", "tuned"} & {*quick}
    assert {"baseline", "sdpa_flash", "sdpa_cudnn", "triton"} <= {*quick}
    assert {"compile", "flex"} <= {*option(planned["compilers"].tasks[0], "--provider").split(",")}
    for task in planned["memcheck"].tasks:
        assert task.command[0] == "/opt/compute-sanitizer"
        assert task.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    monkeypatch.setattr(steps.shutil, "which", lambda name, path="": None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    assert plan_of(tmp_path)["memcheck"].impossible == "compute-sanitizer is not on the PATH"


def test_marked_are_the_tests_that_need_much_memory() -> None:
    """Those that allocate gigabytes at once are not run beside others on a GPU."""
    for path in {*ROOT.glob("tests/test_*.py")} - {Path(__file__)}:
        text = path.read_text()
        marks = text.count("@pytest.mark.large_memory\n")
        assert text.count("    def test_strides_beyond") == marks, path.name


def test_search_is_rehearsed_in_the_interpreter(tmp_path: Path) -> None:
    for device, interpret in ((CUDA, None), (CPU, "1")):
        (task,) = plan_of(tmp_path, device)["tune"].tasks
        assert task.variables["TRITON_INTERPRET"] == interpret
        assert main([*task.command[3:5], "0", *task.command[6:], "--dry-run"]) == 0


@pytest.mark.parametrize("device", [CUDA, CPU])
def test_every_planned_command_is_understood(
    tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as it can be asked without a GPU."""
    asked = []
    for step in plan_of(tmp_path, device).values():
        for task in step.tasks:
            words = list(task.command[task.command.index("-m") + 2 :])
            if "benchmarks" not in task.command or words[0] in ("env", "report"):
                continue
            words = [word.replace("{minutes}", "1") for word in words]
            assert main([*words, "--dry-run"]) == 0
            assert "nothing was run" in capsys.readouterr().out or words[0] in ("dry", "host")
            asked.append(words[0])
    assert {"run", "exercise", "calibrate", "dry", "host", "tune"} == {*asked}


def test_a_day_with_a_gpu_that_is_cut_off(tmp_path: Path) -> None:
    """By estimates: after three minutes the whole models are home, after six the parity of all
    kernels, after nine everything but what compilers and the search go on with."""
    planned = list(plan_of(tmp_path).values())
    missing = {
        minutes: {found.task: found.missing for found in simulate(planned, 9.0, minutes)}
        for minutes in (3.0, 6.0, 9.0)
    }
    for task in (
        "prepare/calibrate",
        "prepare/cache",
        "kernels/upsample_cross_entropy",
        "host",
        "headline",
    ):
        assert missing[3.0][task] == []
    assert missing[3.0]["operations"] != []
    for task in ("parity/kernels", "parity/large", "parity/workflows"):
        assert missing[6.0][task] == []
    late = {task for task, left in missing[9.0].items() if left}
    assert late <= {"compilers", "memcheck/racecheck", "tune"}
    for found in simulate(planned, 9.0, 3.0):
        assert found.done or found.state in ("", "not possible") or not found.missing


def test_nothing_that_is_written_down_ends_a_visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such column")

    fine = Step("fine", "", 1.0, (shell("fine", "echo done"),))
    monkeypatch.setattr(visit, "steps", lambda *_: (fine,))
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
    assert "memcheck: compute-sanitizer on small shapes; " in text
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
    assert {row.op for row in read_jsonl(folder / "headline")} == {"training", "model", "encoder"}
    assert {row.op for row in read_jsonl(folder / "operations")} == {"guided_gate", "query_hub"}
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
    wrong = Step("wrong", "", 1.0, (shell("wrong", "echo [broken]; exit 4"),))
    monkeypatch.setattr(visit, "steps", lambda *_: (wrong,))
    assert main(["visit", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "[broken]" in capsys.readouterr().out
    assert "| wrong | done | 4 |" in (tmp_path / "summary.md").read_text()


def test_terminated_it_takes_its_commands_along(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from benchmarks.visiting import visit\n"
        "from benchmarks.__main__ import main\n"
        "from benchmarks.visiting.budget import Step, Task\n"
        "task = Task('t', ('bash', '-c', 'echo $$ > pid; sleep 300'), 't.log')\n"
        "visit.ROOT = Path(sys.argv[1])\n"
        "visit.steps = lambda *_: (Step('t', '', 1.0, (task,)),)\n"
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
    files = [f"tests/test_{stem}.py" for stem in (*steps.HOTTEST, *steps.GPU_ONLY)]
    out = without_optional_packages(tmp_path, "-m", "pytest", "--collect-only", "-q", *files)
    assert int(out.strip().splitlines()[-1].split()[0]) > 1000
    out = without_optional_packages(
        tmp_path, "-m", "pytest", "-q", "tests/test_guided_gate.py", "-k", "test_rho"
    )
    assert " passed" in out


def test_benchmarks_run_without_optional_packages(tmp_path: Path) -> None:
    run = ("-m", "benchmarks", "run", "--device", "cpu", "--op", "guided_gate", "--mode", "fwd")
    out = without_optional_packages(tmp_path, *run, "--threads", "1", "--out", str(tmp_path / "r"))
    assert {row.status for row in read_jsonl(tmp_path / "r")} == {"ok", "unsupported"}
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
    assert read_jsonl(tmp_path / "results") == [good, other]


def test_commands_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

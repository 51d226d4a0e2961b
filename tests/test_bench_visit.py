"""A visit to a GPU machine: time limits hold, nothing done is lost, a second call goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.plan import Options, plan
from benchmarks.record import Record, read_jsonl, write_jsonl
from benchmarks.registry import Problem, Shape, operations
from benchmarks.visiting import summary, visit
from benchmarks.visiting.budget import AGAIN, USABLE, State, Step, Task, run, shares
from benchmarks.visiting.outcomes import Outcomes

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def shell(name: str, script: str, **options: object) -> Task:
    return Task(name, ("bash", "-c", script), f"logs/{name}.log", **options)


def carry_out(folder: Path, steps: list[Step], seconds: float = 20.0) -> State:
    state = State(folder / "visit.json")
    run(steps, state, folder, folder, time.monotonic() + seconds)
    return State(folder / "visit.json")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of nobody who waits stays as a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


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
    count = "echo x >> {0}; echo {0} {{attempt}}".format
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


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    state = carry_out(tmp_path, [Step("step", "", 1.0, (shell("task", "touch ran"),))], seconds=1.0)
    assert state.tasks["task"]["state"] == "not started"
    assert not (tmp_path / "ran").exists()


def test_time_that_is_left_goes_to_those_behind() -> None:
    steps = [Step(name, "", weight, ()) for name, weight in (("a", 1.0), ("b", 3.0))]
    assert shares(steps, 80.0) == {"a": 20.0, "b": 60.0}


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
import pathlib
def test_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
"""


def pytest_with_outcomes(folder: Path, source: str) -> int:
    (folder / "test_some.py").write_text(source)
    command = (
        sys.executable, "-m", "pytest", "-p", "benchmarks.visiting.outcomes",
        "--outcomes", "out.jsonl", "-p", "no:cacheprovider",
        "--rootdir", str(folder), "test_some.py",
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
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
    assert pytest_with_outcomes(tmp_path, TESTS) == 5  # no test is left
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == length + 1


def test_an_error_of_the_device_starts_a_new_process(tmp_path: Path) -> None:
    assert pytest_with_outcomes(tmp_path, STICKY) == AGAIN
    assert list(Outcomes.read(tmp_path / "out.jsonl").ended) == ["test_some.py::test_error"]
    assert pytest_with_outcomes(tmp_path, STICKY) == 0
    counts = Outcomes.read(tmp_path / "out.jsonl").counts()
    assert dict(counts) == {"failed": 1, "passed": 1}


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
    assert "1 operations exercised, 0 not finite" in out

    right = operations()["guided_gate"]

    def build(*given: object) -> Problem:
        problem = right.build(*given)
        call = problem.calls["triton"]
        problem.calls["triton"] = lambda: tuple(
            torch.where(x == x.max(), float("nan"), x) for x in call()
        )
        return problem

    monkeypatch.setitem(registry.operations(), "guided_gate", replace(right, build=build))
    assert main(arguments) == 1
    assert "not finite: guided_gate b0 s4 96x96 B2 M2 fp32" in capsys.readouterr().out


def test_exercise_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["exercise", "--device", "cuda", "--op", "norm", "--dtype", "bf16", "--dry-run"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "norm b0 s1 96x68 B1 M3 bf16", "norm b0 s4 96x96 B2 M2 bf16", "nothing was run",
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


def test_plan_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit.shutil, "which", lambda name: f"/opt/{name}")
    planned = {step.name: step for step in visit.steps(tmp_path, CUDA)}
    assert list(planned) == [
        "environment", "calibrate", "parity", "core", "memory", "compiled", "sanitizer", "tune",
        "report",
    ]  # fmt: skip
    tests = {task.name: task for task in planned["parity"].tasks}
    for op in operations().values():
        if op.function:
            task = tests[f"parity/{op.name}"]
            assert f"tests/test_{op.name}.py" in task.command
            assert (ROOT / "tests" / f"test_{op.name}.py").is_file()
            # The interpreter would prove nothing about compiled kernels.
            assert task.variables["TRITON_INTERPRET"] is None
    gpu_only = {p.stem for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text()}
    gpu_only -= {Path(__file__).stem}
    assert {t for t in tests if "-m" in tests[t].command[3:]} == {
        f"parity/{stem.removeprefix('test_')}" for stem in gpu_only
    }
    core = [task.name for task in planned["core"].tasks]
    assert core[0] == "core/attention"
    assert core.index("core/training") < core.index("core/encoder")
    assert set(core) == {f"core/{case.op.name}" for case in plan(Options(suite="core"))}
    providers = {
        t.name: t.command[t.command.index("--provider") + 1] for t in planned["core"].tasks
    }
    assert providers["core/norm"] == "baseline,reference,torch,triton,tuned,liger"
    assert not any("compile" in names or "flex" in names for names in providers.values())
    beside = {
        t.name: t.command[t.command.index("--provider") + 1] for t in planned["compiled"].tasks
    }
    assert beside["compiled/attention"] == "baseline,triton,compile,flex"
    for task in planned["sanitizer"].tasks:
        assert task.command[0] == "/opt/compute-sanitizer"
        assert task.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    monkeypatch.setattr(visit.shutil, "which", lambda name: None)
    planned = {step.name: step for step in visit.steps(tmp_path, CUDA)}
    assert planned["sanitizer"].impossible == "compute-sanitizer is not on the PATH"


def test_search_is_rehearsed_in_the_interpreter(tmp_path: Path) -> None:
    for device, interpret in ((CUDA, None), (torch.device("cpu"), "1")):
        (task,) = {step.name: step for step in visit.steps(tmp_path, device)}["tune"].tasks
        assert task.variables["TRITON_INTERPRET"] == interpret
        assert main([*task.command[3:5], "0", *task.command[6:], "--dry-run"]) == 0


def test_every_planned_command_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` for a GPU, as far as it can be asked without one."""
    seen = 0
    for step in visit.steps(tmp_path, CUDA):
        for task in step.tasks:
            if task.command[1:4] == ("-m", "benchmarks", "run"):
                assert main([*task.command[3:], "--dry-run"]) == 0
                assert "nothing was run" in capsys.readouterr().out
                seen += 1
    assert seen == 2 * len(visit.core_operations()) + 1


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none"
    assert main(["visit", "--dry-run", "--device", "cuda", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "env -u EQUISEG_FAST_BACKEND -u TRITON_INTERPRET python -m pytest" in text
    assert "sanitizer: memory accesses and races on small shapes" in text
    assert not out.exists()


def test_rehearsal_cut_off_and_continued(tmp_path: Path) -> None:
    def rehearse(minutes: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
        command = (
            sys.executable, "-m", "benchmarks", "visit", "--device", "cpu", "--minutes", minutes,
            "--out", str(tmp_path / "visit"),
        )  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done, json.loads((tmp_path / "visit" / "visit.json").read_text())["tasks"]

    started = time.monotonic()
    done, tasks = rehearse("0.2")
    assert time.monotonic() - started < 40
    assert done.returncode == 0, done.stdout + done.stderr
    assert "did not fit" in done.stdout
    before = {name for name, values in tasks.items() if values["state"] == "done"}
    assert "report" not in before

    done, tasks = rehearse("9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {v["state"] for v in tasks.values()} <= {"done", "not possible"}
    assert all(tasks[name]["attempts"] == 1 for name in before)
    folder = tmp_path / "visit"
    assert {row.op for row in read_jsonl(folder / "core")} == {"guided_gate", "query_hub"}
    assert (folder / "core" / "report.md").is_file()
    text = (folder / "summary.md").read_text()
    assert "10 passed, 0 failed, 0 skipped on the CPU, interpreted" in text
    assert "1 operations exercised, 0 not finite" in text
    assert str(tmp_path) not in text

    started = time.monotonic()
    done, again = rehearse("9")
    assert time.monotonic() - started < 30
    assert again == tasks


def test_a_failed_command_is_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Step("wrong", "", 1.0, (shell("wrong", "echo [broken]; exit 4"),))
    monkeypatch.setattr(visit, "steps", lambda folder, device: (wrong,))
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
        "main(['visit', '--device', 'cpu', '--out', sys.argv[1]])\n"
    )
    command = (sys.executable, "-c", script, str(tmp_path))
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    waited = time.monotonic()
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() - waited < 60
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) != 0
    assert not alive(int((tmp_path / "pid").read_text()))
    assert State(tmp_path / "visit.json").tasks["t"]["state"] == "cut off"


# ---- without what a GPU machine may lack --------------------------------------------------------

MISSING = (
    "hypothesis", "pytest_benchmark", "pytest_timeout", "safetensors", "scipy", "skimage",
    "transformers", "build",
)  # fmt: skip


def without_optional_packages(folder: Path, *words: str) -> str:
    """Standard output of python with these words, in which importing any of MISSING fails."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n"
    )
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # From the repository root, nothing installed: only the blocker is on the path.
    env["PYTHONPATH"] = str(folder)
    command = (sys.executable, *words)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_parity_tests_are_found_without_optional_packages(tmp_path: Path) -> None:
    files = [f"tests/test_{stem}.py" for stem in (*visit.HOTTEST, *visit.GPU_ONLY)]
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
    assert "no picture of the sensors: scikit-image is not installed" in out
    arguments = ("-m", "benchmarks", "visit", "--device", "cpu", "--minutes", "0.01")
    out = without_optional_packages(tmp_path, *arguments, "--out", str(tmp_path / "v"))
    assert "without transformers: no provider transformers" in out


def test_a_measurement_is_not_lost_to_a_later_failure(tmp_path: Path) -> None:
    case = asdict(Shape("b0", 1, 64, 64))
    good = Record("core", "norm", case, "fwd", "torch", "fp32", p50_us=2.0)
    bad = replace(good, status="oom", p50_us=None)
    for attempt, row in enumerate((bad, replace(good, p50_us=1.0), good, bad), start=1):
        (tmp_path / str(attempt)).mkdir()
        write_jsonl([row], tmp_path / str(attempt) / "results.jsonl")
    assert summary._measured(tmp_path) == [good]


def test_commands_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""A visit to a GPU machine: time limits hold, nothing done is lost, a second call goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.record import Record, read, write_jsonl
from benchmarks.measure.resume import AGAIN
from benchmarks.visiting import visit
from benchmarks.visiting.visit import States, Task, pack, share, summary

from .processes import alive, started

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(visit, "LEAST_SECONDS", 0.1)


def shell(folder: Path, name: str, script: str, seconds: float = 2.0, *more: str) -> Task:
    return Task(name, seconds, ("bash", "-c", f"cd {folder}; {script}", *more))


def carried_out(folder: Path, *plan: list[Task], seconds: float = 20.0) -> tuple[States, str]:
    """The tasks of each list at once, one list after the other; what became of them, and what was
    said meanwhile."""
    said: list[str] = []
    archive = folder / "home.tar.gz"
    visit.carry_out(plan, folder, archive, time.monotonic() + seconds, said.append)
    states = folder / "visit.json"
    return json.loads(states.read_text()) if states.is_file() else {}, "\n".join(said)


# ---- time limits --------------------------------------------------------------------------------


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; sleep 300 & echo $! > child; echo partial; wait; sleep 300"
    slow, then = (
        shell(tmp_path, "slow", stubborn, 1.0),
        shell(tmp_path, "next", "sleep 300 & echo $! > left"),
    )
    states, _ = carried_out(tmp_path, [slow], [then], seconds=3.0)
    assert states["slow"]["state"] == "cut off"
    assert 1 < states["slow"]["seconds"] < 10
    assert (tmp_path / "logs/slow.log").read_text() == "partial\n"
    assert not any(alive(int((tmp_path / name).read_text())) for name in ("child", "left"))
    assert states["next"] | {"seconds": 0} == {"state": "done", "rc": 0, "seconds": 0}


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    count = "echo x >> {0}; echo {0} $(wc -l < {0})".format
    last = "; [ $(wc -l < slow) = 2 ] || sleep 300"
    plan = (
        [shell(tmp_path, "first", count("first"))],
        [shell(tmp_path, "fails", count("fails") + "; exit 3")],
        [shell(tmp_path, "slow", count("slow") + last, 1.0)],
    )
    states, _ = carried_out(tmp_path, *plan, seconds=2.0)
    found = {name: (values["state"], values["rc"]) for name, values in states.items()}
    assert found == {"first": ("done", 0), "fails": ("done", 3), "slow": ("cut off", -15)}
    assert carried_out(tmp_path, *plan, seconds=0) == (states, "")  # no time, nothing is started
    states, _ = carried_out(tmp_path, *plan)
    assert states["slow"]["state"] == "done"
    assert (tmp_path / "logs/slow.log").read_text() == "slow 2\n"
    # What had ended was not run again, not even what had failed.
    lines = {name: (tmp_path / name).read_text().count("x") for name in ("first", "fails", "slow")}
    assert lines == {"first": 1, "fails": 1, "slow": 2}


def test_what_comes_first_has_its_time_even_if_there_is_little() -> None:
    plan = [[Task("a", 10.0, ()), Task("b", 5.0, ())], [Task("c", 30.0, ())]]
    found = [share(plan, seconds) for seconds in (80.0, 40.0, 20.0, 5.0)]
    assert found == [20.0, 10.0, 10.0, 5.0]


def test_a_task_that_ends_early_leaves_its_time(tmp_path: Path) -> None:
    plan = [shell(tmp_path, "quick", "true", 9.0)], [shell(tmp_path, "last", "true", 1.0)]
    _, said = carried_out(tmp_path, *plan, seconds=60.0)
    quick, last = (int(x) for x in re.findall(r"at most (\d+) s", said))
    assert quick == 54
    assert 54 < last <= 60


def test_tasks_at_once(tmp_path: Path) -> None:
    # Each waits for the file of the other.
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.05; done".format
    together = [shell(tmp_path, "a", meet("x", "y")), shell(tmp_path, "b", meet("y", "x"))]
    states, _ = carried_out(tmp_path, together)
    assert {values["state"] for values in states.values()} == {"done"}


@pytest.mark.parametrize(
    ("end", "more", "rc"),
    [(f"exit {AGAIN}", (), 0), ("kill -9 $$", ("--resume",), 0), ("kill -9 $$", (), -9)],
)
def test_what_can_go_on_is_started_again(
    tmp_path: Path, end: str, more: tuple[str, ...], rc: int
) -> None:
    script = f"echo x | tee -a count; [ $(wc -l < count) = 3 ] || {end}"
    states, _ = carried_out(tmp_path, [shell(tmp_path, "task", script, 9.0, *more)])
    assert (states["task"]["state"], states["task"]["rc"]) == ("done", rc)
    assert (tmp_path / "logs/task.log").read_text() == ("x\n" if rc else "x\nx\nx\n")


# ---- tests on a GPU -----------------------------------------------------------------------------

TESTS = """
import os, pathlib, pytest, time
def note():
    with pathlib.Path("processes").open("a") as file:
        file.write(f"{os.getpid()}\\n")
class TestExport:
    def test_export(self): note()
def test_error():
    note()
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
class TestParity:
    def test_a(self): assert 1 == 2, "one is not two"
"""
HANGS = """
import pathlib, time
def test_export(): assert False, "comes late"
def test_fails(): assert 1 == 2, "one is not two"
def test_hangs():
    pathlib.Path("hanging").touch()
    time.sleep(300)
"""


def pytest_on_gpu(folder: Path, source: str) -> subprocess.Popen[str]:
    pytest.importorskip("xdist")
    (folder / "test_some.py").write_text(source)
    command = (
        sys.executable, "-m", "pytest", "-p", "benchmarks.visiting.on_gpu", "-p", "xdist", "-n",
        "1", "--dist", "load", "-p", "no:cacheprovider", "-v", "-rfEs", "--rootdir", str(folder),
        "test_some.py",
    )  # fmt: skip
    # A worker of pytest-xdist tells its children so.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = {**clean, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.Popen(
        command, cwd=folder, env={**env, "COLUMNS": "165"}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_parity_first_and_an_error_of_the_device_spoils_no_other_test(tmp_path: Path) -> None:
    running = pytest_on_gpu(tmp_path, TESTS)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    ended = re.findall(r"(?:PASSED|FAILED|SKIPPED) test_some\.py::(\w+)", out)
    assert ended[:2] == ["TestParity", "test_error"]
    assert {*ended} == {"TestParity", "test_error", "test_skipped", "TestExport"}
    assert len({*(tmp_path / "processes").read_text().split()}) == 2
    assert "FAILED test_some.py::TestParity::test_a - AssertionError: one is not two" in out


def test_terminated_pytest_says_what_has_failed(tmp_path: Path) -> None:
    running = pytest_on_gpu(tmp_path, HANGS)
    until = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGTERM)
    out, _ = running.communicate(timeout=60)
    assert "FAILED test_some.py::test_fails - AssertionError: one is not two" in out
    assert "1 failed in" in out.splitlines()[-1]


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


def plan_of(folder: Path, device: torch.device = CUDA) -> dict[str, str]:
    planned = visit.tasks(folder, device, folder / "triton-cache")
    return {task.name: " ".join(task.command) for together in planned for task in together}


def option(command: str, name: str) -> list[str]:
    words = command.split()[1:]
    return words[len(words) - words[::-1].index(name)].split(",")


def test_plan_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan_of(tmp_path)
    assert main(["visit", "--dry-run", "--device", "cuda", "--out", str(tmp_path / "none")]) == 0
    dry = "parity/kernels, 92 s: env -u TRITON_INTERPRET -u EQUISEG_FAST_BACKEND"
    assert dry in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert list(dict.fromkeys(name.split("/")[0] for name in planned)) == [
        "prepare", "kernels", "host", "headline", "parity", "operations", "memcheck", "racecheck",
        "compilers", "report", "tune",
    ]  # fmt: skip
    groups = visit.tasks(tmp_path, CUDA, tmp_path)
    assert sum(max(task.seconds for task in together) for together in groups) <= 9 * 60
    with_kernels = {op.name for op in operations().values() if op.function}
    assert {n.removeprefix("kernels/") for n in planned if n.startswith("kernels/")} == with_kernels
    tests, large = (planned[f"parity/{n}"] for n in ("kernels", "large"))
    files = {name: {*re.findall(r"tests/test_(\w+)\.py", planned[name])} for name in planned}
    assert files["parity/kernels"] == files["parity/large"] == with_kernels
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in with_kernels)
    # The interpreter would prove nothing about compiled kernels.
    assert all("-u TRITON_INTERPRET" in x and "INTERPRET=1" not in x for x in planned.values())
    assert " -m not large_memory" in tests
    assert " -m large_memory" in large
    gpu_only = {p.stem for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text()}
    assert {f"test_{name}" for name in files["parity/workflows"]} == gpu_only - {
        Path(__file__).stem
    }
    ops = [op for name in ("headline", "operations") for op in option(planned[name], "--op")]
    assert ops[0] == "training"
    assert {*ops} == {case.op.name for case in plan(Options(suite="core"))}
    assert len(ops) == len({*ops})
    quick = {*option(planned["operations"], "--provider")}
    assert not {"compile", "flex", "tuned"} & quick
    assert {"baseline", "sdpa_flash", "sdpa_cudnn", "triton"} <= quick
    assert {"compile", "flex"} <= {*option(planned["compilers"], "--provider")}
    for check in ("memcheck", "racecheck"):
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in planned[check]
        assert (
            f"/usr/local/cuda/bin compute-sanitizer --error-exitcode 9 --tool {check} "
            in planned[check]
        )
    # Of a GPU that is there, binaries for it, and as many tests at once as fit into its memory.
    small = SimpleNamespace(major=8, minor=6, multi_processor_count=84, total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    planned = plan_of(tmp_path)
    assert "--arch 86 --num-sms 84 " in planned["prepare/cache"]
    assert int(*option(planned["parity/kernels"], "-n")) <= 2


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
    for together in visit.tasks(tmp_path, device, tmp_path / "triton-cache"):
        for task in together:
            words = task.command[task.command.index("-m") + 1 :]
            if words[0] == "benchmarks" and words[1] != "report":
                assert main([*words[1:], "--dry-run"]) == 0
                assert "nothing was run" in capsys.readouterr().out or words[1] in ("dry", "host")
                asked.add(words[1])
    assert asked == {"run", "exercise", "calibrate", "dry", "host", "tune"}


def test_summary(tmp_path: Path) -> None:
    results, logs = tmp_path / "results", tmp_path / "logs"
    for folder in (results, logs / "parity"):
        folder.mkdir(parents=True)
    case = asdict(Shape("b0", 1, 64, 64))
    good = Record("core", "add_layer_norm", case, "fwd", "torch", "fp32", p50_us=2.0)
    bad = replace(good, provider="triton", status="oom", reason="too large", p50_us=None)
    write_jsonl([good, bad], results / "results.jsonl")
    (results / "env.json").write_text('{"device": "the CPU"}')
    (logs / "wrong.log").write_text(f"a line\nsee {tmp_path}/file\n\n")
    (logs / "parity/kernels.log").write_text("FAILED a.py::test - no\n1 failed\n")
    (logs / "memcheck.log").write_text("Error: Device not supported.\nERROR SUMMARY: 0 errors\n")
    plan = [[Task(n, 1.0, ()) for n in ("wrong", "parity/kernels", "memcheck", "never")]]
    states = {
        "wrong": {"state": "done", "rc": 4, "seconds": 1.5},
        "parity/kernels": {"state": "cut off", "rc": 2, "seconds": 9.0},
        "memcheck": {"state": "done", "rc": 0, "seconds": 2.0},
    }
    text = summary(plan, states, tmp_path)
    for line in (
        "| wrong | failed | 4 | 1.5 | see file |",
        "| parity/kernels | cut off | 2 | 9.0 | 1 failed |",
        "| memcheck | done | 0 | 2.0 | Error: Device not supported. |",
        "| never | not started |  |  |  |",
        "## Predicted and measured",
        "- add_layer_norm triton oom: too large (1)",
        "- FAILED a.py::test - no (1)",
    ):
        assert line in text.splitlines()


def test_archive(tmp_path: Path) -> None:
    folder, archive = tmp_path / "visit", tmp_path / "home" / "visit.tar.gz"
    names = ["visit.json", "a/results.jsonl", "logs/a.log", "triton-cache/k.cubin"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    pack(folder, archive)
    with tarfile.open(archive) as tar:
        found = {member.name for member in tar if member.isfile()}
        assert found == {f"visit/{name}" for name in names[:3]}
        assert tar.extractfile("visit/a/results.jsonl").read() == b"a/results.jsonl"
    assert [path.name for path in archive.parent.iterdir()] == ["visit.tar.gz"]
    pack(folder, folder / "own.tar.gz")
    pack(folder, folder / "own.tar.gz")
    with tarfile.open(folder / "own.tar.gz") as tar:
        assert {member.name for member in tar if member.isfile()} == found


@pytest.mark.parametrize(("script", "status"), [("echo [broken]; exit 4", 1), ("echo done", 0)])
def test_exit_status_and_what_comes_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    script: str, status: int,
) -> None:  # fmt: skip
    """Nothing that goes wrong while it is written down ends a visit."""
    out, home = tmp_path / "v", tmp_path / "a.tar.gz"
    monkeypatch.setattr(visit, "tasks", lambda *_: [[shell(tmp_path, "task", script)]])
    arguments = ["visit", "--device", "cpu", "--out", str(out), "--archive", str(home)]
    assert main(arguments) == status
    with tarfile.open(home) as tar:
        assert "visit/logs/task.log" in tar.getnames()
    assert (
        f"| task | {'failed | 4' if status else 'done | 0'} |" in (out / "summary.md").read_text()
    )
    (out / "visit.json").unlink()

    def broken(*_: object) -> None:
        raise ValueError("no such column")

    monkeypatch.setattr(visit, "summary", broken)
    assert main(arguments) == status
    assert "ValueError: no such column" in capsys.readouterr().out


@pytest.mark.long
def test_rehearsal_cut_off_and_continued(tmp_path: Path) -> None:
    folder, archive = tmp_path / "visit", tmp_path / "home.tar.gz"

    def rehearse(minutes: str) -> tuple[subprocess.CompletedProcess[str], States]:
        command = (
            sys.executable, "-m", "benchmarks", "visit", "--device", "cpu", "--minutes", minutes,
            "--out", str(folder), "--archive", str(archive),
        )  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done, json.loads((folder / "visit.json").read_text())

    done, before = rehearse("0.2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not fit" in done.stdout
    before = {name: state for name, state in before.items() if state["state"] == "done"}
    assert "report" not in before

    done, states = rehearse("9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(state["state"], state["rc"]) for state in states.values()} == {("done", 0)}
    assert before.items() <= states.items()
    ops = {"training", "model", "encoder", "guided_gate", "query_hub"}
    assert {row.op for row in read(folder / "results")} == ops
    assert (folder / "results" / "report.md").is_file()
    with tarfile.open(archive) as tar:
        text = tar.extractfile("visit/summary.md").read().decode()
    assert text == (folder / "summary.md").read_text()
    assert "| exercised guided_gate: 0 wrong |" in text
    assert " 10 passed" in text
    assert "Predicted and measured" in text
    assert str(tmp_path) not in text
    assert rehearse("9")[1] == states


def test_terminated_it_takes_its_commands_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = shell(tmp_path, "t", "echo $$ > pid; sleep 300")
    monkeypatch.setattr(visit, "tasks", lambda *_: [[task]])

    def terminate() -> None:
        started(tmp_path / "pid")
        time.sleep(0.3)  # until it is waited for
        os.kill(os.getpid(), signal.SIGTERM)

    killer = Thread(target=terminate)
    killer.start()
    assert main(["visit", "--device", "cpu", "--out", str(tmp_path)]) == 130
    killer.join()
    assert not alive(started(tmp_path / "pid"))
    assert json.loads((tmp_path / "visit.json").read_text())["t"]["state"] == "cut off"


# ---- without what a GPU machine may lack --------------------------------------------------------

MISSING = (
    "hypothesis", "pytest_benchmark", "pytest_timeout", "safetensors", "scipy", "skimage",
    "transformers", "build",
)  # fmt: skip


def without(missing: Sequence[str], folder: Path, *words: str) -> str:
    """Standard output of python with these words, in which importing any of these fails."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    )
    # From the repository root, nothing installed: only the blocker is on the path.
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(folder)}
    command = (sys.executable, *words)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_parity_tests_are_found_without_optional_packages(tmp_path: Path) -> None:
    files = sorted({*re.findall(r"tests/test_\w+\.py", " ".join(plan_of(tmp_path).values()))})
    out = without(MISSING, tmp_path, "-m", "pytest", "-q", "-k", "test_rho", *files)
    passed, deselected = re.search(r"(\d+) passed, .*?(\d+) deselected", out).groups()
    assert int(passed) > 0
    assert int(deselected) > 1000


def test_benchmarks_run_without_optional_packages_and_pytest(tmp_path: Path) -> None:
    run = ("-m", "benchmarks", "run", "--device", "cpu", "--op", "guided_gate", "--mode", "fwd")
    options = ("--threads", "1", "--out", str(tmp_path / "r"))
    without((*MISSING, "pytest"), tmp_path, *run, *options)
    assert {row.status for row in read(tmp_path / "r")} == {"ok", "unsupported"}

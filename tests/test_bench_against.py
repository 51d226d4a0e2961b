"""`python -m benchmarks against`: a slower version is caught, the same one is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.measure.plan import Options, plan
from benchmarks.measure.record import read
from benchmarks.measure.suites import SUITES
from benchmarks.measure.timing import Timing
from benchmarks.versions.alternate import BLOCK, DONE, READY, Task, measure, pooled

ROOT = Path(__file__).resolve().parent.parent
INIT = Path("equiseg_fast/__init__.py")
GATE = Path("equiseg_fast/ops/guided_gate.py")
LAYOUTS = Path("equiseg_fast/models/layouts.py")
TINY = ("--at", "height=64,width=64,modalities=2", "--mode", "fwd", "--device", "cpu")


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    command = ("git", "-C", str(repository), *identity, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(repository: Path, message: str) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", message)


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "against", *arguments]


def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository), "TMPDIR": str(repository.parent / "tmp")}


def against(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments), cwd=repository, env=environment(repository), capture_output=True,
        text=True,
    )  # fmt: skip
    assert git(repository, "worktree", "list").count("\n") == 0
    assert list((repository.parent / "tmp").iterdir()) == []
    return done


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the sources with three revisions.

    at-broken cannot be imported; at-older lacks what the benchmark of the encoder imports; main is
    the sources as they are. In the working tree the torch backend of the gate sleeps.
    """
    copy = tmp_path_factory.mktemp("against") / "checkout"
    (copy.parent / "tmp").mkdir()
    skip = shutil.ignore_patterns(".git", "__pycache__", "*results", "build", "*.egg-info", ".*")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    git(copy, "init", "--quiet", "--initial-branch", "main")
    for tag, file, old, new in (
        ("broken", INIT, "from ._version import ", "raise ImportError('on purpose')  # "),
        ("older", LAYOUTS, "HUGGING_FACE_V5", "HUGGING_FACE_FIVE"),
    ):
        before = (copy / file).read_text()
        replace_in(copy / file, old, new)
        commit(copy, tag)
        git(copy, "tag", f"at-{tag}")
        (copy / file).write_text(before)
    commit(copy, "as it is")
    replace_in(
        copy / GATE,
        "    g, factor, _ = _weights(logits, present, rho)\n",
        "    __import__('time').sleep(5e-3)\n    g, factor, _ = _weights(logits, present, rho)\n",
    )
    return copy


def test_a_slower_version_is_caught_and_the_same_is_not(repository: Path, tmp_path: Path) -> None:
    arguments = ("--base", "main", "--op", "guided_gate,add_layer_norm", *TINY, "--threads", "1")
    out = tmp_path / "first"
    done = against(repository, *arguments, "--blocks", "9", "--fail", "--out", str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    comparison = (out / "comparison.md").read_text()
    assert "| slower | guided_gate | b0 s2 64x64 B1 M2 fp32 | fwd | torch |" in comparison
    assert "| same | add_layer_norm | b0 s2 64x64 B1 M2 fp32 | fwd | torch |" in comparison
    assert "2 compared: 1 slower, 0 lost, 0 faster, 1 same" in done.stdout
    assert "as it is; new: the working tree" in done.stdout
    assert f"written to {out}" in done.stdout

    rows = {name: read(out / name) for name in ("base", "new")}
    for name, found in rows.items():
        env = json.loads((out / name / "env.json").read_text())
        assert {row.env_id for row in found} == {env["env_id"]}
        assert env["git_sha"] == git(repository, "rev-parse", "main")
        assert env["git_dirty"] == (name == "new")
        assert env["threads"] == 1
        assert {row.n for row in found if row.status == "ok"} == {9}
    assert rows["base"][0].env_id != rows["new"][0].env_id


def test_what_base_lacks_is_named_and_the_rest_compared(repository: Path, tmp_path: Path) -> None:
    # Threads that wait for one another on a busy machine are slower or faster by chance.
    arguments = ("--base", "at-older", "--op", "encoder,add_layer_norm", *TINY, "--threads", "1")
    done = against(repository, *arguments, "--blocks", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not compared: encoder fwd torch: base: error, ImportError" in done.stdout
    assert "HUGGING_FACE_V5" in done.stdout
    assert "equiseg-base" not in done.stdout + (tmp_path / "base" / "results.jsonl").read_text()
    assert "1 compared" in done.stdout
    assert [row.status for row in read(tmp_path / "new") if row.op == "encoder"] == [
        "ok", "unsupported",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "no-such-revision"), "no such revision"),
        (
            ("--base", "at-broken"),
            "worker of base ended with 1: ImportError: on purpose",
        ),
        (("--base", "main", "--blocks", "2"), "--blocks must be at least 3"),
        (("--base", "main", "--at", "colour=3"), "--at must be among variant, stage"),
        (("--base", "main", "--at", "height=0"), "height must be a positive integer; got '0'"),
        (("--base", "main", "--op", "atention"), "--op must be among attention"),
    ],
)
def test_usage_errors(
    repository: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = against(repository, "--op", "add_layer_norm", *TINY, *arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_dry_run_measures_nothing(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    done = against(repository, "--base", "main", "--dry-run", *TINY, "--out", str(out))
    assert done.returncode == 0
    assert "attention b0 s2 64x64 B1 M2 fp32: fwd: torch\n" in done.stdout
    assert "model b0 64x64 B1 M2 fp32: fwd: torch\n" in done.stdout
    assert "nothing was run" in done.stdout
    assert not out.exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_no_worktree(
    repository: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    arguments = command("--base", "main", *TINY, "--blocks", "999", "--out", str(tmp_path))
    running = subprocess.Popen(
        arguments, cwd=repository, env=environment(repository), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        waited = time.monotonic()
        while not (tmp_path / "base" / "env.json").is_file():
            assert time.monotonic() - waited < 120
            assert running.poll() is None
            time.sleep(0.1)
        assert git(repository, "worktree", "list").count("\n") == 1
        running.send_signal(sent)
        assert running.wait(timeout=60) != 0
    finally:
        running.kill()
    assert git(repository, "worktree", "list").count("\n") == 0
    assert list((repository.parent / "tmp").iterdir()) == []


class Scripted:
    """A side that answers as it is told, and keeps what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []

    def send(self, message: object) -> None:
        self.asked.append(message)
        ORDER.append(self)

    def receive(self) -> object:
        return self.answers.pop(0)


ORDER: list[Scripted] = []


def test_sides_are_asked_in_turn_and_one_that_fails_is_left_out() -> None:
    ORDER.clear()
    task = Task(plan(Options())[0], Options(), SUITES["quick"])
    rows = [object()]
    a = Scripted(READY, 1, 2, 3, rows)
    b = Scripted(READY, 1, rows)  # fails in its second block, so that its records come at once
    c = Scripted("ImportError: no such name")
    found = measure([a, b, c], task, 3)
    assert found[:2] == [rows, rows]
    assert {(r.status, r.reason) for r in found[2]} == {("error", "ImportError: no such name")}
    assert a.asked == [task, BLOCK, BLOCK, BLOCK, DONE]
    assert b.asked == [task, BLOCK, BLOCK]
    assert c.asked == [task]
    assert ORDER == [a, b, c, a, b, b, a, a, a]


def test_a_block_counts_with_its_fastest_call_by_wall_clock() -> None:
    calm = Timing(10.0, 11.0, 12.0, 9.0, 5, "wall", cpu_us=11.0)
    busy = Timing(90.0, 99.0, 999.0, 9.5, 5, "wall", cpu_us=12.0)
    found = pooled([calm, busy, calm])
    assert (found.p50_us, found.min_us, found.n) == pytest.approx((9.0, 9.0, 3))
    assert found.cpu_us == 11.0
    assert found.p80_us < 10
    events = pooled([Timing(10.0, 11.0, 12.0, 9.0, 5, "graph")] * 3)
    assert events.p50_us == pytest.approx(11.0)
    assert events.cpu_us is None

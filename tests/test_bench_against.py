"""`python -m benchmarks against`: a slower version is caught, the same one is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.record import read
from benchmarks.measure.suites import SUITES
from benchmarks.measure.timing import Timing
from benchmarks.versions import against as against_module
from benchmarks.versions.against import BLOCK, DONE, READY, measure, pooled

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
    rows = [line.split() for line in done.stdout.splitlines()]
    case = ["fwd", "b0", "s2", "64x64", "B1", "M2", "fp32", "torch"]
    assert ["slower", "guided_gate", *case] in [row[:10] for row in rows]
    assert ["same", "add_layer_norm", *case] in [row[:10] for row in rows]
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
    assert "base has no encoder fwd b0 64x64 B1 M2 fp32 torch: error, ImportError" in done.stdout
    assert "HUGGING_FACE_V5" in done.stdout
    assert "equiseg-base" not in done.stdout + (tmp_path / "base" / "results.jsonl").read_text()
    assert "1 compared" in done.stdout
    assert [row.status for row in read(tmp_path / "new") if row.op == "encoder"] == [
        "ok", "unsupported",
    ]  # fmt: skip


def test_a_version_that_cannot_be_imported_is_blamed(repository: Path, tmp_path: Path) -> None:
    arguments = ("--base", "at-broken", "--op", "add_layer_norm", *TINY, "--out", str(tmp_path))
    done = against(repository, *arguments)
    assert done.returncode == 2
    assert "ImportError: on purpose" in done.stderr
    assert "error: the worker of base ended with 1, see above" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "no-such-revision"), "no such revision"),
        (("--base", "main", "--blocks", "2"), "--blocks must be at least 3"),
        (("--base", "main", "--at", "colour=3"), "--at must be among variant, stage"),
        (("--base", "main", "--at", "height=0"), "height must be a positive integer; got '0'"),
        (("--base", "main", "--op", "atention"), "--op must be among attention"),
    ],
)
def test_usage_errors(
    repository: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(against_module, "ROOT", repository)
    with pytest.raises(SystemExit, match="2"):
        main(["against", *TINY, *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_dry_run_measures_nothing(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(against_module, "ROOT", repository)
    out = tmp_path / "none"
    assert main(["against", "--base", "main", "--dry-run", *TINY, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "attention b0 s2 64x64 B1 M2 fp32: fwd: torch\n" in shown
    assert "model b0 64x64 B1 M2 fp32: fwd: torch\n" in shown
    assert "nothing was run" in shown
    assert not out.exists()


def test_terminated_it_leaves_no_checkout_and_no_worker(repository: Path, tmp_path: Path) -> None:
    arguments = command("--base", "main", *TINY, "--blocks", "999", "--out", str(tmp_path))
    running = subprocess.Popen(
        arguments, cwd=repository, env=environment(repository), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        waited = time.monotonic()
        while not (tmp_path / "base" / "env.json").is_file():
            assert time.monotonic() - waited < 120
            assert running.poll() is None
            time.sleep(0.1)
        assert len(list((repository.parent / "tmp").iterdir())) == 1
        running.terminate()
        said, _ = running.communicate(timeout=60)  # workers would hold the pipe open
    finally:
        running.kill()
    assert running.returncode == 130
    assert f"interrupted; what was measured on both sides is in {tmp_path}" in said
    assert list((repository.parent / "tmp").iterdir()) == []


class Scripted:
    """A side that answers as it is told, and keeps what it was asked."""

    def __init__(self, name: str, *answers: str) -> None:
        self.out = Path(name)
        self.answers = list(answers)

    def ask(self, message: object) -> str:
        ASKED.append((self.out.name, message))
        return self.answers.pop(0)


ASKED: list[tuple[str, object]] = []


def test_sides_are_asked_in_turn_and_one_that_fails_is_left_out() -> None:
    ASKED.clear()
    task = plan(Options())[0], Options(), SUITES["quick"]
    a = Scripted("a", READY, READY, READY, READY, "")
    b = Scripted("b", READY, READY, "")  # fails in its second block, and has kept its records
    c = Scripted("c", "ImportError: no such name")
    said = ["c has no attention b0 s2 480x736 B1 M3 fp32: ImportError: no such name"]
    assert measure([a, b, c], task, 3) == said
    assert ASKED == [
        *(("a", task), ("b", task), ("c", task)),
        *(("a", BLOCK), ("b", BLOCK), ("b", BLOCK), ("a", BLOCK), ("a", BLOCK)),
        ("a", DONE),
    ]


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

"""A time-boxed session on a new GPU machine: everything it can tell, in the order of its worth.

Every kernel once, whole models against the strongest others, parity tests on the GPU, single
operations, memory checks, compilers. Each task has its share of the time and is killed, with its
children, when that is over; what one leaves is shared among those behind it. Results are written as
they come, and packed into one archive after every task. The same command goes on with what is not
done. Needs no network and installs nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.command import outputs
from benchmarks.command.options import ROOT, choose_device, to_path
from benchmarks.measure.resume import AGAIN
from benchmarks.visiting import orphans
from benchmarks.visiting.summary import brought, failed, table, write_summary
from benchmarks.visiting.tasks import PYTHON, Plan, Task, tasks

OPTIONAL = {
    "transformers": "no provider transformers, its tests are skipped",
    "hypothesis": "property tests are not run",
    "pytest_timeout": "a test that hangs takes its whole task's time",
    "xdist": "parity tests cannot be run",
}
POLL_SECONDS, TICK_SECONDS = 0.05, 10.0
GRACE_SECONDS, KILL_SECONDS = 3.0, 10.0
LEAST_SECONDS = 2.0
"""With less left nothing is started any more."""
USABLE = 0.8
"""Share of its limit that a command is told: the rest is for starting and for coming to an end."""
LOG_BYTES = 2**18
"""Kept of a log in the archive, the last ones: logs say at their end what went wrong."""


class State:
    """What became of every task, in `visit.json`, written at every change.

    Per task: state ("running", "done", "cut off", "hopeless", "not started" or "not possible"),
    started (UTC), seconds, rc (the exit status), attempts, reason. One that is found "running" was
    cut off together with its visit.
    """

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        self.path, self.changed = path, changed
        self.tasks: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.tasks = json.loads(path.read_text())["tasks"]
        for values in self.tasks.values():
            if values["state"] == "running":
                values["state"] = "cut off"

    def of(self, task: Task) -> dict[str, Any]:
        return self.tasks.get(task.name, {})

    def over(self, task: Task) -> bool:
        """Whether nothing more can come of it."""
        return bool(task.impossible) or self.of(task).get("state") in ("done", "hopeless")

    def set(self, task: Task, **values: Any) -> None:
        kept = {**self.of(task), **values}
        self.tasks[task.name] = {name: value for name, value in kept.items() if value is not None}
        outputs.write(self.path, json.dumps({"tasks": self.tasks}, indent=1) + "\n")
        self.changed()


class Running:
    """A task under way, in a session of its own so that its children end with it."""

    def __init__(
        self, task: Task, limit: float, state: State, folder: Path, variables: Mapping[str, str]
    ) -> None:
        self.task, self.state, self.restarts = task, state, task.restarts
        self.started = time.monotonic()
        self.deadline = self.started + limit
        minutes = f"{USABLE * limit / 60:.2f}"
        self.command = [word.replace("{minutes}", minutes) for word in task.command]
        mark = {orphans.MARK: str(folder)}
        chosen = {**os.environ, **variables, **task.variables, **mark}
        self.environment = {name: value for name, value in chosen.items() if value is not None}
        self.log = folder / task.log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        state.set(
            task, started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            attempts=state.of(task).get("attempts", 0) + 1, rc=None, seconds=None, reason=None,
            state="running",
        )  # fmt: skip
        self._start("w")

    def _start(self, how: str) -> None:
        with self.log.open(how) as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finished(self) -> bool:
        """Whether it has ended, also because its time is up or it is hopeless."""
        rc, late = self.process.poll(), time.monotonic() >= self.deadline
        hopeless = self.task.hopeless and re.search(
            f".*({self.task.hopeless}).*", self.log.read_text(errors="replace")
        )
        if hopeless:
            self.end("hopeless", hopeless.group().strip())
        elif rc is not None and rc >= 0 and rc != AGAIN:
            self.end("done")
        elif late or (rc is not None and not self.restarts):
            self.end("cut off")
        elif rc is not None:
            self.restarts -= 1
            self._start("a")
            return False
        else:
            return False
        return True

    def end(self, state: str, reason: str | None = None) -> None:
        """Kill it and all that it started, if it still runs."""
        # What is stuck in a driver survives even SIGKILL; the rest of the visit goes on.
        for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if self.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, sent)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)
        seconds = round(time.monotonic() - self.started, 1)
        self.state.set(
            self.task, state=state, rc=self.process.returncode, seconds=seconds, reason=reason
        )


def share(plan: Plan, remaining: float) -> float:
    """Seconds for the first of the groups that are left."""
    seconds = [max(task.seconds for task in together) for together in plan]
    return min(remaining, max(seconds[0], remaining * seconds[0] / sum(seconds)))


def carry_out(
    plan: Plan, state: State, folder: Path, deadline: float,
    variables: Mapping[str, str] | None = None, said: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Every task that is not over, until `deadline` (of `time.monotonic`). variables: of all
    commands. tick: called now and then while something runs."""
    for i, together in enumerate(plan):
        for task in together:
            if task.impossible:
                said(f"{task.name}: {task.impossible}")
                state.set(task, state="not possible", reason=task.impossible)
        left = [[t for t in group if not state.over(t)] for group in plan[i:]]
        if not (waiting := left[0]):
            continue
        seconds = share([group for group in left if group], deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            for task in waiting:
                state.set(task, state=state.of(task).get("state", "not started"))
            continue
        running: list[Running] = []
        ticked = time.monotonic()
        try:
            for task in waiting:
                said(f"{task.name}, at most {seconds:.0f} s")
                running.append(Running(task, seconds, state, folder, variables or {}))
            while running:
                for ended in [r for r in running if r.finished()]:
                    running.remove(ended)
                    if reason := state.of(ended.task).get("reason"):
                        said(f"{ended.task.name}: {reason}")
                if time.monotonic() >= ticked + TICK_SECONDS:
                    ticked = time.monotonic()
                    tick()
                time.sleep(POLL_SECONDS)
        finally:
            for r in running:
                r.end("cut off")


def pack(folder: Path, archive: Path) -> None:
    """Write `archive` (.tar.gz) anew from a folder of results, `summary.md` first.

    It is replaced in one step, so that whoever takes it gets a whole one.
    """
    found = sorted(folder.rglob("*"), key=lambda path: (path.name != "summary.md", path))
    new = archive.with_name(f".{archive.name}.new")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(new, "w:gz", compresslevel=6) as tar:
        for path in found:
            inside = path.relative_to(folder)
            left_out = inside.parts[0] == "triton-cache" or path.suffix == ".new"
            if left_out or path in (archive, new) or not path.is_file():
                continue
            with suppress(FileNotFoundError):  # a journal, whose run has ended meanwhile
                content = path.read_bytes()[-LOG_BYTES if path.suffix == ".log" else 0 :]
                member = tarfile.TarInfo(f"visit/{inside.as_posix()}")
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))
    new.replace(archive)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks visit`."""
    parser.add_argument("--minutes", type=float, help="for everything; default: 9, on a CPU 4")
    parser.add_argument(
        "--out", type=to_path, default=Path("benchmark-results/visit"),
        help="folder of results, and of a resumed visit; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=to_path, metavar="FILE", help="default: the folder's name with .tar.gz"
    )
    parser.add_argument(
        "--cache", type=to_path, metavar="FOLDER",
        help="binaries compiled beforehand, by `dry --what visit --cache FOLDER` with the Python "
        "and Triton of that machine; default: triton-cache in --out",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu rehearses everything; default: cuda if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 if a command failed by itself, which includes a failed test, or a task of a
    rehearsal brought nothing; on a GPU what was cut off or cannot be done is no failure."""
    started = time.monotonic()
    device = choose_device(args.device, needed=not args.dry_run)
    rehearsal = device.type != "cuda"
    minutes = args.minutes if args.minutes is not None else 4 if rehearsal else 9
    if not minutes > 0:
        raise ValueError(f"--minutes must be positive; got {minutes}")
    folder = args.out.resolve()
    cache = (args.cache or folder / "triton-cache").resolve()
    home = args.archive or args.out.parent / f"{folder.name}.tar.gz"  # printed as it was given
    archive = home.resolve()
    plan = tasks(folder, device, cache)
    if args.dry_run:
        _print_plan(plan, 60 * minutes, console)
        return 0
    for package, lacking in OPTIONAL.items():
        if not find_spec(package):
            console.print(f"without {package}: {lacking}")
    outputs.writable(folder)
    outputs.writable_file(archive, option="--archive")
    (folder / "parity").mkdir(parents=True, exist_ok=True)
    args.kept = f"what came home is in {args.out}; the same command goes on there"
    state = State(folder / "visit.json")
    every = [task for together in plan for task in together]

    def keep() -> None:
        """Nothing that goes wrong here may end the visit."""
        for what, call, given in (
            ("summary", write_summary, (every, state.tasks, folder)),
            ("archive", pack, (folder, archive)),
        ):  # fmt: skip
            try:
                call(*given)
            except Exception as error:
                console.print(f"no {what}: {type(error).__name__}: {error}", markup=False)

    def said(text: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {text}", markup=False)

    state.changed = keep
    if ended := orphans.end(str(folder)):
        console.print(f"ended {ended} processes that an earlier visit had left running")
    variables = {"TRITON_CACHE_DIR": str(cache), "PYTHONFAULTHANDLER": "1"}
    with orphans.ended_with_this_process(str(folder)):
        carry_out(plan, state, folder, started + 60 * minutes, variables, said, keep)
    keep()
    console.print(table(every, state.tasks, folder))
    left = [t.name for t in every if not state.over(t)]
    if left:
        console.print(f"did not fit: {', '.join(left)}; the same command goes on there")
    said(f"all of it in {home}")
    empty = [
        t.name for t in every if not t.impossible and not brought(t, state.of(t), folder)
    ] if rehearsal else []  # fmt: skip
    if empty:
        console.print(f"brought nothing: {', '.join(empty)}")
    return 1 if empty or any(failed(state.of(task)) for task in every) else 0


def _print_plan(plan: Plan, seconds: float, console: Console) -> None:
    possible = [[task for task in together if not task.impossible] for together in plan]
    for i, together in enumerate(plan):
        own = share([group for group in possible[i:] if group], seconds) if possible[i] else 0.0
        seconds -= own
        for task in together:
            limit = f"{own:.0f} s, or more if others leave time"
            if task.impossible:
                limit = f"not possible: {task.impossible}"
            console.print(f"[bold]{task.name}[/]: {limit}")
            set_ = [f"{k}={v}" if v is not None else f"-u {k}" for k, v in task.variables.items()]
            prefix = " ".join(["env", *sorted(set_)]) + " " if set_ else ""
            words = ["python" if word == PYTHON else word for word in task.command]
            console.print(f"  {prefix}{' '.join(words)}", markup=False, soft_wrap=True)
    console.print("nothing was run")

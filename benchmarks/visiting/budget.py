"""Commands under a time limit: each a process that is killed with its children when time is up.

The state is written at every change, so that a second call goes on where the first was cut off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0
LEAST_SECONDS = 2.0
"""With less left nothing is started any more."""
USABLE = 0.8
"""Share of its limit that a command is told: the rest is for starting and for coming to an end."""
LEAST_SHARE = 60.0
"""Seconds that a command may take even if others of its step then have none."""
AGAIN = 75
"""Exit status of a command that wants to be started again."""


STICKY = ("CUDA error", "device-side assert", "cudaError")


def is_sticky(message: str) -> bool:
    """Whether an error spoils every later call of its process."""
    return any(word in message for word in STICKY)


@dataclass(frozen=True)
class Task:
    """One command.

    command: "{minutes}" in it becomes what it may plan with, "{attempt}" counts from 1. output: the
    file, relative to the folder of results, of what it prints. variables: of its environment, None
    for one that must not be set. restarts: how often it is started again, within its time, if it
    ends with `AGAIN` or by a signal: for commands that go on where they stopped.
    """

    name: str
    command: tuple[str, ...]
    output: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    restarts: int = 0


@dataclass(frozen=True)
class Step:
    """Tasks that share a part of the time, in proportion to `weight`. at_once: how many tasks may
    run together. impossible: why nothing of it can be run here, empty if it can."""

    name: str
    what: str
    weight: float
    tasks: tuple[Task, ...]
    at_once: int = 1
    impossible: str = ""


class State:
    """What became of every task, in `visit.json`.

    Per task: state ("running", "done", "cut off", "not started" or "not possible"), started (UTC),
    seconds, rc (the exit status), attempts. One that is found "running" was killed from outside.
    """

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.changed = changed
        self.tasks: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.tasks = json.loads(path.read_text())["tasks"]

    def of(self, task: Task) -> dict[str, Any]:
        return self.tasks.get(task.name, {})

    def done(self, task: Task) -> bool:
        return self.of(task).get("state") == "done"

    def set(self, task: Task, **values: Any) -> None:
        self.tasks[task.name] = {**self.of(task), **values}
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps({"tasks": self.tasks}, indent=1) + "\n")
        whole.replace(self.path)
        self.changed()


class Running:
    """A task under way, in a session of its own so that its children can be killed with it."""

    def __init__(self, task: Task, folder: Path, cwd: Path, limit: float, state: State) -> None:
        self.task, self.state = task, state
        self.started = time.monotonic()
        self.deadline = self.started + limit
        attempt = state.of(task).get("attempts", 0) + 1
        values = {"{minutes}": f"{USABLE * limit / 60:.2f}", "{attempt}": str(attempt)}
        self.command = [_filled(word, values) for word in task.command]
        chosen = {**os.environ, **task.variables}
        self.environment = {name: value for name, value in chosen.items() if value is not None}
        self.restarts = task.restarts
        self.cwd = cwd
        self.output = folder / task.output
        self.output.parent.mkdir(parents=True, exist_ok=True)
        state.set(
            task, state="running", started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            attempts=attempt, rc=None,
        )  # fmt: skip
        self._start("w")

    def _start(self, how: str) -> None:
        with self.output.open(how) as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finished(self) -> bool:
        """Whether it has ended, also because its time is up."""
        rc = self.process.poll()
        if rc is None and time.monotonic() < self.deadline:
            return False
        if rc is None:
            self.stop()
        elif (rc == AGAIN or rc < 0) and self.restarts and time.monotonic() < self.deadline:
            self.restarts -= 1
            self._start("a")
            return False
        else:
            self._record("done", rc)
        return True

    def stop(self) -> None:
        """Kill it and all that it started."""
        for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                pass
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._record("cut off", self.process.returncode)

    def _record(self, state: str, rc: int | None) -> None:
        seconds = round(time.monotonic() - self.started, 1)
        self.state.set(self.task, state=state, rc=rc, seconds=seconds)


def _filled(word: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        word = word.replace(placeholder, value)
    return word


def shares(steps: Sequence[Step], remaining: float) -> dict[str, float]:
    """Seconds for every step if none ends early."""
    total = sum(step.weight for step in steps)
    return {step.name: remaining * step.weight / total for step in steps}


def run(
    steps: Sequence[Step], state: State, folder: Path, cwd: Path, deadline: float,
    progress: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Every step in turn, until `deadline` (of `time.monotonic`). What one leaves of its share is
    shared among those behind it; what is done already is not run again."""
    for i, step in enumerate(steps):
        waiting = [task for task in step.tasks if not state.done(task)]
        if step.impossible:
            for task in waiting:
                state.set(task, state="not possible", reason=step.impossible)
            continue
        open_steps = [s for s in steps[i:] if any(not state.done(t) for t in s.tasks)]
        if waiting:
            share = shares([s for s in open_steps if not s.impossible], deadline - time.monotonic())
            _run_step(step, waiting, state, folder, cwd, share[step.name], progress)


def _run_step(
    step: Step, waiting: list[Task], state: State, folder: Path, cwd: Path, seconds: float,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    until = time.monotonic() + seconds
    under_way: list[Running] = []
    with _stopping(under_way):
        while waiting or under_way:
            under_way[:] = [running for running in under_way if not running.finished()]
            while waiting and len(under_way) < step.at_once:
                task = waiting.pop(0)
                # Those that still wait get their part of what is left.
                rounds = -(-(len(waiting) + 1) // step.at_once)
                left = until - time.monotonic()
                # What comes first should rather finish than leave everybody too little.
                limit = max(left / rounds, min(left, LEAST_SHARE))
                if until - time.monotonic() < LEAST_SECONDS:
                    state.set(task, state=state.of(task).get("state", "not started"))
                    continue
                progress(f"{task.name}, at most {limit:.0f} s")
                under_way.append(Running(task, folder, cwd, limit, state))
            time.sleep(POLL_SECONDS)


@contextmanager
def _stopping(under_way: list[Running]) -> Iterator[None]:
    """Nothing is left running when the block is left early."""
    try:
        yield
    finally:
        for running in under_way:
            running.stop()

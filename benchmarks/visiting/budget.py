"""Commands under a time limit: each a process that is killed with its children when time is up.

The state is written at every change, so that a second call goes on where the first was cut off. A
`Machine` keeps the time and starts processes; a simulated one takes its place where nothing is run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measure.resume import AGAIN
from benchmarks.visiting import orphans

POLL_SECONDS = 0.05
TICK_SECONDS = 10.0
GRACE_SECONDS, KILL_SECONDS = 3.0, 10.0
LEAST_SECONDS = 2.0
"""With less left nothing is started any more."""
USABLE = 0.8
"""Share of its limit that a command is told: the rest is for starting and for coming to an end."""
LEAST_SHARE = 60.0
"""Seconds that a command may take even if others of its step then have none."""


@dataclass(frozen=True)
class Task:
    """One command.

    command: "{minutes}" in it becomes what it may plan with. output: the file, relative to the
    folder of results, of what it prints. variables: of its environment, None
    for one that must not be set. weight: its part of the time of its step. restarts: how often it
    is started again, within its time, if it ends with `AGAIN` or by a signal: for commands that go
    on where they stopped. hopeless: a pattern in its output that means it can bring nothing here.
    estimate: what it brings, one after the other, and the seconds each is thought to take on a GPU.
    """

    name: str
    command: tuple[str, ...]
    output: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    weight: float = 1.0
    restarts: int = 0
    hopeless: str = ""
    estimate: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """Tasks that share a part of the time. seconds: what it may take even if others then have
    none, and its share where there is more. at_once: how many tasks may run together. impossible:
    why nothing of it can be run here, empty if it can."""

    name: str
    what: str
    seconds: float
    tasks: tuple[Task, ...]
    at_once: int = 1
    impossible: str = ""


class Process(Protocol):
    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...


class Machine:
    """The clock, and processes in sessions of their own so that their children end with them."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(
        self, task: Task, command: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path,
        how: str,
    ) -> Process:  # fmt: skip
        """how: "w" to write the output, "a" to append it."""
        with out.open(how) as file:
            return subprocess.Popen(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def stop(self, process: Process) -> None:
        """Kill it and all that it started."""
        # What is stuck in a driver survives even SIGKILL; the rest of the visit goes on.
        for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)  # type: ignore[attr-defined]


class State:
    """What became of every task, in `visit.json`.

    Per task: state ("running", "done", "cut off", "hopeless", "not started" or "not possible"),
    started (UTC), seconds, rc (the exit status), attempts, reason. One that is found "running" was
    cut off together with its visit.
    """

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.changed = changed
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
        return self.of(task).get("state") in ("done", "hopeless")

    def set(self, task: Task, **values: Any) -> None:
        kept = {**self.of(task), **values}
        self.tasks[task.name] = {name: value for name, value in kept.items() if value is not None}
        self._write()

    def _write(self) -> None:
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps({"tasks": self.tasks}, indent=1) + "\n")
        whole.replace(self.path)
        self.changed()


class Running:
    """A task under way."""

    def __init__(self, task: Task, visit: Visit, limit: float) -> None:
        state, machine = visit.state, visit.machine
        self.task, self.state, self.machine = task, state, machine
        self.started = machine.now()
        self.deadline = self.started + limit
        attempt = state.of(task).get("attempts", 0) + 1
        minutes = f"{USABLE * limit / 60:.2f}"
        self.command = [word.replace("{minutes}", minutes) for word in task.command]
        mark = {orphans.MARK: str(visit.folder)}
        chosen = {**os.environ, **visit.environment, **task.variables, **mark}
        self.environment = {name: value for name, value in chosen.items() if value is not None}
        self.restarts = task.restarts
        self.cwd = visit.cwd
        self.output = visit.folder / task.output
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.read = 0
        state.set(
            task, started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            attempts=attempt, rc=None, seconds=None, reason=None,
        )  # fmt: skip
        self._start("w")

    def _start(self, how: str) -> None:
        self.process = self.machine.start(
            self.task, self.command, self.environment, self.cwd, self.output, how
        )
        self.state.set(self.task, state="running")

    def finished(self) -> bool:
        """Whether it has ended, also because its time is up or it is hopeless."""
        rc, late = self.process.poll(), self.machine.now() >= self.deadline
        if reason := self._hopeless():
            self._end("hopeless", reason)
        elif rc is None and late:
            self._end("cut off")
        elif rc is None:
            return False
        elif rc != AGAIN and rc >= 0:
            self._end("done")
        elif self.restarts and not late:
            self.restarts -= 1
            self._start("a")
            return False
        else:
            self._end("cut off")
        return True

    def _hopeless(self) -> str:
        """The line of its output that says so."""
        if not self.task.hopeless or self.output.stat().st_size == self.read:
            return ""
        text = self.output.read_text(errors="replace")
        self.read = len(text.encode())
        found = re.search(f".*({self.task.hopeless}).*", text)
        return found.group().strip() if found else ""

    def stop(self) -> None:
        """End it before its time."""
        self._end("cut off")

    def _end(self, state: str, reason: str | None = None) -> None:
        if self.process.poll() is None:
            self.machine.stop(self.process)
        seconds = round(self.machine.now() - self.started, 1)
        self.state.set(
            self.task, state=state, rc=self.process.returncode, seconds=seconds, reason=reason,
        )  # fmt: skip


def share(steps: Sequence[Step], remaining: float) -> float:
    """Seconds for the first of the steps that are left."""
    own, total = steps[0].seconds, sum(step.seconds for step in steps)
    return min(remaining, max(own, remaining * own / total))


@dataclass
class Visit:
    """Every step in turn, until `deadline` (of the machine's clock). What one leaves of its time
    is shared among those behind it; what is over is not run again. environment: variables of all
    commands. tick: called now and then while something runs."""

    steps: Sequence[Step]
    state: State
    folder: Path
    cwd: Path
    deadline: float
    environment: Mapping[str, str] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    progress: Callable[[str], None] = lambda text: None
    tick: Callable[[], None] = lambda: None

    def run(self) -> None:
        for i, step in enumerate(self.steps):
            waiting = [task for task in step.tasks if not self.state.over(task)]
            if step.impossible:
                self.progress(f"{step.name}: {step.impossible}")
                for task in waiting:
                    self.state.set(task, state="not possible", reason=step.impossible)
                continue
            if waiting:
                behind = [
                    s
                    for s in self.steps[i + 1 :]
                    if not s.impossible and any(not self.state.over(t) for t in s.tasks)
                ]
                seconds = share([step, *behind], self.deadline - self.machine.now())
                self._run_step(step, waiting, seconds)

    def _run_step(self, step: Step, waiting: list[Task], seconds: float) -> None:
        until = ticked = self.machine.now()
        until += seconds
        under_way: list[Running] = []
        with _stopping(under_way):
            while waiting or under_way:
                for running in [r for r in under_way if r.finished()]:
                    under_way.remove(running)
                    if reason := self.state.of(running.task).get("reason"):
                        self.progress(f"{running.task.name}: {reason}")
                while waiting and len(under_way) < step.at_once:
                    self._next(step, waiting, until, under_way)
                if self.machine.now() >= ticked + TICK_SECONDS:
                    ticked = self.machine.now()
                    self.tick()
                if waiting or under_way:
                    self.machine.sleep(POLL_SECONDS)

    def _next(
        self, step: Step, waiting: list[Task], until: float, under_way: list[Running]
    ) -> None:
        task, left = waiting.pop(0), until - self.machine.now()
        if left < LEAST_SECONDS:
            self.state.set(task, state=self.state.of(task).get("state", "not started"))
            return
        # Those that still wait get their part of what is left, but what comes first should rather
        # finish than leave everybody too little.
        rest = sum(t.weight for t in waiting)
        own = step.at_once * left * task.weight / (task.weight + rest)
        limit = min(left, max(own, LEAST_SHARE))
        self.progress(f"{task.name}, at most {limit:.0f} s")
        under_way.append(Running(task, self, limit))


@contextmanager
def _stopping(under_way: list[Running]) -> Iterator[None]:
    """Nothing is left running when the block is left early."""
    try:
        yield
    finally:
        for running in under_way:
            running.stop()

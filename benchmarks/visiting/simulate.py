"""A visit of which nothing is run: what would be home by when, if every step took its estimate."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.visiting.budget import Machine, State, Step, Task, Visit


class _Over(Exception):
    pass


class _Process:
    """A command whose output is due at certain times."""

    pid = 0

    def __init__(self, clock: Clock, task: Task) -> None:
        self.clock, self.task = clock, task
        self.returncode: int | None = None
        self.due: list[tuple[float, str]] = []
        end = clock.time
        for what, seconds in task.estimate:
            end += seconds
            self.due.append((end, what))
        self.end = end

    def brought(self) -> list[str]:
        return [what for due, what in self.due if due <= self.clock.time]

    def poll(self) -> int | None:
        if self.returncode is None and self.clock.time >= self.end:
            self.returncode = 0
            self.clock.home[self.task.name] = self.brought()
        return self.returncode


@dataclass
class Clock(Machine):
    """Time passes only while somebody sleeps, and at `end` everything does."""

    end: float
    time: float = 0.0
    home: dict[str, list[str]] = field(default_factory=dict)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        if self.time >= self.end:
            raise _Over

    def start(
        self, task: Task, command: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path,
        how: str,
    ) -> _Process:  # fmt: skip
        out.write_text("")
        return _Process(self, task)

    def stop(self, process: _Process) -> None:
        process.returncode = -15
        self.home[process.task.name] = process.brought()


@dataclass(frozen=True)
class Home:
    """What one task would have brought: done of all that it can bring."""

    task: str
    state: str
    done: list[str]
    missing: list[str]


def simulate(steps: Sequence[Step], minutes: float, cut: float) -> list[Home]:
    """Of a visit planned for so many minutes and ended after `cut` of them, task by task."""
    clock = Clock(60 * cut)
    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder) / "visit.json")
        visit = Visit(steps, state, Path(folder), Path(folder), 60 * minutes, machine=clock)
        with suppress(_Over):
            visit.run()
    found = []
    for task in (task for step in steps for task in step.tasks):
        done = clock.home.get(task.name, [])
        missing = [what for what, _ in task.estimate][len(done) :]
        found.append(Home(task.name, state.of(task).get("state", ""), done, missing))
    return found

"""A pytest plugin that keeps the outcome of every test at once, and goes on where a run stopped.

    python -m pytest -p benchmarks.visiting.outcomes --outcomes FILE tests/test_attention.py

FILE gets one JSON line when a test starts and one when it has ended. What has ended is not run
again with the same FILE; what was under way when the run was killed comes last, so that a test that
hangs or crashes does not keep the others from being run. Parity comes first; compilers and exports
say little about kernels and come late. After an error of the device, which spoils every later call
of the process, pytest exits with `resume.AGAIN`. The exit status is that of all that is in FILE,
whoever ran it: with nothing left to run, too, and with what has failed before. With pytest-xdist
the process that starts the others reads and writes FILE.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure.resume import AGAIN, drop_half_a_line, is_sticky

if TYPE_CHECKING:
    import pytest


@dataclass
class Outcomes:
    """What a file of outcomes says. ended: test -> its line; started: those that did not end."""

    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    device: str = ""

    @classmethod
    def read(cls, path: Path) -> Outcomes:
        found = cls()
        started: dict[str, None] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off while it was written
            if "device" in values:
                found.device = values["device"]
            elif "outcome" in values:
                # A teardown that fails comes after a call that passed.
                found.ended[values["test"]] = values
            else:
                started[values["test"]] = None
        found.started = [test for test in started if test not in found.ended]
        return found

    def counts(self) -> Counter[str]:
        return Counter(line["outcome"] for line in self.ended.values())


def merged(paths: Iterable[Path]) -> Outcomes:
    """Several files as one."""
    whole = Outcomes()
    for found in map(Outcomes.read, paths):
        whole.ended |= found.ended
        whole.started += found.started
        whole.device = whole.device or found.device
    return whole


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that keeps the outcome of every test")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        before = Outcomes({test: {} for test in config.workerinput["ended"]})
        before.started = config.workerinput["started"]
        config.pluginmanager.register(_Chooser(before), "outcomes-chooser")
        config.pluginmanager.register(_Worker(), "outcomes-worker")
    elif path := config.getoption("outcomes"):
        before = Outcomes.read(path)
        config.pluginmanager.register(_Chooser(before), "outcomes-chooser")
        alone = not config.getoption("numprocesses", None)
        config.pluginmanager.register(_Writer(path, alone), "outcomes-writer")
        if config.pluginmanager.hasplugin("xdist"):
            config.pluginmanager.register(_Sharer(before), "outcomes-sharer")


LATE = ("opcheck", "export", "compile", "reduce_overhead")


def _urgency(test: str) -> int:
    return 2 if any(word in test for word in LATE) else "::TestParity::" not in test


class _Chooser:
    """Which tests are left to be run, in which order."""

    def __init__(self, before: Outcomes) -> None:
        self.before = before

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        ended = [item for item in items if item.nodeid in self.before.ended]
        config.hook.pytest_deselected(items=ended)
        left = [item for item in items if item.nodeid not in self.before.ended]
        started = set(self.before.started)
        items[:] = sorted(left, key=lambda x: (x.nodeid in started, _urgency(x.nodeid)))


class _Sharer:
    """Tells the processes of pytest-xdist what has ended: all must choose the same."""

    def __init__(self, before: Outcomes) -> None:
        self.before = before

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput |= {"ended": list(self.before.ended), "started": self.before.started}


class _Worker:
    """One process of pytest-xdist: it ends after an error of the device, and another is started."""

    def __init__(self) -> None:
        self.broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.broken |= report.failed and is_sticky(report.longreprtext)

    def pytest_runtest_logfinish(self) -> None:
        if self.broken:
            os._exit(1)


class _Writer:
    """alone: whether the tests run in this process, which an error of the device ends."""

    def __init__(self, path: Path, alone: bool) -> None:
        self.path = path
        self.alone = alone
        self.sticky: set[str] = set()
        if path.is_file():
            drop_half_a_line(path)
        self._write(device=_device())

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        counts = Outcomes.read(self.path).counts()
        if exitstatus in (0, 5) and counts:  # all has passed here, or no test was left
            session.exitstatus = int(counts["failed"] > 0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.nodeid in self.sticky:
            return  # that its process has ended is known, and why
        self._write(
            test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2),
            reason=_reason(report),
        )  # fmt: skip
        if not (report.failed and is_sticky(report.longreprtext)):
            return
        self.sticky.add(report.nodeid)
        if self.alone:
            import pytest  # who only reads outcomes may do without

            pytest.exit("the device is in error; to be run again", returncode=AGAIN)

    def _write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _device() -> str:
    """Where kernels run in these tests: the name of the GPU, or the interpreter."""
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    return f"{where}, {'interpreted' if interpreted else 'compiled'}"


def _reason(report: pytest.TestReport) -> str:
    """The last line of an error, or why a test was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0] if lines else ""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure.resume import AGAIN, drop_half_a_line, is_sticky

if TYPE_CHECKING:
    import pytest

LATE = ("opcheck", "export", "compile", "reduce_overhead")


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that keeps the outcome of every test")


def pytest_configure(config: pytest.Config) -> None:
    plugins: list[Any] = []
    if before := getattr(config, "workerinput", {}).get("outcomes"):
        plugins = [_Chooser(*before), _Worker()]
    elif path := config.getoption("outcomes"):
        found = Outcomes.read(path)
        alone = not config.getoption("numprocesses", None)
        chosen = list(found.ended), found.started
        plugins = [_Chooser(*chosen), _Writer(path, alone)]
        if config.pluginmanager.hasplugin("xdist"):
            plugins.append(_Sharer(chosen))
    for plugin in plugins:
        config.pluginmanager.register(plugin)


class _Chooser:
    """Which tests are left to be run, in which order."""

    def __init__(self, ended: list[str], started: list[str]) -> None:
        self.ended, self.started = {*ended}, {*started}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        config.hook.pytest_deselected(items=[x for x in items if x.nodeid in self.ended])
        left = [item for item in items if item.nodeid not in self.ended]
        items[:] = sorted(left, key=lambda x: (x.nodeid in self.started, self._urgency(x.nodeid)))

    def _urgency(self, test: str) -> int:
        return 2 if any(word in test for word in LATE) else "::TestParity::" not in test


class _Sharer:
    """Tells the processes of pytest-xdist what has ended: all must choose the same."""

    def __init__(self, before: tuple[list[str], list[str]]) -> None:
        self.before = before

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["outcomes"] = self.before


class _Worker:
    """One process of pytest-xdist: it ends after an error of the device, and another is started."""

    broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.broken |= report.failed and is_sticky(report.longreprtext)

    def pytest_runtest_logfinish(self) -> None:
        if self.broken:
            os._exit(1)


class _Writer:
    """alone: whether the tests run in this process, which an error of the device ends."""

    def __init__(self, path: Path, alone: bool) -> None:
        import torch

        self.path, self.alone = path, alone
        self.sticky: set[str] = set()
        if path.is_file():
            drop_half_a_line(path)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self._write(device=f"{where}, {'interpreted' if interpreted else 'compiled'}")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended = Outcomes.read(self.path).ended.values()
        if exitstatus in (0, 5) and ended:  # all has passed here, or no test was left
            session.exitstatus = int(any(line["outcome"] == "failed" for line in ended))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Of a test whose process has ended it is known already, and why.
        if (report.when != "call" and report.passed) or report.nodeid in self.sticky:
            return
        self._write(
            test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2),
            reason=_reason(report),
        )  # fmt: skip
        if report.failed and is_sticky(report.longreprtext):
            self.sticky.add(report.nodeid)
            if self.alone:
                import pytest  # who only reads outcomes may do without

                pytest.exit("the device is in error; to be run again", returncode=AGAIN)

    def _write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """The last line of an error, or why a test was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines()
    return lines[0] if lines else ""

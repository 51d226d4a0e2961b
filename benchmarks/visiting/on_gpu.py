"""A pytest plugin for tests of kernels on a GPU, by several processes of pytest-xdist.

Parity comes first; compilers and exports say little about kernels and come late. After an error of
the device, which spoils every later call of a process, that process ends, and another is started.
Terminated, pytest still says what has failed.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from benchmarks.measure.resume import is_sticky

if TYPE_CHECKING:
    import pytest

LATE = ("opcheck", "export", "compile", "reduce_overhead")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class Worker:
    """A process that runs tests."""

    broken = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: _urgency(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.broken |= report.failed and is_sticky(report.longreprtext)

    def pytest_runtest_logfinish(self) -> None:
        if self.broken:
            os._exit(1)


def _urgency(test: str) -> int:
    return 2 if any(word in test for word in LATE) else "::TestParity::" not in test

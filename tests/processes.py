"""Processes that a test started by way of others."""

import os
import time
from pathlib import Path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of nobody who waits stays as a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def started(path: Path) -> int:
    """The number of the process that writes it to this file."""
    until = time.monotonic() + 60
    while not path.is_file() or not path.read_text().endswith("\n"):
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(path.read_text())


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)

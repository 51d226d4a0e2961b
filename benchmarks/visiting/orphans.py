"""Nothing that a visit has started outlives it, not even one that was killed.

Everything a visit starts carries the visit's folder in its environment, and hands it on. A second
process, in a session of its own, waits until the visit is gone, however it went, and kills what
carries the mark; the next visit to the folder looks once more before it starts.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "EQUISEG_FAST_VISIT"
PATIENCE_SECONDS = 10.0
"""What is stuck in a driver survives even SIGKILL."""


def marked(folder: str) -> list[int]:
    """Processes that a visit to this folder has started. (Those that have ended, but were not
    waited for, have no environment any more.)"""
    mark, found = f"{MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # of another user, or gone meanwhile
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end(folder: str) -> int:
    """Kill them; how many there were. What they held of a GPU is free only once they are gone."""
    ended: set[int] = set()
    until = time.monotonic() + PATIENCE_SECONDS
    while (found := marked(folder)) and time.monotonic() < until:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= {*found}
        time.sleep(0.05)
    return len(ended)


@contextmanager
def ended_with_this_process(folder: str) -> Iterator[None]:
    """What carries the mark inside the block is killed when the block is left, and when this
    process ends in it."""
    # Isolated: it imports nothing of ours, and so is there at once.
    command = (sys.executable, "-I", "-S", __file__, folder)
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watcher.communicate()


if __name__ == "__main__":
    sys.stdin.read()  # ends when nobody is left who could write
    end(sys.argv[1])

"""What lets a command go on in a new process, after an error that no process survives.

An error of the device spoils every later call of a process, a failed capture of a CUDA graph every
later capture. A command that meets one writes down how far it came and ends with `AGAIN`; whoever
started it starts it again.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AGAIN = 75
"""Exit status of a command that wants to be started again."""

STICKY = (
    "CUDA error", "cudaError", "device-side assert", "illegal memory access", "misaligned address",
    "unspecified launch failure", "illegal instruction", "CUDNN_STATUS_EXECUTION_FAILED",
)  # fmt: skip
"""Triton and the libraries report the error of a kernel before them in words of their own."""


def is_sticky(message: str) -> bool:
    """Whether an error spoils every later call of its process."""
    return any(word in message for word in STICKY)


def said(error: BaseException) -> str:
    """Type and first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Again(Exception):
    """This process can measure no more; the message says why."""


def drop_half_a_line(path: Path) -> None:
    """Whoever wrote last to a file of lines may have been killed in the middle of one."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


class Journal:
    """What was tried, in `journal.jsonl` of a folder of results.

    A line for every attempt that starts, for its end, and for every capture that failed. What was
    under way twice when its process ended is not tried a third time. patience: seconds after which
    an attempt ends its process (SIGALRM ends also what hangs in a driver); None for any time.
    """

    def __init__(self, folder: Path, resume: bool, patience: int | None = None) -> None:
        self.path = folder / "journal.jsonl"
        self.patience = patience
        self.lost: Counter[tuple[str, str]] = Counter()
        self.uncaptured: dict[tuple[str, str, str], str] = {}
        if not resume or not self.path.is_file():
            self.path.write_text("")
        drop_half_a_line(self.path)
        for line in self.path.read_text().splitlines():
            values = json.loads(line)
            who = values["case"], values["provider"]
            if values["what"] == "capture failed":
                self.uncaptured[(*who, values["mode"])] = values["reason"]
            else:
                self.lost[who] += 1 if values["what"] == "start" else -1

    def refused(self, case: str, provider: str = "") -> str:
        """Why a provider, or the case as such, is not tried again; empty if it may be."""
        twice = self.lost[case, provider] >= 2
        return "the process ended twice while it ran" if twice else ""

    def close(self) -> None:
        """Everything was done: nothing is left to go on with."""
        self.path.unlink()

    @contextmanager
    def attempt(self, case: str, provider: str = "") -> Iterator[None]:
        """Around what may take the process along: by one provider, or for all of them at once. An
        error of the device is no end of it."""
        self._write(what="start", case=case, provider=provider)
        if self.patience:
            signal.alarm(self.patience)
        ended = True
        try:
            yield
        except BaseException as error:  # Ctrl-C, too, says nothing about the attempt
            ended = not is_sticky(str(error))
            raise
        finally:
            if self.patience:
                signal.alarm(0)
            if ended:
                self._write(what="end", case=case, provider=provider)

    def capture_failed(self, case: str, provider: str, mode: str, reason: str) -> None:
        self._write(what="capture failed", case=case, provider=provider, mode=mode, reason=reason)

    def _write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

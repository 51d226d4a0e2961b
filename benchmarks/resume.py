"""What lets a command go on in a new process, after an error that no process survives.

An error of the device spoils every later call of a process, a failed capture of a CUDA graph every
later capture. A command that meets one writes down how far it came and ends with `AGAIN`; whoever
started it starts it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AGAIN = 75
"""Exit status of a command that wants to be started again."""

STICKY = ("CUDA error", "device-side assert", "cudaError")


def is_sticky(message: str) -> bool:
    """Whether an error spoils every later call of its process."""
    return any(word in message for word in STICKY)


class Again(Exception):
    """This process can measure no more; the message says why."""


class Journal:
    """What was tried, in `journal.jsonl` of a folder of results.

    A line for every attempt that starts, for its end, and for every capture that failed. What was
    under way twice when its process ended is not tried a third time.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path = folder / "journal.jsonl"
        self.lost: Counter[tuple[str, str]] = Counter()
        self.uncaptured: dict[tuple[str, str, str], str] = {}
        if not resume or not self.path.is_file():
            self.path.write_text("")
        for line in self.path.read_text().splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off while it was written
            who = values["case"], values["provider"]
            if values["what"] == "capture failed":
                self.uncaptured[(*who, values["mode"])] = values["reason"]
            else:
                self.lost[who] += 1 if values["what"] == "start" else -1

    def refused(self, case: str, provider: str) -> str:
        """Why a provider is not tried again on a case; empty if it may be."""
        if self.lost[case, provider] < 2:
            return ""
        return "the process ended twice while it ran"

    def close(self) -> None:
        """Everything was done: nothing is left to go on with."""
        self.path.unlink()

    @contextmanager
    def attempt(self, case: str, provider: str) -> Iterator[None]:
        """Around what may take the process along."""
        self._write(what="start", case=case, provider=provider)
        try:
            yield
        finally:
            self._write(what="end", case=case, provider=provider)

    def capture_failed(self, case: str, provider: str, mode: str, reason: str) -> None:
        self._write(what="capture failed", case=case, provider=provider, mode=mode, reason=reason)

    def _write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

"""What a run says while it goes: lines of JSON, TensorBoard, and a progress bar."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from equiseg_fast._command import progress_bar
from equiseg_fast._files import as_json

from .files import METRICS, TENSORBOARD

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None  # type: ignore[assignment]


class Log:
    """`metrics.jsonl`, one line per log and per validation, and the same numbers for TensorBoard.

    length, step: of what a checkpoint knows; what was written later is dropped, because it will be
    written again. Raises ValueError while another process writes there.
    """

    def __init__(self, out: Path, length: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / METRICS
        self._file = self.path.open("ab")
        try:
            if fcntl is not None:
                # Of the process, not of its children: loaders that outlive a kill hold no lock.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"out must be of one training at a time; {out} is in use") from error
        self._file.truncate(min(length, self.path.stat().st_size))
        self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, whose fractional numbers become scalars, also those in mappings."""
        text = json.dumps(as_json(line), allow_nan=False)
        try:
            self._file.write(text.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for name, value in line.items():
            entries = value if isinstance(value, Mapping) else {"": value}
            for key, x in entries.items():
                if isinstance(x, float):
                    tag = f"{line['split']}/{name}" + (f"/{key}" if key else "")
                    self._board.add_scalar(tag, x, line["step"])

    def length(self) -> int:
        """Bytes that are safe on the disk."""
        os.fsync(self._file.fileno())
        self._board.flush()
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Let go of the files."""
        self._file.close()
        self._board.close()


class Screen:
    """A progress bar where there is a terminal, lines where there is none, nothing without a
    console."""

    def __init__(self, console: Console | None, steps: int, step: int) -> None:
        self.console = console
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = progress_bar(console)
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Step `step` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def logged(self, line: Mapping[str, Any]) -> None:
        """Show what was logged of the training."""
        parts = [f"{key} {line[key]:.3g}" for key in ("loss", "seg", "sgm", "lr")]
        parts.append(f"{line['images_per_second']:.1f} images/s")
        shares = line.get("contributions", {})
        parts += [" ".join(f"{name} {100 * x:.0f}%" for name, x in shares.items())]
        text = "  ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.say(f"step {line['step']}  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

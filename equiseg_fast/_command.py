"""What the command lines share: exit status, messages, and where progress is shown."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

INTERRUPTED = 130

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of autocast."""

LIBRARIES = (
    "PIL", "cv2", "matplotlib", "rich", "safetensors", "tensorboard", "torchmetrics", "yaml"
)  # fmt: skip
"""What the extra [train] installs, by the names to import."""


class Failed(Exception):
    """The work was done as asked and came out wrong: exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work in good order: exit status 128 + its number, as of a shell."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def parser_of(module: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help fits a screen of 80 columns, for `python -m equiseg_fast.<module>`."""
    return argparse.ArgumentParser(
        prog=f"python -m equiseg_fast.{module}",
        usage=usage,
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80),
        allow_abbrev=False,
    )


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, work, and return the exit status.

    0: done. 1: `Failed`. 2: usage, a bad value, a file that cannot be read or written, a package
    that is not installed; one line says which. 130: Ctrl-C, or 128 and the number of the signal
    that `Interrupted` tells. Anything else is a defect of ours and keeps its traceback.
    """
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # --help and usage errors, already printed
        return int(stop.code or 0)
    try:
        # at once, not where the first picture is drawn after hours
        if missing := [name for name in LIBRARIES if find_spec(name) is None]:
            raise ImportError(
                f'{", ".join(missing)} must be installed: pip install "equiseg-fast[train]"'
            )
        work(args)
    except Failed as error:
        return _say(parser, str(error), 1)
    except Interrupted as stop:
        return _say(parser, str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _say(parser, "interrupted; the same command goes on", INTERRUPTED)
    except (ValueError, TypeError, ImportError) as error:
        return _say(parser, str(error), 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(parser, f"{where}{error.strerror or error}", 2)
    return 0


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one and the CPU otherwise.

    Raises ValueError for one that PyTorch does not know or see.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that PyTorch sees; got {name!r}: {reason}") from None
    return device


def progress_bar(console: "Console", *, transient: bool = False) -> "Progress":
    """A bar: how much is done of what there is, how long the rest takes, and a description."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=transient,
    )


def _say(parser: argparse.ArgumentParser, message: str, status: int) -> int:
    if message:  # of several processes one speaks
        print(f"{parser.prog}: {'error: ' if status < 128 else ''}{message}", file=sys.stderr)
    return status

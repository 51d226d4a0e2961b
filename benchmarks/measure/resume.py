"""Errors that no process survives, and how a command says that it wants to go on in a new one.

An error of the device spoils every later call of a process, a failed capture of a CUDA graph every
later capture. A command that meets one keeps what it has and ends with `AGAIN`; whoever started it
starts it again.
"""

from __future__ import annotations

from pathlib import Path

AGAIN = 75
"""Exit status of a command that wants to be started again."""

STICKY = (
    "CUDA error", "cudaError", "device-side assert", "illegal memory access", "misaligned address",
    "unspecified launch failure", "illegal instruction", "CUDNN_STATUS_EXECUTION_FAILED",
)  # fmt: skip
"""Triton and the libraries report the error of a kernel before them in words of their own."""


class Again(RuntimeError):
    """This process can measure no more; the message says why."""


def is_sticky(message: str) -> bool:
    """Whether an error spoils every later call of its process."""
    return any(word in message for word in STICKY)


def said(error: BaseException) -> str:
    """Type and first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def drop_half_a_line(path: Path) -> None:
    """Whoever wrote last to a file of lines may have been killed in the middle of one."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])

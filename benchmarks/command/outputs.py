"""Where a command writes: what stands against it is said before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def writable(path: Path, *holds: str, hint: str = "", option: str = "--out") -> Path:
    """The path, if files can be written into this folder, or into a new one of that name. Raises
    ValueError if not, or if it has any of `holds`, which an earlier run leaves behind."""
    nearest = next(p for p in (path, *path.parents) if p.exists())
    try:
        with TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        why = error.strerror if nearest == path else f"{nearest}: {error.strerror}"
        raise ValueError(
            f"{option} must be a folder that can be written to; got {path}: {why}"
        ) from error
    if found := [name for name in holds if (path / name).exists()]:
        raise ValueError(
            f"{option} must be a new folder, as nothing is overwritten; {path} has "
            f"{found[0]} of an earlier run{hint}"
        )
    return path


def writable_file(path: Path, option: str = "--out") -> Path:
    """The path, if this file can be written, over what is there. Raises ValueError."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file; {path} is a folder")
    writable(path.parent, option=option)
    return path


def write(path: Path, text: str) -> None:
    """The whole file or, if the disk is full or the process ends, what was there before."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def fresh(path: Path) -> Path:
    """The path, with a number behind it if something is there already."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in range(2, 1000))
    return next(p for p in (path, *numbered) if not p.exists())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError naming the file if there is none in it, and
    FileNotFoundError."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be an object; got {type(found).__name__}")
    return found

"""Files that are there whole or not at all, and what YAML and JSON hold."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside `path`, then put it in its place. Raises OSError naming the path."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields and values in a YAML file.

    Raises ValueError naming a file that holds anything else, OSError if there is none, ImportError
    without pyyaml.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f'{path} needs pyyaml: pip install "equiseg-fast[train]"') from error
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold fields and values; got {type(content).__name__}")
    return dict(content)


def as_json(x: Any) -> Any:
    """A value as JSON and YAML have it: lists for tuples, None for NaN and infinity."""
    if isinstance(x, Mapping):
        return {name: as_json(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [as_json(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x

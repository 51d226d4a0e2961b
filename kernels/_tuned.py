"""Launch configurations that a search found to be faster, from a file; none unless asked for.

Pure Python, no Triton. Such a file replaces choices of the functions in `_configs` for some of
their arguments: architecture, precision, channels, but never the size of an image or a batch, so
that what it says holds for all of them. `python -m benchmarks tune` writes one; people read it
before they use it, by naming it in the environment variable EQUISEG_FAST_TUNED or with `use`. The
same file and the same input give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "EQUISEG_FAST_TUNED"
SCHEMA = 1

Key = tuple[str, tuple[Any, ...]]
"""Name of a function in `_configs` and its arguments."""
Table = Mapping[Key, Any]
_Choose = TypeVar("_Choose", bound=Callable[..., Any])

_functions: dict[str, Callable[..., Any]] = {}


class _Choices:
    """A table, and what was chosen while it was in use: most calls repeat an earlier one.

    What is chosen depends on the table also where it says nothing, as functions in `_configs` call
    one another. The size of an image or a batch is no argument, so there are few different calls.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.made: dict[Key, Any] = {}


# Of the process, not of a context: the backward of a GPU runs on a thread of its own.
_in_use: _Choices | None = None
_in_environment = _Choices({})


def _current() -> _Choices:
    global _in_environment
    if _in_use is not None:
        return _in_use
    table = from_environment()
    if _in_environment.table is not table:
        _in_environment = _Choices(table)
    return _in_environment


remembered = functools.lru_cache(256)
"""For functions of numbers that run before every launch, with other numbers only where a shape is
another. Nobody may change what they return."""


def tunable(choose: _Choose) -> _Choose:
    """Let the table in use decide first; `choose` takes its arguments by position."""
    name = choose.__name__
    _functions[name] = choose

    @functools.wraps(choose)
    def chosen(*arguments: Any) -> Any:
        choices, key = _current(), (name, arguments)
        config = choices.made.get(key)
        if config is None:
            config = choices.table.get(key)
            if config is None:
                config = choose(*arguments)
            choices.made[key] = config
        return config

    return chosen  # type: ignore[return-value]


def default(key: Key) -> Any:
    """What is launched without any table."""
    name, arguments = key
    return _functions[name](*arguments)


@contextmanager
def use(table: Table) -> Iterator[None]:
    """This table and no other, in the whole process; an empty one for the defaults."""
    global _in_use
    previous, _in_use = _in_use, _Choices(table)
    try:
        yield
    finally:
        _in_use = previous


@functools.cache
def from_environment() -> Table:
    """The table that EQUISEG_FAST_TUNED names, read once; empty if it names none."""
    path = os.environ.get(VARIABLE)
    return read(Path(path)) if path else {}


def read(path: Path) -> dict[Key, Any]:
    """The table of a file. Raises ValueError naming the file and the entry that is wrong."""
    # Only what is imported has said that it is tunable.
    importlib.import_module("equiseg_fast.kernels._configs")
    try:
        content = json.loads(path.read_text())
        schema, entries = content["schema"], content["configs"]
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{VARIABLE} must name a file of `python -m benchmarks tune`; {path.name} is none "
            f"({type(error).__name__}: {error})"
        ) from error
    if schema != SCHEMA:
        raise ValueError(f"{path.name}: schema must be {SCHEMA}; got {schema!r}")
    return dict(_entry(path.name, entry) for entry in entries)


def _entry(file: str, entry: Mapping[str, Any]) -> tuple[Key, Any]:
    name, arguments = entry["function"], tuple(entry["arguments"])
    if name not in _functions:
        raise ValueError(f"{file}: function must be one of {sorted(_functions)}; got {name!r}")
    try:
        known = asdict(default((name, arguments)))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file}: {name} takes no arguments {list(arguments)} ({error})"
        ) from error
    for field, value in entry["config"].items():
        if field not in known:
            raise ValueError(f"{file}: {name} has {', '.join(known)}; got {field!r}")
        if type(known[field]) is bool:
            kind, fits = "a bool", type(value) is bool
        else:
            kind, fits = "a positive integer", type(value) is int and value > 0
        if not fits:
            raise ValueError(f"{file}: {field} of {name} must be {kind}; got {value!r}")
    return (name, arguments), replace(default((name, arguments)), **entry["config"])


def write(path: Path, configs: list[dict[str, Any]], made_on: Mapping[str, Any]) -> None:
    """A file that `read` understands. configs: dictionaries with "function", "arguments", "config"
    and whatever else a reader should know; made_on: the device and versions of the search."""
    content = {"schema": SCHEMA, "made_on": dict(made_on), "configs": configs}
    path.write_text(json.dumps(content, indent=1) + "\n")

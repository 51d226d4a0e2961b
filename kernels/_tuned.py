"""Launch configurations that a search found to be faster, from a file; none unless asked for.

Pure Python, no Triton. Such a file replaces choices of the `*_config` functions of the kernel files
for some of their arguments: architecture, precision, channels, but never the size of an image or a
batch, so that what it says holds for all of them. `python -m benchmarks tune` writes one; people
read it before they use it, by naming it in the environment variable EQUISEG_FAST_TUNED or with
`use`. The same file and the same input give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from equiseg_fast.kernels._arch import INTERPRETER, ITEMSIZES, PRECISIONS, Tile

VARIABLE = "EQUISEG_FAST_TUNED"
SCHEMA = 1

WARPS = (1, 2, 4, 8, 16)

Key = tuple[str, tuple[Any, ...]]
"""Name of a `*_config` function and its arguments."""
Table = Mapping[Key, Tile]
_Choose = TypeVar("_Choose", bound=Callable[..., Tile])

ARGUMENTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch": (
        "0 for the interpreter, or 10 * major + minor of a compute capability from 8.0 on",
        lambda x: x == INTERPRETER or x >= 80,
    ),
    "precision": (f"one of {', '.join(PRECISIONS)}", lambda x: x in PRECISIONS),
    "itemsize": (" or ".join(map(str, ITEMSIZES)), lambda x: x in ITEMSIZES),
    **dict.fromkeys(
        ("channels", "classes", "num_classes", "modalities"),
        ("a positive integer", lambda x: x > 0),
    ),
}
"""What arguments of the functions may be, in words and as a test; `attention` adds its own."""

_functions: dict[str, Callable[..., Tile]] = {}
_least: dict[str, Callable[..., Mapping[str, int]]] = {}


class _Choices:
    """A table, and what was chosen while it was in use: most calls repeat an earlier one.

    What is chosen depends on the table also where it says nothing, as the functions call one
    another. The size of an image or a batch is no argument, so there are few different calls.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.made: dict[Key, Tile] = {}


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
another. Callers must not modify what they return."""


def tunable(choose: _Choose) -> _Choose:
    """Let the table in use decide first; `choose` takes its arguments by position.

    Raises ValueError for an argument that is none of `ARGUMENTS`, such as an itemsize of 1.
    """
    name = choose.__name__
    _functions[name] = choose

    @functools.wraps(choose)
    def chosen(*arguments: Any) -> Any:
        choices, key = _current(), (name, arguments)
        config = choices.made.get(key)
        if config is None:
            check_arguments(name, arguments)
            config = choices.table.get(key)
            if config is None:
                config = choose(*arguments)
            else:
                _check_once(key, config)
            choices.made[key] = config
        return config

    return chosen  # type: ignore[return-value]


def at_least(least: Callable[..., Mapping[str, int]]) -> Callable[[_Choose], _Choose]:
    """What the kernel cannot do without, whoever chooses: the least values of some fields, from
    the arguments of the function. Goes under `tunable`."""

    def named(choose: _Choose) -> _Choose:
        _least[choose.__name__] = least
        return choose

    return named


def check_arguments(function: str, arguments: Sequence[Any]) -> None:
    """Raises ValueError naming the argument that is not what it has to be."""
    names = inspect.signature(_functions[function]).parameters
    for name, value in zip(names, arguments, strict=False):
        allowed, fits = ARGUMENTS[name]
        if type(value) is not (str if name == "precision" else int) or not fits(value):
            raise ValueError(f"{name} of {function} must be {allowed}; got {value!r}")


def default(key: Key) -> Tile:
    """What is launched without any table."""
    name, arguments = key
    with use({}):  # functions call one another, also while the file that decides is being read
        return _functions[name](*arguments)


@contextmanager
def use(table: Table) -> Iterator[dict[Key, Tile]]:
    """This table and no other, in the whole process; an empty one for the defaults. Yields what is
    chosen meanwhile."""
    global _in_use
    previous, _in_use = _in_use, (choices := _Choices(table))
    try:
        yield choices.made
    finally:
        _in_use = previous


@functools.cache
def from_environment() -> Table:
    """The table that EQUISEG_FAST_TUNED names, read once; empty if it names none."""
    path = os.environ.get(VARIABLE)
    return read(Path(path)) if path else {}


def check(key: Key, config: Any) -> None:
    """Raises TypeError or ValueError, naming function and field, unless the kernel can be launched
    with this configuration and is right with it."""
    name, arguments = key
    what = f"{name}{list(arguments)}"
    known = default(key).settings()
    if type(config) is not Tile or not config.settings().keys() <= known.keys():
        raise TypeError(f"{what} must be a tile with {', '.join(known)}; got {config!r}")
    least = _least[name](*arguments) if name in _least else {}
    for field in known:
        value = getattr(config, field)
        whole = type(value) is int and value > 0
        if type(known[field]) is bool:
            allowed, fits = "a bool", type(value) is bool
        elif field == "num_warps":
            allowed, fits = f"one of {', '.join(map(str, WARPS))}", whole and value in WARPS
        elif field.startswith("block_"):
            allowed, fits = "a power of two", whole and value.bit_count() == 1
        else:
            allowed, fits = "a positive integer", whole
        if not fits:
            raise ValueError(f"{what}: {field} must be {allowed}; got {value!r}")
        if field in least and value < least[field]:
            raise ValueError(f"{what}: {field} must be at least {least[field]}; got {value}")


_check_once = functools.lru_cache(check)


def read(path: Path) -> dict[Key, Tile]:
    """The table of a file. Raises ValueError naming the file, and the entry and field that are
    wrong, or that triton is not there."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE} must name a file of `python -m benchmarks tune`; {path.name} is none "
            f"({type(error).__name__}: {getattr(error, 'strerror', None) or error})"
        ) from error
    if type(found) is not dict or found.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} must be an object whose schema is {SCHEMA}")
    if type(found.get("configs")) is not list:
        raise ValueError(f"{path.name}: configs must be a list; got {found.get('configs')!r}")
    _import_kernels(path)
    table: dict[Key, Tile] = {}
    for i, entry in enumerate(found["configs"], start=1):
        try:
            key, config = _entry(entry)
            if key in table:
                raise ValueError(f"{key[0]}{list(key[1])} must be there once")
        except ValueError as error:
            raise ValueError(f"{path.name} entry {i}: {error}") from error
        table[key] = config
    return table


def _import_kernels(path: Path) -> None:
    """Only what is imported has said that it is tunable."""
    try:
        for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
            importlib.import_module(f"equiseg_fast.kernels.{file.stem}")
    except ImportError as error:
        raise ValueError(f"{path.name} is of no use without triton: {error}") from error


def _entry(entry: Any) -> tuple[Key, Tile]:
    members = ("function", "arguments", "config")
    if type(entry) is not dict or not entry.keys() >= set(members):
        raise ValueError(f"it must be an object with {', '.join(members)}; got {entry!r}")
    name, arguments, changes = (entry[member] for member in members)
    if type(name) is not str or name not in _functions:
        raise ValueError(f"function must be one of {sorted(_functions)}; got {name!r}")
    wanted = list(inspect.signature(_functions[name]).parameters)
    if type(arguments) is not list or len(arguments) != len(wanted):
        raise ValueError(f"arguments of {name} must be {wanted}; got {arguments!r}")
    if type(changes) is not dict:
        raise ValueError(f"config must be an object; got {changes!r}")
    check_arguments(name, arguments)
    key = name, tuple(arguments)
    chosen = default(key)
    known = chosen.settings()
    if unknown := [field for field in changes if field not in known]:
        raise ValueError(f"{name} has {', '.join(known)}; got {unknown[0]!r}")
    config = replace(chosen, **changes)
    check(key, config)
    return key, config

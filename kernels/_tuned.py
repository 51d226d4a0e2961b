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
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "EQUISEG_FAST_TUNED"
SCHEMA = 1

WARPS = (1, 2, 4, 8, 16)
LARGEST_TILE = 2**20
"""Elements; Triton has none that are larger."""

Key = tuple[str, tuple[Any, ...]]
"""Name of a function in `_configs` and its arguments."""
Table = Mapping[Key, Any]
_Choose = TypeVar("_Choose", bound=Callable[..., Any])

_functions: dict[str, Callable[..., Any]] = {}
_least: dict[str, Callable[..., Mapping[str, int]]] = {}


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


def default(key: Key) -> Any:
    """What is launched without any table."""
    name, arguments = key
    with use({}):  # functions call one another, also while the file that decides is being read
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


def check(key: Key, config: Any) -> None:
    """Raises TypeError or ValueError, naming function and field, unless the kernel can be launched
    with this configuration and is right with it."""
    name, arguments = key
    what = f"{name}{list(arguments)}"
    expected = _functions[name].__annotations__["return"]
    if type(config).__name__ != expected:
        raise TypeError(f"{what} must be a {expected}; got {config!r}")
    least = _least[name](*arguments) if name in _least else {}
    tile = 1
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        whole = type(value) is int and value > 0
        if field.type == "bool":
            allowed, fits = "a bool", type(value) is bool
        elif name == "num_warps":
            allowed, fits = f"one of {', '.join(map(str, WARPS))}", whole and value in WARPS
        elif name.startswith("block_"):
            allowed, fits = "a power of two", whole and value.bit_count() == 1
            tile *= value if fits else 1
        else:
            allowed, fits = "a positive integer", whole
        if not fits:
            raise ValueError(f"{what}: {name} must be {allowed}; got {value!r}")
        if name in least and value < least[name]:
            raise ValueError(f"{what}: {name} must be at least {least[name]}; got {value}")
    if tile > LARGEST_TILE:
        raise ValueError(f"{what}: blocks must hold at most {LARGEST_TILE} elements; got {tile}")


_check_once = functools.lru_cache(check)


def read(path: Path) -> dict[Key, Any]:
    """The table of a file. Raises ValueError naming the file, and the entry and field that are
    wrong."""
    table: dict[Key, Any] = {}
    places: dict[Key, int] = {}
    for i, entry in enumerate(content(path)["configs"], start=1):
        try:
            key, config = _entry(entry)
            if key in table:
                what = f"{key[0]}{list(key[1])}"
                raise ValueError(f"{what} must be there once; is also entry {places[key]}")
        except ValueError as error:
            raise ValueError(f"{path.name} entry {i}: {error}") from error
        table[key], places[key] = config, i
    return table


def content(path: Path) -> dict[str, Any]:
    """The object in a file, whose "configs" are a list of what nobody has looked at yet. Raises
    ValueError naming the file, and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE} must name a file of `python -m benchmarks tune`; {path.name} is none "
            f"({type(error).__name__}: {getattr(error, 'strerror', None) or error})"
        ) from error
    if _member(found, "schema", int, path.name) != SCHEMA:
        raise ValueError(f"{path.name}: schema must be {SCHEMA}; got {found['schema']!r}")
    _member(found, "configs", list, path.name)
    return found


def _member(of: Any, name: str, kind: type, what: str) -> Any:
    if type(of) is not dict:
        raise ValueError(f"{what} must be an object; got {type(of).__name__}")
    if name not in of:
        raise ValueError(f"{what} must have {name!r}; got {', '.join(map(repr, of)) or 'nothing'}")
    if type(of[name]) is not kind:
        raise ValueError(f"{what}: {name} must be of type {kind.__name__}; got {of[name]!r}")
    return of[name]


def _entry(entry: Any) -> tuple[Key, Any]:
    # Only what is imported has said that it is tunable.
    configs = importlib.import_module("equiseg_fast.kernels._configs")
    name = _member(entry, "function", str, "it")
    arguments = _member(entry, "arguments", list, "it")
    changes = _member(entry, "config", dict, "it")
    if name not in _functions:
        raise ValueError(f"function must be one of {sorted(_functions)}; got {name!r}")
    wanted = list(inspect.signature(_functions[name]).parameters)
    if len(arguments) != len(wanted):
        raise ValueError(f"arguments of {name} must be {wanted}; got {arguments}")
    for argument, value in zip(wanted, arguments, strict=True):
        if allowed := configs.argument_problem(argument, value):
            raise ValueError(f"{argument} of {name} must be {allowed}; got {value!r}")
    key = name, tuple(arguments)
    chosen = default(key)
    known = [field.name for field in fields(chosen)]
    if unknown := [field for field in changes if field not in known]:
        raise ValueError(f"{name} has {', '.join(known)}; got {unknown[0]!r}")
    config = replace(chosen, **changes)
    check(key, config)
    return key, config


def write(path: Path, configs: list[dict[str, Any]], made_on: Mapping[str, Any]) -> None:
    """A file that `read` understands. configs: dictionaries with "function", "arguments", "config"
    and whatever else a reader should know; made_on: the device and versions of the search."""
    content = {"schema": SCHEMA, "made_on": dict(made_on), "configs": configs}
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)  # a search that ends here has not lost what it had

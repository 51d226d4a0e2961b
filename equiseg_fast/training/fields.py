"""Fields of configurations from files and command lines: values by the type of the field."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from equiseg_fast.ops._checks import number

_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def values_of(
    cls: type, given: Mapping[str, Any], prefix: str = "", closed: Iterable[str] = ()
) -> dict[str, Any]:
    """Arguments for the dataclass `cls` from what a file or a command line says of its fields.

    closed: fields that nobody may set. Raises ValueError for a name that is no field, with the
    nearest, and for a value that a field cannot have.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.name not in set(closed)]
    for name in given:
        if name not in known:
            raise ValueError(unknown(name, known, prefix))
    return {name: convert(prefix + name, value, hints[name]) for name, value in given.items()}


def unknown(name: object, known: Iterable[str], prefix: str = "") -> str:
    """A message for a name that is no field."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{prefix}{name} is no field; {hint}"


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value`, of YAML or a string from a command line, as the type `hint` of field `name`.

    Types without a rule here take what comes: whoever defines them checks it.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if NoneType in options and (value is None or str(value).lower() in ("none", "null")):
            return None
        *others, last = (x for x in options if x is not NoneType)
        for option in others:
            try:
                return convert(name, value, option)
            except ValueError:
                continue
        return convert(name, value, last)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(str, options))}; got {value!r}")
        return value
    if origin is tuple:
        return _tuple(name, value, options)
    if hint is bool:
        found = _WORDS.get(str(value).lower())
        if found is None:
            raise ValueError(f"{name} must be true or false; got {value!r}")
        return found
    if hint in (int, float):
        return _number(name, value, hint)
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{name} must be a string; got {value!r}, which quotes would make one")
    return value


def _number(name: str, value: Any, kind: type) -> Any:
    what = "an integer" if kind is int else "a number"
    try:
        # Command lines have strings.
        found = kind(value) if isinstance(value, str) else value
        if kind is float:
            return number(name, found)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {what}; got {value!r}") from None
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{name} must be {what}; got {value!r}")
    return found


def _tuple(name: str, value: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    given = value
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    many = len(options) == 2 and options[1] is Ellipsis
    if not isinstance(value, list | tuple) or not (many or len(value) == len(options)):
        what = "a list" if many else f"a list of {len(options)}"
        how = ", with commas on a command line" if isinstance(given, str) else ""
        raise ValueError(f"{name} must be {what}{how}; got {given!r}")
    kinds = [options[0]] * len(value) if many else options
    return tuple(
        convert(f"{name}[{i}]", x, k) for i, (x, k) in enumerate(zip(value, kinds, strict=True))
    )

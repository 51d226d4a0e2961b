"""Train EQUISeg: `python -m equiseg_fast.train CONFIG.yaml [--field value ..]`."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from ._command import parser_of, run_command

USAGE = "python -m equiseg_fast.train CONFIG.yaml [--field value ..] [--dry-run]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, see `_command.run_command`."""
    plain, fields = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = parser_of("train", "Train EQUISeg, or go on where the folder `out` was left.", USAGE)
    parser.add_argument("config", metavar="CONFIG.yaml", help="fields and values, as below")
    parser.add_argument("--dry-run", action="store_true", help="plan, try a step, write nothing")
    if {"-h", "--help"} & set(plain):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _fields()
    return run_command(parser, partial(_train, fields), plain)


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """Arguments of the parser, and fields with their values; None where there is none, or the next
    option stands in its place."""
    plain: list[str] = []
    fields: dict[str, str | None] = {}
    rest = list(reversed(arguments))
    while rest:
        argument = rest.pop()
        name, equals, value = argument.partition("=")
        if name in ("--help", "--dry-run") or not name.startswith("--"):
            plain.append(argument)
        else:
            key = name[2:].replace("-", "_")
            follows = bool(rest) and not rest[-1].startswith("--")
            fields[key] = value if equals else rest.pop() if follows else None
    return plain, fields


def _train(fields: dict[str, str | None], args: argparse.Namespace) -> None:
    from rich.console import Console

    from .training import TrainConfig, train

    for name, value in fields.items():
        if value is None:
            raise ValueError(f"--{name} needs a value")
    config = TrainConfig.load(args.config, {name: str(x) for name, x in fields.items()})
    train(config, console=Console(), dry_run=args.dry_run)


def _fields() -> str:
    """All fields with their defaults, as many on a line as fit."""
    from dataclasses import MISSING, fields

    from .data import DataConfig
    from .models import EQUISegConfig
    from .training.config import FROM_DATA, TrainConfig

    lines = ["fields and their defaults:"]
    for prefix, cls, closed in (
        ("", TrainConfig, ("data", "model")),
        ("data.", DataConfig, ()),
        ("model.", EQUISegConfig, FROM_DATA),
    ):
        line = " "
        for field in fields(cls):
            if field.name in closed:
                continue
            default = "" if field.default is MISSING else f" {_short(field.default)}"
            entry = f" --{prefix}{field.name}{default}"
            if len(line) + len(entry) > 80:
                lines.append(line)
                line = " "
            line += entry
        lines.append(line)
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())

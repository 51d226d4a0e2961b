"""Values of command-line options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from benchmarks.registry import Shape
from benchmarks.runner import Case, Options, plan
from equiseg_fast.models.config import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
SHAPE_FIELDS = tuple(field.name for field in fields(Shape))


def names(text: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return tuple(name for name in text.split(",") if name)


def fraction(text: str) -> float:
    """`5%` or `0.05`."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 5% or 0.05; got {text!r}") from None


def shape_fields(text: str) -> dict[str, str | int]:
    """`stage=2,height=64` as fields of `Shape`."""
    found: dict[str, str | int] = {}
    for pair in names(text):
        name, _, value = pair.partition("=")
        if name not in SHAPE_FIELDS:
            raise argparse.ArgumentTypeError(
                f"must set some of {', '.join(SHAPE_FIELDS)}, as in stage=2,height=64; got {pair!r}"
            )
        if name == "variant":
            if value not in VARIANTS:
                raise argparse.ArgumentTypeError(
                    f"variant must be among {', '.join(VARIANTS)}; got {value!r}"
                )
            found[name] = value
            continue
        least = 0 if name == "stage" else 1
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{name} must be an integer >= {least}; got {value!r}")
        if name in ("height", "width") and int(value) % 32:
            raise argparse.ArgumentTypeError(f"{name} must be a multiple of 32; got {value}")
        found[name] = int(value)
    return found


def choose_device(name: str | None) -> torch.device:
    """The device of this name; without one the GPU if there is one. Raises ValueError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here")
    return device


def chosen_cases(options: Options, shape: Mapping[str, str | int]) -> list[Case]:
    """The plan with the fields of `shape` in place of the suite's, every case once."""
    cases: dict[str, Case] = {}
    for case in plan(options):
        changed = replace(case, shape=replace(case.shape, **shape))
        if bool(changed.shape.stage) != bool(case.shape.stage):
            changed = replace(changed, shape=replace(changed.shape, stage=case.shape.stage))
        cases.setdefault(changed.label, changed)
    return list(cases.values())


def verdict_arguments(parser: argparse.ArgumentParser) -> None:
    """When a difference counts, for `compare` and `against`."""
    parser.add_argument(
        "--threshold", type=fraction, default=0.05, metavar="5%%", help="least relative change"
    )
    parser.add_argument(
        "--atol-us", type=float, default=30.0, help="least absolute change, in microseconds"
    )
    parser.add_argument(
        "--fail", action="store_true", help="exit with 1 if anything is slower or lost"
    )


def case_arguments(parser: argparse.ArgumentParser, lists: Sequence[str]) -> None:
    """Which cases; lists: those of op, provider, dtype and mode that may be several."""
    for name in lists:
        parser.add_argument(f"--{name}", type=names, default=(), metavar="A,B", help="only these")
    parser.add_argument(
        "--shape",
        type=shape_fields,
        default={},
        metavar="K=V,..",
        help=f"instead of the suite's: {', '.join(SHAPE_FIELDS)}",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")

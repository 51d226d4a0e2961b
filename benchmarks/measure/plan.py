"""From options to cases: what a run does, known before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, MODES, Op, unavailable
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import Pairs, choose_device, names, pairs
from benchmarks.measure.record import UNTIMED, Record
from benchmarks.measure.suites import SUITES
from benchmarks.providers.provider import PROVIDERS
from equiseg_fast.models.config import VARIANTS


@dataclass(frozen=True)
class Options:
    """What to run, by name, empty for the suite's own choice.

    method: how a GPU is timed, "graph" (replays of a CUDA graph) or "eager" (single calls). at:
    (field of `Shape`, value), which every case then has instead of its own.
    """

    suite: str = "quick"
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    device: str = "cpu"
    method: str = "graph"
    seed: int = 0
    at: Pairs = ()

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """From `selection_arguments` and `device_arguments`. Raises ValueError if the device cannot
        be used."""
        device = choose_device(args.device, needed=not args.dry_run)
        return cls(
            args.suite, args.op, args.provider, args.dtype, args.mode, str(device), args.method,
            args.seed, args.at,
        )  # fmt: skip


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases of which suite, and at which other shape, for `run` and `against`."""
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    choices = {"op": operations(), "provider": PROVIDERS, "dtype": DTYPES, "mode": MODES}
    for name, values in choices.items():
        help = f"only: {', '.join(values)}"
        parser.add_argument(f"--{name}", type=names, default=(), metavar="A,B", help=help)
    parser.add_argument(
        "--at", type=pairs, default=(), metavar="K=V,..",
        help="every case at a shape of your own, as in variant=b2,stage=1,height=720,width=1280,"
        "batch=4,modalities=3; what is not given stays as the suite has it",
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype, in all its modes."""

    op: Op
    shape: Shape
    dtype: str
    modes: tuple[str, ...]
    providers: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.op.name} {self.shape.label} {self.dtype}"

    def records(self, suite: str) -> list[Record]:
        """One per mode and provider, without numbers yet."""
        where = suite, self.op.name, asdict(self.shape)
        pairs = [(mode, provider) for mode in self.modes for provider in self.providers]
        return [Record(*where, *pair, self.dtype, reason=UNTIMED) for pair in pairs]

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (self.op.name, self.shape, self.dtype, self.modes, self.providers)


def _loaded(name: str, *others: Any) -> Case:
    return Case(operations()[name], *others)


def plan(options: Options) -> list[Case]:
    """All cases of a run. Raises ValueError on a name that does not exist, and if there is none."""
    suite = SUITES[options.suite]
    _check("op", options.ops, operations())
    _check("dtype", options.dtypes, DTYPES)
    _check("mode", options.modes, MODES)
    _check("provider", options.providers, PROVIDERS)
    own = {name: _at(name, value) for name, value in options.at}
    cases = []
    for op in (operations()[name] for name in options.ops or operations()):
        modes = tuple(mode for mode in options.modes or suite.modes if mode in op.modes)
        # What was asked for is not left out silently, what the suite would try everywhere is.
        providers = options.providers or tuple(p for p in suite.providers if p in op.providers)
        shapes = [_moved(shape, own) for shape in suite.shapes(op, asked=bool(options.ops))]
        if modes:
            cases += [
                Case(op, shape, dtype, modes, providers)
                for shape in dict.fromkeys(shapes)
                for dtype in options.dtypes or suite.dtypes
            ]
    if not cases:
        raise ValueError(f"nothing to run: no case of suite {options.suite} has what was asked for")
    return cases


def _moved(shape: Shape, values: dict[str, Any]) -> Shape:
    # A whole model has no stage, and a single operation is always that of one.
    kept = {n: v for n, v in values.items() if n != "stage" or bool(v) == bool(shape.stage)}
    return replace(shape, **kept)


def _at(name: str, value: str) -> str | int:
    _check("at", [name], [field.name for field in fields(Shape)])
    if name in ("variant", "stage"):
        _check(f"at {name}", [value], VARIANTS if name == "variant" else "01234")
    elif not value.isdecimal() or not int(value):
        raise ValueError(f"--at {name} must be a positive integer; got {value!r}")
    return value if name == "variant" else int(value)


def _check(what: str, wanted: Iterable[str], allowed: Iterable[str]) -> None:
    if unknown := [name for name in wanted if name not in allowed]:
        raise ValueError(f"--{what} must be among {', '.join(allowed)}; got {unknown[0]!r}")


def dry_run(cases: Sequence[Case], device: torch.device) -> list[str]:
    """What a run would do, in lines: cases with modes and providers, and who is left out and why,
    as far as that is known without the device. Nothing is built."""
    lines, skipped = [], dict[str, None]()
    for case in cases:
        refused = case.op.refuses(case.shape)
        why = {p: refused or unavailable(case.op, p, device, case.dtype) for p in case.providers}
        usable = ", ".join(p for p, reason in why.items() if not reason) or "nobody"
        lines.append(f"{case.label}: {', '.join(case.modes)}: {usable}")
        skipped |= {f"skipped: {case.op.name} {p}: {r}": None for p, r in why.items() if r}
    timings = sum(len(case.modes) for case in cases)
    return [*lines, *skipped, f"{len(cases)} cases, {timings} with their modes; nothing was run"]

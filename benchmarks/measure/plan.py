"""From options to cases: what a run does, known before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, MODES, SCOPES, Op, unavailable
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import Pairs, names, pairs
from benchmarks.measure.record import Record
from benchmarks.measure.suites import SUITES, Suite
from benchmarks.providers.provider import COMPILED, PROVIDERS
from equiseg_fast.models.config import VARIANTS

PARTS = tuple(scope for scope in SCOPES if scope != "operation")
MODEL_COMPILED = "model_compiled"
"""As a mode: the whole model, its compiled providers beside the baseline."""
SELECTORS = (*MODES, *PARTS, MODEL_COMPILED)
SHAPE_FIELDS = tuple(field.name for field in fields(Shape))

MODE_HELP = (
    "only: fwd (no graph recorded), fwd_train (graph recorded), bwd, step (forward and backward). "
    "Or parts of the model, which are then all that runs, in those modes or the suite's: "
    + "; ".join(f"{part} ({SCOPES[part]})" for part in PARTS)
    + f"; {MODEL_COMPILED} (the model's compiled providers beside the baseline)"
)


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases of the suite, and at which other shape, for `run` and `against`."""
    for name, values in (
        ("op", tuple(operations())), ("provider", tuple(PROVIDERS)), ("dtype", tuple(DTYPES)),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=names, default=(), metavar="A,B", help=f"only: {', '.join(values)}"
        )
    parser.add_argument("--mode", type=names, default=(), metavar="A,B", help=MODE_HELP)
    parser.add_argument(
        "--shape",
        type=pairs,
        default=(),
        metavar="K=V,..",
        help="only cases of the suite with these values, as in variant=b2,stage=1,stage=2 "
        f"(alternatives); of {', '.join(SHAPE_FIELDS)}",
    )
    shape_argument(parser)


def shape_argument(parser: argparse.ArgumentParser) -> None:
    """Another shape than those of the suite."""
    parser.add_argument(
        "--at",
        type=pairs,
        default=(),
        metavar="K=V,..",
        help="every case at a shape of your own, as in batch=4,height=720,width=1280; what is not "
        f"given stays as the suite has it; of {', '.join(SHAPE_FIELDS)}",
    )


@dataclass(frozen=True)
class Options:
    """What to run, by name, empty for the suite's own choice.

    modes: of `MODES`, and parts of the model (`PARTS`, "model_compiled"), which are then all that
    is run. method: how a GPU is timed, "graph" (replays of a CUDA graph) or "eager" (single calls).
    shape: (field of `Shape`, value), only cases that have it; several values of one field are
    alternatives. at: (field of `Shape`, value), which every case then has instead of its own.
    """

    suite: str = "quick"
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    device: str = "cpu"
    method: str = "graph"
    seed: int = 0
    shape: Pairs = ()
    at: Pairs = ()

    @property
    def narrowed(self) -> bool:
        """Whether less than the whole suite was asked for."""
        return any((self.ops, self.providers, self.dtypes, self.modes, self.shape, self.at))


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


def plan(options: Options) -> list[Case]:
    """All cases of a run. Raises ValueError on a name that does not exist, and if there is none."""
    suite = SUITES[options.suite]
    _check("op", options.ops, tuple(operations()))
    _check("dtype", options.dtypes, tuple(DTYPES))
    _check("mode", options.modes, SELECTORS)
    _check("provider", options.providers, tuple(PROVIDERS))
    modes = [m for m in options.modes if m in MODES] or suite.modes
    values = {name: _at(name, value) for name, value in options.at}
    cases = [
        Case(op, shape, dtype, own, _providers(op, options, suite))
        for op, shapes in _chosen(options, suite)
        for own in [tuple(m for m in modes if m in op.modes)]
        if own
        for shape in dict.fromkeys(_moved(s, values) for s in _filtered(shapes, options.shape))
        for dtype in options.dtypes or suite.dtypes
    ]
    if not cases:
        raise ValueError(f"nothing to run: {_why_nothing(options, suite)}")
    return cases


def _moved(shape: Shape, values: Mapping[str, Any]) -> Shape:
    # A whole model has no stage, and a single operation is always that of one.
    kept = {n: v for n, v in values.items() if n != "stage" or bool(v) == bool(shape.stage)}
    return replace(shape, **kept)


def _at(name: str, value: str) -> str | int:
    _check("at", [name], SHAPE_FIELDS)
    if name == "variant":
        _check("at variant", [value], tuple(VARIANTS))
        return value
    if name == "stage":
        _check("at stage", [value], ("0", "1", "2", "3", "4"))
    elif not value.isdecimal() or not int(value):
        raise ValueError(f"--at {name} must be a positive integer; got {value!r}")
    return int(value)


def _check(what: str, wanted: Sequence[str], allowed: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in allowed]:
        raise ValueError(f"--{what} must be among {', '.join(allowed)}; got {unknown[0]!r}")


def _scopes(options: Options) -> set[str]:
    """The parts that were asked for as modes."""
    asked = {m for m in options.modes if m in PARTS}
    return asked | ({"model"} if MODEL_COMPILED in options.modes else set())


def _chosen(options: Options, suite: Suite) -> list[tuple[Op, list[Shape]]]:
    """The operations of the run with their shapes."""
    scopes = _scopes(options)
    asked = bool(options.ops or scopes)
    chosen = [operations()[name] for name in options.ops or operations()]
    return [(op, suite.shapes(op, asked)) for op in chosen if not scopes or op.scope in scopes]


def _providers(op: Op, options: Options, suite: Suite) -> tuple[str, ...]:
    if options.providers:
        # What was asked for is not left out silently, what the suite would try everywhere is.
        return options.providers
    if MODEL_COMPILED in options.modes and op.scope == "model" and "model" not in options.modes:
        return ("baseline", *COMPILED)
    return tuple(p for p in suite.providers if p in op.providers)


def _filtered(shapes: Sequence[Shape], wanted: Pairs) -> list[Shape]:
    _check("shape", [name for name, _ in wanted], SHAPE_FIELDS)
    allowed: dict[str, set[str]] = {}
    for name, value in wanted:
        allowed.setdefault(name, set()).add(value)
    return [
        shape
        for shape in shapes
        if all(str(getattr(shape, name)) in values for name, values in allowed.items())
    ]


def _why_nothing(options: Options, suite: Suite) -> str:
    shapes = [shape for _, found in _chosen(options, suite) for shape in found]
    for name, value in options.shape:
        known = list(dict.fromkeys(str(getattr(shape, name)) for shape in shapes))
        if value not in known:
            return (
                f"--shape {name} must be among {', '.join(known)} in suite {options.suite}; "
                f"got {value}. --at {name}={value} puts that value into every case"
            )
    return "no operation has all that was asked for"


def remaining(cases: Sequence[Case], records: Iterable[Record]) -> list[Case]:
    """What these records leave to be measured: cases with the modes and providers that lack a final
    record."""
    done = {record.key for record in records if record.final}
    left = []
    for case in cases:
        waiting = {
            (mode, provider)
            for mode in case.modes
            for provider in case.providers
            if (case.op.name, case.shape.label, case.dtype, mode, provider) not in done
        }
        modes = tuple(m for m in case.modes if any(m == mode for mode, _ in waiting))
        providers = tuple(p for p in case.providers if any(p == name for _, name in waiting))
        if waiting:
            left.append(replace(case, modes=modes, providers=providers))
    return left


def has_breakdown(options: Options, cases: Sequence[Case]) -> bool:
    """Whether a run measures the parts of the model, too: in whole suites that have the model, not
    in what was picked from one."""
    return not options.narrowed and any(case.op.name == "model" for case in cases)


def dry_run(cases: Sequence[Case], device: torch.device, further: Sequence[str] = ()) -> list[str]:
    """What a run would do, in lines: cases with modes and providers, who is left out and why, and
    `further` steps.

    Nothing is built. For a GPU on a machine without one it says what is known.
    """
    lines = []
    skipped: dict[tuple[str, str], dict[str, None]] = {}
    for case in cases:
        reasons = {p: unavailable(case.op, p, device, case.dtype) for p in case.providers}
        usable = [p for p, reason in reasons.items() if not reason]
        out = [(f"{case.op.name} {p}", reason) for p, reason in reasons.items() if reason]
        if reason := case.op.refuses(case.shape):
            usable, out = [], [(case.op.name, reason)]
        for key in out:
            skipped.setdefault(key, {})[case.label] = None
        shown = ", ".join(usable) or "nobody"
        lines.append(f"{case.label}: {', '.join(case.modes)}: {shown}")
    per_op = {name: sum(case.op.name == name for case in cases) for name in operations()}
    for (who, reason), labels in skipped.items():
        total = per_op[who.split()[0]]
        where = "" if len(labels) == total else f" ({len(labels)} of {total} cases)"
        lines.append(f"skipped: {who}: {reason}{where}")
    if device.type == "cuda" and not torch.cuda.is_available():
        lines.append(
            "torch sees no GPU here: what a GPU's capability or memory would refuse is not known, "
            "and packages are those of this machine"
        )
    lines.extend(further)
    timings = sum(len(case.modes) for case in cases)
    lines.append(f"{len(cases)} cases, {timings} with their modes; nothing was run")
    return lines

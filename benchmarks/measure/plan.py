"""From options to cases: what a run does, known before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, MODES, SCOPES, Op, unavailable
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import Pairs, choose_device, names, pairs
from benchmarks.measure.record import Record
from benchmarks.measure.suites import SUITES, Suite
from benchmarks.providers.provider import COMPILED, PROVIDERS
from equiseg_fast.models.config import VARIANTS

PARTS = tuple(scope for scope in SCOPES if scope != "operation")
MODEL_COMPILED = "model_compiled"
"""As a mode: the whole model, its compiled providers beside the baseline."""
SELECTORS = (*MODES, *PARTS, MODEL_COMPILED)
SHAPE_FIELDS = tuple(field.name for field in fields(Shape))


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

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """From `selection_arguments` and `device_arguments`. Raises ValueError if the device cannot
        be used."""
        device = choose_device(args.device, needed=not args.dry_run)
        return cls(
            args.suite, args.op, args.provider, args.dtype, args.mode, str(device), args.method,
            args.seed, args.shape, args.at,
        )  # fmt: skip


def selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases of which suite, and at which other shape, for `run` and `against`."""
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    for name, values in (("op", operations()), ("provider", PROVIDERS), ("dtype", DTYPES)):
        parser.add_argument(
            f"--{name}", type=names, default=(), metavar="A,B", help=f"only: {', '.join(values)}"
        )
    parser.add_argument(
        "--mode", type=names, default=(), metavar="A,B",
        help="only: fwd (no graph recorded), fwd_train (graph recorded), bwd, step (forward and "
        "backward). Or parts of the model, which are then all that runs, in those modes or the "
        f"suite's: {'; '.join(f'{part} ({SCOPES[part]})' for part in PARTS)}; {MODEL_COMPILED} "
        "(the model's compiled providers beside the baseline)",
    )  # fmt: skip
    shape_arguments(parser)


def shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Only some shapes of the suite, or others."""
    parser.add_argument(
        "--shape", type=pairs, default=(), metavar="K=V,..",
        help="only cases of the suite with these values, as in variant=b2,stage=1,stage=2 "
        f"(alternatives); of {', '.join(SHAPE_FIELDS)}",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=pairs, default=(), metavar="K=V,..",
        help="every case at a shape of your own, as in batch=4,height=720,width=1280; what is not "
        f"given stays as the suite has it; of {', '.join(SHAPE_FIELDS)}",
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
        return [Record(*where, m, p, self.dtype) for m in self.modes for p in self.providers]

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (self.op.name, self.shape, self.dtype, self.modes, self.providers)


def _loaded(name: str, *others: Any) -> Case:
    return Case(operations()[name], *others)


def plan(options: Options) -> list[Case]:
    """All cases of a run. Raises ValueError on a name that does not exist, and if there is none."""
    suite = SUITES[options.suite]
    _check("op", options.ops, operations())
    _check("dtype", options.dtypes, DTYPES)
    _check("mode", options.modes, SELECTORS)
    _check("provider", options.providers, PROVIDERS)
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
        _check("at variant", [value], VARIANTS)
        return value
    if name == "stage":
        _check("at stage", [value], ("0", "1", "2", "3", "4"))
    elif not value.isdecimal() or not int(value):
        raise ValueError(f"--at {name} must be a positive integer; got {value!r}")
    return int(value)


def _check(what: str, wanted: Sequence[str], allowed: Iterable[str]) -> None:
    if unknown := [name for name in wanted if name not in allowed]:
        raise ValueError(f"--{what} must be among {', '.join(allowed)}; got {unknown[0]!r}")


def _chosen(options: Options, suite: Suite) -> list[tuple[Op, list[Shape]]]:
    """The operations of the run with their shapes."""
    scopes = {m for m in options.modes if m in PARTS}
    scopes |= {"model"} if MODEL_COMPILED in options.modes else set()
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
    return [
        shape
        for shape in shapes
        if all((name, str(getattr(shape, name))) in wanted for name in dict(wanted))
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
        where = case.op.name, case.shape.label, case.dtype
        pairs = [(m, p) for m in case.modes for p in case.providers if (*where, m, p) not in done]
        if pairs:
            modes, providers = zip(*pairs, strict=True)
            own = tuple(p for p in case.providers if p in providers)
            left.append(replace(case, modes=tuple(dict.fromkeys(modes)), providers=own))
    return left


def dry_run(cases: Sequence[Case], device: torch.device, further: Sequence[str] = ()) -> list[str]:
    """What a run would do, in lines: cases with modes and providers, who is left out and why, and
    `further` steps. Nothing is built. For a GPU on a machine without one it says what is known."""
    lines = []
    skipped: dict[tuple[str, str, str], set[str]] = {}
    for case in cases:
        reasons = {p: unavailable(case.op, p, device, case.dtype) for p in case.providers}
        usable = [p for p, reason in reasons.items() if not reason]
        out = [(case.op.name, f" {p}", reason) for p, reason in reasons.items() if reason]
        if reason := case.op.refuses(case.shape):
            usable, out = [], [(case.op.name, "", reason)]
        for key in out:
            skipped.setdefault(key, set()).add(case.label)
        lines.append(f"{case.label}: {', '.join(case.modes)}: {', '.join(usable) or 'nobody'}")
    for (op, provider, reason), labels in skipped.items():
        total = sum(case.op.name == op for case in cases)
        where = "" if len(labels) == total else f" ({len(labels)} of {total} cases)"
        lines.append(f"skipped: {op}{provider}: {reason}{where}")
    if device.type == "cuda" and not torch.cuda.is_available():
        lines.append(
            "torch sees no GPU here: what a GPU's capability or memory would refuse is not known, "
            "and packages are those of this machine"
        )
    timings = sum(len(case.modes) for case in cases)
    return [*lines, *further, f"{len(cases)} cases, {timings} with their modes; nothing was run"]

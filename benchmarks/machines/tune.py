"""Search launch configurations that are faster than the default ones, and write them to a file.

    python -m benchmarks tune --minutes 10 --out benchmark-results/tuned

Every launch configuration that an operation meets is varied by one step (half or twice a block or
the warps, one pipeline stage more or less), one choice after the other. A candidate must pass the
correctness gate; it wins if it is at least 2 % faster than the default and their p20 to p80 bands
do not overlap. `tuned.json` grows as the search goes, and a second search with the same --out goes
on where it stopped. Nothing uses it by itself: read it, measure it (`run --tuned FILE`), then name
it in EQUISEG_FAST_TUNED.

On a CPU, with TRITON_INTERPRET=1, the same search runs in Triton's interpreter on tiny shapes: a
rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES, Op, unavailable
from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, names, to_path
from benchmarks.measure import parity, timing
from benchmarks.measure.launches import cost_of
from benchmarks.measure.record import environment
from benchmarks.measure.resume import AGAIN, is_sticky, said
from equiseg_fast.kernels import _tuned
from equiseg_fast.kernels._arch import Tile

if TYPE_CHECKING:
    from rich.console import Console

HOTTEST = tuple(n for n, op in operations().items() if op.function and n != "mix_ffn")
"""Operations with kernels of their own, by their share of a training step of EQUISeg."""

FILE, SEARCH = "tuned.json", "search.json"
GAIN = 0.02
_FIXED = ("lean", "ctas_per_sm")
_LARGEST_WARPS = 16
Table = dict[_tuned.Key, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", type=names, default=HOTTEST, metavar="A,B", help="only these")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16, on a CPU fp32")
    parser.add_argument("--device", help="cuda, or cpu for a rehearsal in the interpreter")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="start no choice that would take longer"
    )
    parser.add_argument("--out", type=to_path, default=Path("benchmark-results/tuned"))
    parser.add_argument("--dry-run", action="store_true", help="only list cases and choices")


@dataclass(frozen=True)
class Choice:
    """One launch configuration of a case: its key, and the mode in which it is launched."""

    key: _tuned.Key
    mode: str


class _Recorder(Table):
    """A table that remembers what it was asked for."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.asked: dict[_tuned.Key, None] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked[key] = None
        return super().get(key, default)


def neighbours(config: Tile) -> list[Tile]:
    """Configurations one step away: blocks and warps doubled or halved, one stage more or less."""
    found = []
    for field, value in config.settings().items():
        if field in _FIXED:
            continue
        steps = (value + 1, value - 1) if field == "num_stages" else (2 * value, value // 2)
        largest = _LARGEST_WARPS if field == "num_warps" else value * 2 + 1
        found += [replace(config, **{field: step}) for step in steps if 1 <= step <= largest]
    return found


def _differing(default: Any, config: Any) -> str:
    before = default.settings()
    return ", ".join(f"{k}={v}" for k, v in config.settings().items() if v != before[k])


class Search:
    """The search on one case; `table` is what was decided so far and grows."""

    def __init__(
        self, op: Op, shape: Shape, dtype: str, device: torch.device, table: Table
    ) -> None:
        self.label = f"{op.name} {shape.label} {dtype}"
        self.device, self.table = device, table
        moved = cost_of(op, shape, DTYPES[dtype].itemsize).fwd_bytes
        self.problems = [
            op.build(shape, DTYPES[dtype], device, 1000 * i)
            for i in range(timing.input_sets(moved, device))
        ]
        self.leaves = list(self.problems[0].leaves.values())
        self.gate = parity.Gate(self.problems[0])

    def choices(self) -> list[Choice]:
        """What the case launches, in the order of launching."""
        recorder = _Recorder(self.table)
        with _tuned.use(recorder):
            outputs = self.problems[0].calls["triton"]()
            forward = list(recorder.asked)
            self.gate.gradients(outputs, self.leaves)
        return [Choice(key, "fwd" if key in forward else "bwd") for key in recorder.asked]

    def refusal(self, trial: Table) -> str:
        """Why a trial cannot be used; empty if its results are right."""
        try:
            with _tuned.use(trial):
                outputs = self.problems[0].calls["triton"]()
                result = self.gate.result(outputs, self.leaves)
            self.gate.check(result)
        except Exception as error:  # whatever a compiler, a driver or the gate has against it
            return said(error)
        return ""

    def time(self, trials: dict[str, Table], mode: str) -> dict[str, timing.Timing]:
        """All trials interleaved, after one call each to compile."""

        def under(trial: Table, call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with _tuned.use(trial):
                    return call()

            return run

        calls = [
            timing.call_in_mode(p.calls["triton"], list(p.leaves.values()), mode)
            for p in self.problems
        ]
        timed = {name: [under(t, call) for call in calls] for name, t in trials.items()}
        for sets in timed.values():
            for call in sets:
                call()
        if self.device.type == "cuda":
            graphs = {name: [timing.captured(sets)] for name, sets in timed.items()}
            return timing.measure_gpu(graphs, "graph", seconds=0.3, rounds=(10, 60))
        single = {name: sets[0] for name, sets in timed.items()}
        return timing.measure_cpu(single, seconds=0.0, rounds=(2, 2))

    def decide(self, choice: Choice) -> dict[str, Any]:
        """Try the neighbours of one choice; the entry for the file, its "config" the winner's."""
        name, arguments = choice.key
        default = self.table.get(choice.key, _tuned.default(choice.key))
        trials, configs = {"default": self.table}, {"default": default}
        refused: dict[str, str] = {}
        entry = {
            "function": name, "arguments": list(arguments), "config": default.settings(),
            "default": default.settings(), "case": self.label, "mode": choice.mode,
            "refused": refused,
        }  # fmt: skip
        for config in neighbours(default):
            what, trial = _differing(default, config), {**self.table, choice.key: config}
            if not (reason := self.refusal(trial)):
                trials[what], configs[what] = trial, config
                continue
            refused[what] = reason
            if is_sticky(reason):
                return entry | {"broken": reason}
        try:
            timings = self.time(trials, choice.mode)
        except RuntimeError as error:  # an error of the device, or a capture that failed
            return entry | {"broken": said(error)}
        winner = min(timings, key=lambda name: timings[name].p50_us)
        before, after = timings["default"], timings[winner]
        if after.p50_us >= (1 - GAIN) * before.p50_us or after.p80_us >= before.p20_us:
            winner = "default"
        else:
            self.table[choice.key] = configs[winner]
        return entry | {
            "config": configs[winner].settings(),
            "default_us": before.p50_us,
            "tuned_us": timings[winner].p50_us,
            "tried_us": {n: t.p50_us for n, t in timings.items()},
        }


def cases(ops: Sequence[str], dtype: str | None, cuda: bool) -> list[tuple[Op, Shape, str]]:
    """On a GPU every stage of EQUISeg-B2 at 1024x1024, elsewhere one that is tiny."""
    if unknown := [name for name in ops if name not in HOTTEST]:
        raise ValueError(f"--op must be among {', '.join(HOTTEST)}; got {unknown[0]!r}")
    shape = Shape("b2", 0, 1024, 1024, 1, 4) if cuda else Shape("b0", 0, 64, 64, 1, 2)
    return [
        (op, replace(shape, stage=stage), dtype or ("bf16" if cuda else "fp32"))
        for op in (operations()[name] for name in ops)
        for stage in (op.stages if cuda else op.stages[:1])
    ]


def main(args: argparse.Namespace, console: Console) -> int:
    device = choose_device(args.device, needed=not args.dry_run)
    cuda = device.type == "cuda"
    todo = cases(args.op, args.dtype, cuda)
    if args.dry_run:
        for op, shape, dtype in todo:
            console.print(f"{op.name} {shape.label} {dtype}: {op.function}")
        console.print(f"{len(todo)} cases; nothing was run")
        return 0
    if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("on a CPU set TRITON_INTERPRET=1: a rehearsal, whose times mean nothing")
    ours = (args.out / SEARCH).is_file()
    outputs.writable(args.out, *(() if ours else (FILE,))).mkdir(parents=True, exist_ok=True)
    args.kept = f"what was decided is in {args.out}/{FILE}; the same command goes on"
    until, longest, late = monotonic() + 60 * args.minutes, 0.0, 0
    made_on = _made_on(device, rehearsal=not cuda)
    entries, table = _earlier(args.out / SEARCH, made_on)
    with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
        for op, shape, dtype in todo:
            if cuda and (reason := unavailable(op, "triton", device)):
                console.print(f"skipped: {op.name}: {reason}")
                continue
            if monotonic() + longest > until:
                late += 1
                continue
            try:
                search = Search(op, shape, dtype, device, table)
                choices = search.choices()
            except Exception as error:  # the other cases are worth more than this one
                traceback.print_exc()
                console.print(f"skipped: {op.name} {shape.label}: {said(error)}")
                if is_sticky(str(error)):
                    return AGAIN
                continue
            decided = {(e["function"], tuple(e["arguments"])) for e in entries}
            for choice in choices:
                started = monotonic()
                if choice.key in decided or started + longest > until:
                    continue
                entry = search.decide(choice)
                longest = max(longest, monotonic() - started)
                entries.append(entry)
                console.print(_line(entry), markup=False)
                _write(args.out, entries, made_on)
                if "broken" in entry:
                    console.print("this process can go no further; the same command goes on")
                    return AGAIN
    won = _write(args.out, entries, made_on)
    rest = f", {late} cases not reached" if late else ""
    console.print(f"{len(entries)} choices searched, {won} changed{rest}; see {args.out}/{FILE}")
    return 0


def _made_on(device: torch.device, rehearsal: bool) -> dict[str, Any]:
    env = environment(device)
    found = {key: env[key] for key in ("device", "torch", "triton", "git_sha", "utc")}
    return found | {"rehearsal": rehearsal}


def _earlier(path: Path, made_on: dict[str, Any]) -> tuple[list[dict[str, Any]], Table]:
    """What an earlier search of the same source on the same device has decided, entries and table.
    Raises ValueError naming the file and what is wrong with it, and for any other search."""
    if not path.is_file():
        return [], {}
    content = _tuned.content(path)
    before = content.get("made_on")
    if type(before) is not dict or any(before.get(k) != made_on[k] for k in made_on if k != "utc"):
        raise ValueError(
            f"--out must be a new folder, as nothing is overwritten; {path} is of a search with "
            "another device, source or version"
        )
    table = _tuned.read(path)
    for i, entry in enumerate(content["configs"], start=1):
        if "default" not in entry:
            raise ValueError(f"{path.name} entry {i}: it must have 'default', as `tune` writes it")
    return content["configs"], table


def _line(entry: dict[str, Any]) -> str:
    what = f"{entry['function']}{tuple(entry['arguments'])} in {entry['case']} {entry['mode']}"
    if "broken" in entry:
        return f"{what}: {entry['broken']}"
    changed = {k: v for k, v in entry["config"].items() if v != entry["default"][k]}
    return (
        f"{what}: {changed or 'default stays'}, {entry['default_us']:.1f} -> "
        f"{entry['tuned_us']:.1f} us "
        f"({len(entry['tried_us']) - 1} tried, {len(entry['refused'])} refused)"
    )


def _write(out: Path, entries: list[dict[str, Any]], made_on: dict[str, Any]) -> int:
    """`tuned.json` with the winners alone, whose number it returns; `search.json` with all."""
    winners = [e for e in entries if e["config"] != e["default"]]
    _tuned.write(out / SEARCH, entries, made_on)
    _tuned.write(out / FILE, winners, made_on)
    return len(winners)

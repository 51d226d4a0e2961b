"""Search launch configurations that are faster than the default ones, and write them to a file.

    python -m benchmarks tune --minutes 10 --out benchmark-results/tuned

Every launch configuration that an operation meets is varied by one step (half or twice a block or
the warps, one pipeline stage more or less), one choice after the other. A candidate must pass the
correctness gate; it wins if it makes a step of the operation at least 2 % faster, and p20 to p80
bands do not overlap. `tuned.json` grows as the search goes, and the same command goes on where it
stopped; where the default stays, "config" is empty. Nothing uses the file by itself: read it,
measure it (`run --tuned FILE`), then name it in EQUISEG_FAST_TUNED. On a CPU, with
TRITON_INTERPRET=1, this rehearses on tiny shapes; times mean nothing there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.command import outputs
from benchmarks.command.options import choose_device, full_fp32, names, to_path
from benchmarks.measure import parity, timing
from benchmarks.measure.record import environment
from benchmarks.measure.resume import AGAIN, is_sticky, said
from equiseg_fast.kernels import _tuned
from equiseg_fast.kernels._arch import Tile

HOTTEST = tuple(n for n, op in operations().items() if op.function and n != "mix_ffn")
"""Operations with kernels of their own, by their share of a training step of EQUISeg."""
FILE = "tuned.json"
GAIN = 0.02


def neighbours(config: Tile) -> dict[str, Tile]:
    """Configurations one step away: blocks and warps doubled or halved, one stage more or less."""
    return {
        f"{field}={step}": replace(config, **{field: step})
        for field, value in config.settings().items()
        if field not in ("lean", "ctas_per_sm")
        for step in ((value + 1, value - 1) if field == "num_stages" else (2 * value, value // 2))
    }


class Search:
    """The search on one case; `table` is what was decided so far and grows."""

    def __init__(self, problem: Problem, table: dict[_tuned.Key, Tile]) -> None:
        self.table, self.call = table, problem.calls["triton"]
        self.leaves = list(problem.leaves.values())
        self.gate = parity.Gate(problem)

    def run(self, table: _tuned.Table) -> tuple[parity.Result, list[_tuned.Key]]:
        """What comes out of a step under a table, and the choices that it made."""
        with _tuned.use(table) as made:
            outputs = self.call()
            gradients = self.gate.gradients(outputs, self.leaves)
        return parity.Result(tuple(x.detach() for x in outputs), gradients), list(made)

    def refusal(self, trial: _tuned.Table) -> str:
        """Why a trial cannot be used; empty if its results are right."""
        try:
            result, _ = self.run(trial)
            self.gate.check(result)
        except Exception as error:  # whatever a compiler, a driver or the gate has against it
            return said(error)
        return ""

    def time(self, trials: Mapping[str, _tuned.Table]) -> dict[str, timing.Timing]:
        """Steps of all trials, already compiled, in turn."""
        call = timing.call_in_mode(self.call, self.leaves, "step")

        def under(trial: _tuned.Table) -> Any:
            with _tuned.use(trial):
                return call()

        calls = {name: partial(under, trial) for name, trial in trials.items()}
        if self.leaves[0].is_cuda:
            units = {name: [(call, 1)] for name, call in calls.items()}
            with torch.cuda.device(self.leaves[0].device):
                return timing.measure_gpu(units, "events", seconds=0.3, rounds=(10, 60))
        return timing.measure_cpu(calls, seconds=0.0, rounds=(2, 2))

    def decide(self, key: _tuned.Key) -> dict[str, Any]:
        """Try the neighbours of one choice: what the file is to say of it. It has "broken" if this
        process can go no further."""
        default = _tuned.default(key)
        configs, trials = neighbours(default), {"default": self.table}
        refused: dict[str, str] = {}
        entry = {"function": key[0], "arguments": key[1], "config": {}, "refused": refused}
        for name, config in configs.items():
            trial = {**self.table, key: config}
            if not (reason := self.refusal(trial)):
                trials[name] = trial
            elif is_sticky(reason):
                return entry | {"broken": f"{name}: {reason}"}
            else:
                refused[name] = reason
        try:
            timings = self.time(trials)
        except Exception as error:
            return entry | {"broken": said(error)}
        best = min(timings, key=lambda name: timings[name].p50_us)
        before, after = timings["default"], timings[best]
        won = after.p50_us < (1 - GAIN) * before.p50_us and after.p80_us < before.p20_us
        self.table[key] = configs[best] if won else default
        changed = self.table[key].settings().items() - default.settings().items()
        return entry | {"config": dict(changed), "us": {n: t.p50_us for n, t in timings.items()}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks tune`."""
    parser.add_argument("--op", type=names, default=HOTTEST, metavar="A,B", help="only these")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16, on a CPU fp32")
    parser.add_argument("--device", help="cuda, or cpu for a rehearsal in the interpreter")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no choice after that")
    parser.add_argument("--out", type=to_path, default=Path("benchmark-results/tuned"))
    parser.add_argument("--dry-run", action="store_true", help="only list the cases")


def main(args: argparse.Namespace, console: Console) -> int:
    """Search and write `tuned.json`; `AGAIN` if the same command goes on."""
    if unknown := [name for name in args.op if name not in HOTTEST]:
        raise ValueError(f"--op must be among {', '.join(HOTTEST)}; got {unknown[0]!r}")
    device = choose_device(args.device, needed=not args.dry_run)
    cuda = device.type == "cuda"
    dtype = args.dtype or ("bf16" if cuda else "fp32")
    shape = Shape("b2", 0, 1024, 1024, 1, 4) if cuda else Shape("b0", 0, 64, 64, 1, 2)
    cases = [
        (op, replace(shape, stage=stage))
        for op in (operations()[name] for name in args.op)
        for stage in (op.stages if cuda else op.stages[:1])
    ]
    if args.dry_run:
        for op, at in cases:
            console.print(f"{op.name} {at.label} {dtype}")
        console.print(f"{len(cases)} cases; nothing was run")
        return 0
    path, env = args.out / FILE, environment(device)
    made_on = {name: env[name] for name in ("device", "torch", "triton", "git_sha")}
    entries: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):  # what is no such file is not overwritten either
        if (earlier := outputs.read_json(path)).get("made_on") == made_on:
            entries = earlier["configs"]
    outputs.writable(args.out, *(() if entries else (FILE,)), hint=" or of another source")
    table = _tuned.read(path) if entries else {}
    args.kept = f"what was decided is in {path}; the same command goes on"
    full_fp32()
    until = monotonic() + 60 * args.minutes
    for op, at in cases:
        if monotonic() >= until:
            break
        try:
            search = Search(op.build(at, DTYPES[dtype], device, 0), table)
            keys = search.run(table)[1]
        except Exception as error:  # with the default configurations: the other cases go on
            console.print(f"{op.name} {at.label} {dtype}: {said(error)}", markup=False)
            continue
        for key in keys:
            if key in table or monotonic() >= until:
                continue
            entry = search.decide(key) | {"case": f"{op.name} {at.label} {dtype}"}
            entries.append(entry)
            content = {"schema": _tuned.SCHEMA, "made_on": made_on, "configs": entries}
            outputs.write(path, json.dumps(content, indent=1) + "\n")
            what = entry.get("broken") or entry["config"] or "default stays"
            console.print(f"{key}: {what}", markup=False)
            if "broken" in entry:
                return AGAIN
    console.print(f"{len(entries)} choices searched; see {path}", markup=False, soft_wrap=True)
    return 0

"""How long everything that a visit to a GPU times should take, written down before the visit.

    python -m benchmarks predict [--gpu h100,h200] [--check]

Every case runs on tensors of "meta" at its full size (`launches`); each kernel gets the time that
`efficiency` assumes. Written are one row per case, mode and provider, with the keys of the records
of a run, and one per distinct launch of ours in a large training step. `judgement` puts measured
times beside them. With --check nothing is written, and the exit status is 1 if the rows committed
are not what the sources say. All of it is a prediction; nothing here was measured.

A time is that of kernels in a row, as in a CUDA graph. The baseline also waits for values (which
classes there are); that is left out, but each of its masks counts as if it selected everything.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import ROOT, to_path
from benchmarks.machines import efficiency, gpus
from benchmarks.measure.kernel_work import Kernel
from benchmarks.measure.launches import Call, count
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.measure.record import Key

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = ROOT / "benchmarks" / "results" / "predictions"
PROVIDERS = ("baseline", "torch", "triton")
LARGE = Shape("b2", 0, 1024, 1024, 1, 4)
"""The model that is timed beside those of the suite."""
MODES = ("fwd", "fwd_train", "bwd", "step")
TOLERANCE = 0.01
"""By how much a time may differ from the one committed: releases of PyTorch do in places."""
LEAST = 0.005
"""Smaller shares of a time are not written."""


@dataclass(frozen=True)
class Prediction:
    """Of one provider on one case in one mode; op to provider as in `record.Record`.

    us: predicted, per call; kernels, gb, tflop: launches, bytes / 1e9 and FLOPs of products / 1e12
    of a call; spent: microseconds by assumption, the largest first.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    us: float
    kernels: int
    gb: float
    tflop: float
    spent: dict[str, float]

    @property
    def key(self) -> Key:
        return (self.op, self.shape, self.dtype, self.mode, self.provider)

    @property
    def dominating(self) -> tuple[str, float]:
        """The assumption that most of the time hangs on, and its share of the time."""
        name = next(iter(self.spent))
        return name, self.spent[name] / self.us


def cases() -> list[Case]:
    """The suite core, and the large model in inference and training."""
    suite = plan(Options(suite="core", device="cuda"))
    large = [
        Case(op, LARGE, "bf16", tuple(m for m in ("fwd", "step") if m in op.modes), op.providers)
        for op in (operations()[name] for name in ("model", "training"))
    ]
    return suite + large


def modes_of(case: Case) -> list[str]:
    """Those of the case, and both halves of a step of more than an operation."""
    halves = ("fwd_train", "bwd") if case.op.scope != "operation" and "step" in case.modes else ()
    return [m for m in MODES if m in case.modes or (m in halves and m in case.op.modes)]


def counted(case: Case, provider: str, facts: tuple[int, int]) -> dict[str, list[Call]]:
    """The calls of one provider in every mode. facts: see `launches.counting`."""
    found = {}
    for mode in modes_of(case):
        calls = count(case.op, case.shape, DTYPES[case.dtype], provider, mode != "fwd", facts)
        phase = {"fwd_train": "fwd", "bwd": "bwd"}.get(mode)
        found[mode] = [call for call in calls if phase in (None, call.phase)]
    return found


def facts_of(gpu: str) -> tuple[int, int]:
    found = gpus.by_name(gpu)
    return found.capability, found.multiprocessors


def predicted(
    case: Case, mode: str, provider: str, kernels: Sequence[Kernel], gpu: str
) -> Prediction:
    spent = efficiency.predict(kernels, efficiency.rates(gpu))
    us = sum(spent.values())
    shown = sorted((-x, name) for name, x in spent.items() if x >= LEAST * us)
    flops = sum(k.matrix + k.vector for k in kernels)
    return Prediction(
        case.op.name, case.shape.label, case.dtype, mode, provider, _short(us), len(kernels),
        _short(sum(k.bytes for k in kernels) / 1e9), _short(flops / 1e12),
        {name: _short(-x) for x, name in shown},
    )  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def predict(chosen: Iterable[Case], gpu: str) -> list[Prediction]:
    """All rows of the cases on a GPU."""
    return [
        predicted(case, mode, provider, [k for call in calls for k in call.kernels], gpu)
        for case in chosen
        for provider in PROVIDERS
        if provider in case.providers
        for mode, calls in counted(case, provider, facts_of(gpu)).items()
    ]


def launches_of(case: Case, gpu: str) -> list[dict[str, Any]]:
    """Every distinct launch of ours in a step: how many, what it does, and predicted microseconds
    of each without the gap, those that take longest together first."""
    calls = counted(case, "triton", facts_of(gpu))["step"]
    rates = efficiency.rates(gpu)
    rows = []
    launched = Counter((x.phase, *x.kernels) for x in calls if x.ours)
    for (phase, kernel), number in launched.items():
        assumption, seconds = efficiency.limit(kernel, rates)
        row = {"kernel": kernel.name, "phase": phase, "launches": number}
        work = {
            "us": 1e6 * seconds, "gb": kernel.bytes / 1e9,
            "tflop": (kernel.matrix + kernel.vector) / 1e12,
            "gexp": kernel.exps / 1e9, "gslots": kernel.slots / 1e9,
        }  # fmt: skip
        rows.append(row | {k: _short(v) for k, v in work.items() if v} | {"limit": assumption})
    return sorted(rows, key=lambda row: -row["launches"] * row["us"])


def files_of(gpu: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of both files of a GPU by their names."""
    chosen = cases()
    step = next(case for case in chosen if case.shape == LARGE and case.op.name == "training")
    return {
        f"{gpu}.jsonl": [asdict(row) for row in predict(chosen, gpu)],
        f"{gpu}-kernels.jsonl": launches_of(step, gpu),
    }


def read(gpu: str, folder: Path = FOLDER) -> list[Prediction]:
    """What was committed for a GPU. Raises FileNotFoundError where nothing was."""
    return [Prediction(**row) for row in _read(folder / f"{gpu}.jsonl")]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def committed(folder: Path = FOLDER) -> list[str]:
    """The GPUs that predictions are there for."""
    return [name for name in gpus.GPUS if (folder / f"{name}.jsonl").is_file()]


def differences(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What rows of one file say otherwise now: which there are, and times beyond the tolerance."""

    def by_name(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        times: dict[str, float] = {}
        for row in rows:
            words = [str(x) for name, x in row.items() if name not in _VALUES]
            times[" ".join(words)] = times.get(" ".join(words), 0.0) + row["us"]
        return times

    old, new = by_name(before), by_name(now)
    for name in old.keys() | new.keys():
        if name not in old or name not in new:
            yield f"{name}: {'new' if name in new else 'no longer there'}"
        elif abs(new[name] - old[name]) > TOLERANCE * old[name]:
            yield f"{name}: {old[name]:.4g} us are {new[name]:.4g} us now"


_VALUES = {"us", "kernels", "gb", "tflop", "spent", "gexp", "gslots", "limit"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks predict`."""
    parser.add_argument(
        "--gpu", type=lambda text: text.lower().split(","), default=["h100", "h200"],
        help=f"some of {', '.join(gpus.GPUS)}, separated by commas; default: h100,h200",
    )  # fmt: skip
    parser.add_argument("--out", type=to_path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only compare with what is there")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be predicted")


def main(args: argparse.Namespace, console: Console) -> int:
    """Write or check the files. Raises ValueError for a GPU that is not listed."""
    for name in args.gpu:
        gpus.by_name(name)
    if args.dry_run:
        number = sum(len(modes_of(case)) for case in cases())
        console.print(
            f"{number} cases with their modes, by {', '.join(PROVIDERS)}, on {', '.join(args.gpu)}"
        )
        console.print("nothing was computed")
        return 0
    if not args.check:
        outputs.writable(args.out)
    wrong = 0
    for gpu in args.gpu:
        files = files_of(gpu)
        for name, rows in files.items():
            path = args.out / name
            if args.check:
                before = _read(path) if path.is_file() else []
                found = sorted(differences(before, rows))
                wrong += len(found)
                for line in found[:10]:
                    console.print(f"{name}: {line}", markup=False, soft_wrap=True)
                console.print(f"{name}: {len(rows)} rows, {len(found)} differ")
            else:
                outputs.write(path, "".join(json.dumps(row) + "\n" for row in rows))
                console.print(f"{name}: {len(rows)} rows written")
        _show(files[f"{gpu}.jsonl"], gpu, console)
    return min(wrong, 1)


def _show(rows: Sequence[dict[str, Any]], gpu: str, console: Console) -> None:
    """The whole models."""
    console.print(f"predicted on {gpus.by_name(gpu).title}, not measured:")
    for row in rows:
        if operations()[row["op"]].scope == "model" and row["mode"] in ("fwd", "step"):
            console.print(
                f"  {row['op']} {row['shape']} {row['dtype']} {row['mode']} {row['provider']}: "
                f"{row['us'] / 1e3:.2f} ms, {row['kernels']} kernels, {row['gb']:.1f} GB"
            )

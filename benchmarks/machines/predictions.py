"""How long everything that a visit to a GPU times should take, written down before the visit.

    python -m benchmarks predict [--gpu h100,h200] [--check]

Every case runs on tensors of "meta" at its full size (`launches`); each kernel gets the time that
`efficiency` assumes. Written is one row per case, mode and provider, with the keys of the records
of a run; `judgement` puts measured times beside them. With --check nothing is written, and the exit
status is 1 if the rows committed are not what the sources say. All of it is a prediction; nothing
here was measured.

A time is that of kernels in a row, as in a CUDA graph. The baseline also waits for values (which
classes there are); that is left out, but each of its masks counts as if it selected everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import ROOT, to_path
from benchmarks.machines import efficiency, gpus
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


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def predict(chosen: Iterable[Case], gpu: str) -> list[Prediction]:
    """All rows of the cases on a GPU."""
    known, rates, rows = gpus.by_name(gpu), efficiency.rates(gpu), []
    facts = known.capability, known.num_sms
    for case in chosen:
        for provider in (p for p in PROVIDERS if p in case.providers):
            for mode, calls in counted(case, provider, facts).items():
                kernels = [kernel for call in calls for kernel in call.kernels]
                spent = efficiency.predict(kernels, rates)
                us = sum(spent.values())
                shown = sorted((-x, name) for name, x in spent.items() if x >= LEAST * us)
                flops = sum(k.matrix + k.vector for k in kernels)
                rows.append(Prediction(
                    case.op.name, case.shape.label, case.dtype, mode, provider, _short(us),
                    len(kernels), _short(sum(k.bytes for k in kernels) / 1e9),
                    _short(flops / 1e12), {name: _short(-x) for x, name in shown},
                ))  # fmt: skip
    return rows


def read(gpu: str, folder: Path = FOLDER) -> list[Prediction]:
    """What was committed for a GPU. Raises FileNotFoundError where nothing was."""
    lines = (folder / f"{gpu}.jsonl").read_text().splitlines()
    return [Prediction(**json.loads(line)) for line in lines]


def committed(folder: Path = FOLDER) -> list[str]:
    """The GPUs that predictions are there for."""
    return [name for name in gpus.GPUS if (folder / f"{name}.jsonl").is_file()]


def differences(before: Iterable[Prediction], now: Iterable[Prediction]) -> Iterator[str]:
    """What rows say otherwise now: which there are, and times beyond the tolerance."""
    old, new = ({" ".join(row.key): row.us for row in rows} for rows in (before, now))
    for name in old.keys() | new.keys():
        if name not in old or name not in new:
            yield f"{name}: {'new' if name in new else 'no longer there'}"
        elif abs(new[name] - old[name]) > TOLERANCE * old[name]:
            yield f"{name}: {old[name]:.4g} us are {new[name]:.4g} us now"


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
        rows, path = predict(cases(), gpu), args.out / f"{gpu}.jsonl"
        if args.check:
            found = sorted(differences(read(gpu, args.out) if path.is_file() else [], rows))
            wrong += len(found)
            for line in found[:10]:
                console.print(f"{path.name}: {line}", markup=False, soft_wrap=True)
            console.print(f"{path.name}: {len(rows)} rows, {len(found)} differ")
        else:
            outputs.write(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
            console.print(f"{path.name}: {len(rows)} rows written")
        console.print(f"predicted on {gpus.by_name(gpu).title}, not measured:")
        for row in rows:
            if operations()[row.op].scope == "model" and row.mode in ("fwd", "step"):
                console.print(
                    f"  {row.op} {row.shape} {row.dtype} {row.mode} {row.provider}: "
                    f"{row.us / 1e3:.2f} ms, {row.kernels} kernels, {row.gb:.1f} GB"
                )
    return min(wrong, 1)

"""Everything that a few minutes on a new GPU machine should bring home, in the order of its worth.

Environment, limits of the device, parity tests on the GPU, the core suite, memory of the whole
model, compute-sanitizer, a search of launch configurations. Every command has its share of the
time and is killed when that is over; results are written as they come. A second call with the same
--out skips what is done and goes on with what is not. Needs no network and installs nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.options import ROOT, choose_device
from benchmarks.plan import Options, plan
from benchmarks.registry import SUITES, operations
from benchmarks.visiting.budget import State, Step, Task, run, shares
from benchmarks.visiting.summary import failed, table, unfinished, write_summary

PYTHON = sys.executable
OPTIONAL = {
    "transformers": "no provider transformers, its tests are skipped",
    "skimage": "no sensor images: the suite quick has no model",
    "hypothesis": "property tests are not run",
    "pytest_timeout": "a test that hangs takes its whole file's time",
}
# The hottest first, for the case that time runs out.
HOTTEST = (
    "attention", "depthwise", "norm", "mix_ffn", "query_hub", "pooling_mixer", "guided_gate",
    "prototypes", "losses",
)  # fmt: skip
GPU_ONLY = ("workflows", "testing_memory")
"""Files of tests with the marker gpu."""
COMPILERS = ("compile", "flex")
REHEARSED_TESTS = "test_rho or test_rounds_once"
REHEARSED_CASES = (
    "--shape", "variant=b0,stage=4", "--dtype", "fp32", "--provider", "baseline,torch,triton",
    "--threads", "1",
)  # fmt: skip


def bench(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "benchmarks", *words)


def steps(folder: Path, device: torch.device) -> tuple[Step, ...]:
    """What is done on this device. On a CPU everything is rehearsed on little: kernels in Triton's
    interpreter, few tests, one operation."""
    cuda = device.type == "cuda"
    on = ("--device", device.type)
    return (
        _environment_step(cuda),
        Step(
            "calibrate",
            "limits of the device",
            2.5,
            (_task("calibrate", bench("calibrate", *on, "--out", str(folder / "calibration"))),),
        ),
        _parity_step(folder, cuda),
        _core_step(folder, on, core_operations() if cuda else ("guided_gate", "query_hub")),
        _memory_step(folder, on, cuda),
        *((_compiled_step(folder, on),) if cuda else ()),
        _sanitizer_step(cuda),
        _tune_step(folder, cuda),
        Step(
            "report",
            "report and plots of the core suite",
            0.5,
            (_task("report", bench("report", str(folder / "core"))),),
        ),
    )


def core_operations() -> list[str]:
    """Those of the core suite, single operations and the whole model before its parts."""
    names = [case.op.name for case in plan(Options(suite="core"))]
    first = [name for name in (*HOTTEST, "training", "model") if name in names]
    return list(dict.fromkeys((*first, *names)))


def _task(name: str, command: Sequence[str], **options: Any) -> Task:
    return Task(name, tuple(command), f"logs/{name.replace('/', '-')}.log", **options)


def _environment_step(cuda: bool) -> Step:
    tasks = [
        Task("environment", bench("env"), "environment.json"),
        _task("environment/versions", (PYTHON, "-m", "equiseg_fast.env")),
    ]
    if cuda and shutil.which("nvidia-smi"):
        # Not all of it: serial numbers and processes are nobody's business.
        query = ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY")
        tasks.append(_task("environment/driver", query))
    return Step("environment", "versions, device, driver", 1.0, tuple(tasks))


def _parity_step(folder: Path, cuda: bool) -> Step:
    def tests(stem: str, *options: str) -> Task:
        outcomes = folder / "parity" / f"{stem}.jsonl"
        command = (
            PYTHON, "-m", "pytest", f"tests/test_{stem}.py", "-p", "benchmarks.visiting.outcomes",
            "--outcomes", str(outcomes), "-q", "--tb=short", *options,
        )  # fmt: skip
        # On a GPU kernels are compiled: the interpreter would prove nothing about them.
        variables = {"TRITON_INTERPRET": None if cuda else "1", "EQUISEG_FAST_BACKEND": None}
        return _task(f"parity/{stem}", command, variables=variables, restarts=5)

    if cuda:
        tasks = [tests(stem) for stem in HOTTEST]
        tasks += [tests(stem, "-m", "gpu") for stem in GPU_ONLY]
    else:
        tasks = [tests(stem, "-k", REHEARSED_TESTS) for stem in ("guided_gate", "norm")]
    where = "compiled on the GPU" if cuda else "in the interpreter"
    what = f"kernels against the fp64 reference, {where}"
    return Step("parity", what, 3.0, tuple(tasks), _at_once(cuda))


def _at_once(cuda: bool) -> int:
    """How many files of tests run together: most of the time compilers run, on one core each, and
    tests of large strides need up to 12 GiB of the GPU."""
    if not (cuda and torch.cuda.is_available()):
        return 1
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min((os.cpu_count() or 2) * 3 // 4, int(gib // 12)))


def _core_step(folder: Path, on: tuple[str, ...], ops: Sequence[str]) -> Step:
    cuda = on[1] == "cuda"

    def of(op: str) -> tuple[str, ...]:
        if not cuda:
            return REHEARSED_CASES
        quick = [p for p in SUITES["core"].providers if p not in COMPILERS]
        return ("--provider", ",".join(p for p in quick if p in operations()[op].providers))

    runs = _runs("core", folder, on, {op: of(op) for op in ops})
    return Step("core", "speed, suite core", 3.5, runs)


def _compiled_step(folder: Path, on: tuple[str, ...]) -> Step:
    """Compilers take longer than all others together, so they get what time is left."""

    def of(op: str) -> tuple[str, ...]:
        wanted = ("baseline", "triton", *COMPILERS)
        return ("--provider", ",".join(p for p in wanted if p in operations()[op].providers))

    runs = _runs("compiled", folder, on, {op: of(op) for op in core_operations()})
    return Step("compiled", "the same beside compilers", 1.5, runs)


def _runs(
    name: str, folder: Path, on: tuple[str, ...], options: Mapping[str, Sequence[str]]
) -> tuple[Task, ...]:
    """The suite core, operation by operation in processes of their own: an error of the device
    spoils all later calls of a process. They share the limits that were calibrated."""
    shared = ("--suite", "core", *on, "--calibration", str(folder / "calibration"))
    return tuple(
        _task(f"{name}/{op}", bench("run", *shared, *own, "--op", op, "--out", out))
        for op, own in options.items()
        for out in [str(folder / name / op / "{attempt}")]
    )


def _memory_step(folder: Path, on: tuple[str, ...], cuda: bool) -> Step:
    what = ("--suite", "core", "--op", "guided_gate", "--mode", "fwd", *REHEARSED_CASES)
    if cuda:
        what = (
            "--suite", "full", "--op", "training,model", "--mode", "fwd,step", "--dtype", "bf16",
            "--shape", "variant=b2,height=1024,width=1024,batch=1,modalities=4",
            "--provider", "baseline,torch,triton",
        )  # fmt: skip
    command = bench("run", *what, *on, "--out", str(folder / "memory" / "{attempt}"))
    return Step("memory", "memory (and speed) of large cases", 1.0, (_task("memory", command),))


def _sanitizer_step(cuda: bool) -> Step:
    tool = shutil.which("compute-sanitizer") if cuda else None
    reason = "compute-sanitizer is not on the PATH" if cuda else "compute-sanitizer needs a GPU"
    exercise = bench("exercise", "--device", "cuda" if cuda else "cpu")
    # All kernels once: under the tool compiling takes most of the time.
    watched = (*exercise, "--dtype", "bf16")
    # Every tensor its own allocation, or an access beyond one would hit its neighbour unseen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": None}
    if not cuda:
        # Rehearsed without the tool: the kernels it would watch.
        rehearsal = _task(
            "sanitizer/rehearsal", (*exercise, "--op", "guided_gate", "--dtype", "fp32"),
            variables={"TRITON_INTERPRET": "1"},
        )  # fmt: skip
        return Step("sanitizer", f"{reason}; its kernels in the interpreter", 1.2, (rehearsal,))
    tasks = tuple(
        _task(
            f"sanitizer/{check}",
            (
                tool or "compute-sanitizer",
                "--tool",
                check,
                "--error-exitcode",
                "9",
                *watched,
            ),
            variables=variables,
        )
        for check in ("memcheck", "racecheck")
    )
    return Step(
        "sanitizer", "memory accesses and races on small shapes", 1.2, tasks,
        impossible="" if tool else reason,
    )  # fmt: skip


def _tune_step(folder: Path, cuda: bool) -> Step:
    on = ("--device", "cuda") if cuda else ("--device", "cpu", "--op", "guided_gate")
    command = bench("tune", "--minutes", "{minutes}", *on, "--out", str(folder / "tune"))
    variables = {"TRITON_INTERPRET": None if cuda else "1", "EQUISEG_FAST_TUNED": None}
    task = _task("tune", command, variables=variables, restarts=5)
    return Step("tune", "search of launch configurations", 1.5, (task,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks visit`."""
    parser.add_argument("--minutes", type=float, help="for everything; default: 9, on a CPU 1.8")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results, and of a resumed visit"
    )
    parser.add_argument("--device", help="cpu rehearses everything; default: cuda if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 if a command failed by itself, which includes a failed test; what was cut off
    or cannot be done here is no failure."""
    started = time.monotonic()
    device = choose_device(args.device, needed=not args.dry_run)
    minutes = args.minutes if args.minutes is not None else 9 if device.type == "cuda" else 1.8
    if not minutes > 0:
        raise ValueError(f"--minutes must be positive; got {minutes}")
    folder = args.out.resolve()
    planned = steps(folder, device)
    if args.dry_run:
        _print_plan(planned, 60 * minutes, console)
        return 0
    for package, lacking in OPTIONAL.items():
        if not find_spec(package):
            console.print(f"without {package}: {lacking}")
    (folder / "parity").mkdir(parents=True, exist_ok=True)
    state = State(folder / "visit.json")
    state.changed = partial(write_summary, planned, state, folder)
    with _terminable():
        run(
            planned, state, folder, ROOT, started + 60 * minutes,
            lambda text: console.print(f"{time.monotonic() - started:5.0f} s  {text}"),
        )  # fmt: skip
    console.print(table(planned, state, folder))
    left = [t.name for s in planned for t in s.tasks if unfinished(state, t)]
    if left:
        console.print(f"did not fit: {', '.join(left)}; the same command goes on there")
    console.print(f"{time.monotonic() - started:.0f} s; summary.md in {args.out.name}")
    return 1 if any(failed(state, task) for step in planned for task in step.tasks) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Being terminated leaves the block as Ctrl-C does, so that nothing goes on running."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(planned: Sequence[Step], seconds: float, console: Console) -> None:
    possible = [step for step in planned if not step.impossible]
    share = shares(possible, seconds)
    for step in planned:
        limit = f"not possible: {step.impossible}" if step.impossible else ""
        limit = limit or f"{share[step.name]:.0f} s, or more if others leave time"
        console.print(f"[bold]{step.name}[/]: {step.what}; {limit}")
        for task in step.tasks:
            set_ = [f"{k}={v}" if v is not None else f"-u {k}" for k, v in task.variables.items()]
            prefix = " ".join(["env", *sorted(set_)]) + " " if set_ else ""
            words = ["python" if word == PYTHON else word for word in task.command]
            console.print(f"  {prefix}{' '.join(words)}", markup=False, soft_wrap=True)
    console.print("nothing was run")

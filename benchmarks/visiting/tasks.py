"""What a visit does: one command per task, in the order of their worth.

On a CPU the same is rehearsed on little: kernels in Triton's interpreter, tiny shapes, few tests.
What only a GPU has is said to be impossible there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.cases import operations
from benchmarks.measure import host
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.suites import SUITES

PYTHON = sys.executable
HOTTEST = tuple(name for name, op in operations().items() if op.function)
"""The hottest first, for the case that time runs out."""
GPU_ONLY = ("workflows", "testing_memory")
"""Files of tests with the marker gpu."""
HEADLINE = ("training", "model", "encoder")
COMPILERS = ("compile", "flex")
TINY = "stage=4,height=64,width=96,modalities=2"
"""The shape of a rehearsal."""
RUNS = ("headline", "operations", "compilers")
"""Tasks that leave records; of one measurement the first that has numbers counts."""
GIB_PER_TEST_PROCESS = 4
"""Of the GPU: the context, what the kernels' tests hold at once, and what the allocator keeps."""


@dataclass(frozen=True)
class Task:
    """One command of a visit.

    command: "{minutes}" in it becomes what it may plan with. seconds: what it is thought to take,
    may take even if others then have none, and its share where there is more. variables: of its
    environment, None for one that must not be set. restarts: how often it is started again, within
    its time, if it ends with `AGAIN` or by a signal: for commands that go on where they stopped.
    hopeless: a pattern in its output that means it can bring nothing here. impossible: why it
    cannot be run here, empty if it can.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    variables: Mapping[str, str | None] = field(default_factory=dict)
    restarts: int = 0
    hopeless: str = ""
    impossible: str = ""

    @property
    def log(self) -> str:
        """Where its output goes, in the folder of results."""
        return f"logs/{self.name.replace('/', '-')}.log"


Plan = Sequence[Sequence[Task]]
"""Tasks that run at once, one such group after the other."""


def tasks(folder: Path, device: torch.device, cache: Path) -> Plan:
    """cache: folder of Triton's binaries, kept from before or filled by the first tasks."""
    cuda = device.type == "cuda"
    on = ("--device", "cuda" if cuda else "cpu")
    few = () if cuda else ("--op", "guided_gate")
    # On a GPU kernels are compiled: the interpreter would prove nothing about them.
    interpreting = {"TRITON_INTERPRET": None if cuda else "1"}
    compiled = {"TRITON_INTERPRET": None}

    def run(name: str, suite: str, seconds: float, ops: Sequence[str], *more: object) -> Task:
        """One process for many cases, another only after an error that no process survives."""
        return Task(
            name,
            bench(
                "run", *(("--suite", suite) if cuda else ("--at", TINY)), *on,
                "--op", ",".join(ops), "--out", folder / name, "--resume",
                "--no-report", *more, *(() if cuda else ("--threads", 1)),
            ),
            seconds, restarts=20,
            impossible="" if cuda or name != "compilers" else "inductor takes minutes on a CPU",
        )  # fmt: skip

    def tests(name: str, seconds: float, stems: Sequence[str], processes: int, *more: str) -> Task:
        """Kernels against the fp64 reference."""
        patience = ("--timeout", "60") if find_spec("pytest_timeout") else ()
        command = (
            PYTHON, "-m", "pytest", *(f"tests/test_{stem}.py" for stem in stems),
            "-p", "benchmarks.visiting.outcomes",
            "--outcomes", str(folder / "parity" / f"{name}.jsonl"), "-q", "--tb=short",
            "-n", str(processes), "--dist", "load", *patience, *more,
        )  # fmt: skip
        variables = {**interpreting, "EQUISEG_FAST_BACKEND": None}
        return Task(f"parity/{name}", command, seconds, variables, restarts=5)

    # The first proof that kernels run at all; an error of the device in one spoils no other.
    kernels = [
        Task(f"kernels/{op}", bench("exercise", *on, "--op", op, *more), 20, interpreting)
        for op, more in ([(op, ()) for op in HOTTEST] if cuda else [(few[1], ("--dtype", "fp32"))])
    ]
    if cuda:
        parity = [
            tests("kernels", 92, HOTTEST, test_processes(), "-m", "not large_memory"),
            tests("large", 15, HOTTEST, 1, "-m", "large_memory"),
            tests("workflows", 21, GPU_ONLY, 1, "-m", "gpu"),
        ]
    else:
        quick = ("-k", "test_rho or test_rounds_once")
        parity = [tests("kernels", 60, ("guided_gate", "add_layer_norm"), 2, *quick)]
    core = dict.fromkeys(case.op.name for case in plan(Options(suite="core")))
    single = [op for op in core if op not in HEADLINE] if cuda else ["guided_gate", "query_hub"]
    eager = [p for p in SUITES["core"].providers if p not in (*COMPILERS, "tuned")]
    tune = bench("tune", "--minutes", "{minutes}", *on, *few, "--out", folder / "tune")
    singly = [
        run("headline", "headline", 90, HEADLINE, "--patience", 60),
        *parity,
        run(
            "operations", "core", 132, single, "--patience", 60,
            *(("--provider", ",".join(eager)) if cuda else ()),
        ),
        *_memcheck(cuda),
        # One shape: compiling takes longer than everything else together.
        run(
            "compilers", "core", 41, ("training", "model", "attention"), "--patience", 200,
            "--at", "variant=b0,stage=1,height=512,width=512,modalities=4", "--mode", "fwd,step",
            "--provider", ",".join(("baseline", "triton", *COMPILERS)),
        ),
        Task("report", bench("report", folder / "results"), 10),
        # For a second visit, or for what time the others leave.
        Task("tune", tune, 10, {**interpreting, "EQUISEG_FAST_TUNED": None}, restarts=5),
    ]  # fmt: skip
    return [
        [
            Task("prepare/environment", bench("env"), 40),
            Task("prepare/versions", (PYTHON, "-m", "equiseg_fast.env"), 40),
            Task(
                "prepare/calibrate",
                bench("calibrate", *on, "--rounds", 10, "--out", folder / "calibration"), 40,
            ),
            Task("prepare/cache", _fill(cuda, cache), 40 if cuda else 60, compiled),
            *_driver(cuda),
        ],
        kernels,
        [Task("host", bench("host", *on, *few, "--out", folder / host.FILE), 12)],
        *([task] for task in singly),
    ]  # fmt: skip


def bench(*words: object) -> tuple[str, ...]:
    return (PYTHON, "-m", "benchmarks", *map(str, words))


def _fill(cuda: bool, cache: Path) -> tuple[str, ...]:
    """Triton's cache is filled while nothing is measured but the limits of the device."""
    what: tuple[object, ...] = ("visit",) if cuda else ("core", "--op", "guided_gate")
    if cuda and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        what += ("--arch", f"{p.major}{p.minor}", "--num-sms", p.multi_processor_count)
    # One core is left to what is measured meanwhile.
    processes = max(1, (os.cpu_count() or 2) - 1)
    return bench("dry", "--what", *what, "--cache", cache, "--processes", processes)


def _driver(cuda: bool) -> list[Task]:
    """Not all of it: serial numbers and processes are nobody's business."""
    query = ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY")
    return [Task("prepare/driver", query, 40)] if cuda and shutil.which("nvidia-smi") else []


def test_processes() -> int:
    """As many as cores and the memory of the GPU allow."""
    cores = os.cpu_count() or 2
    if not torch.cuda.is_available():
        return cores
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(cores, int(gib // GIB_PER_TEST_PROCESS)))


def _memcheck(cuda: bool) -> list[Task]:
    places = (os.environ.get("PATH", ""), "/usr/local/cuda/bin")
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    impossible = "" if cuda else "compute-sanitizer needs a GPU"
    # A machine without a GPU, where the plan is only looked at, says nothing about one with.
    if torch.cuda.is_available() and not tool:
        impossible = "compute-sanitizer is not on the PATH"
    # Every tensor its own allocation, or an access beyond one would hit its neighbour unseen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": None}
    # All kernels once: under the tool compiling takes most of the time.
    small = bench("exercise", "--device", "cuda", "--dtype", "bf16")
    return [
        Task(
            f"memcheck/{check}",
            (tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", *small),
            # What the tool says where the machine does not let it at the GPU.
            seconds, variables, hopeless="Device not supported", impossible=impossible,
        )
        for check, seconds in (("memcheck", 41), ("racecheck", 14))
    ]  # fmt: skip

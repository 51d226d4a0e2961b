"""What a visit does: one command per task, in the order of their worth.

On a CPU the same is rehearsed on little: kernels in Triton's interpreter, tiny shapes, few tests.
What only a GPU has is said to be impossible there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
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
COMPILED = ("training", "model", "attention")
COMPILERS = ("compile", "flex")
RUNS = ("headline", "operations", "compilers")
"""Tasks that leave records; of one measurement the first that has numbers counts."""
REHEARSED = ("guided_gate", "query_hub")
GIB_PER_TEST_PROCESS = 4
"""Of the GPU: the context, what the kernels' tests hold at once, and what the allocator keeps."""
REFUSED = "Device not supported"
"""What compute-sanitizer says where the machine does not let it at the GPU."""

Estimates = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Task:
    """One command of a visit.

    command: "{minutes}" in it becomes what it may plan with. seconds: what it may take even if
    others then have none, and its share where there is more. brings: what it brings home, one after
    the other, and the seconds each is thought to take on a GPU. variables: of its environment, None
    for one that must not be set. restarts: how often it is started again, within its time, if it
    ends with `AGAIN` or by a signal: for commands that go on where they stopped. hopeless: a
    pattern in its output that means it can bring nothing here. impossible: why it cannot be run
    here, empty if it can.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    brings: Estimates = ()
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
    singly = [*_timed(folder, cuda, "headline"), *_parity(folder, cuda)]
    singly += [*_timed(folder, cuda, "operations"), *_memcheck(cuda)]
    singly += [*_timed(folder, cuda, "compilers"), *_last(folder, cuda)]
    together = [_prepare(folder, cuda, cache), _kernels(cuda), _host(folder, cuda)]
    return [*together, *([task] for task in singly)]


def bench(*words: object) -> tuple[str, ...]:
    return (PYTHON, "-m", "benchmarks", *map(str, words))


def _interpreting(cuda: bool) -> dict[str, str | None]:
    """On a GPU kernels are compiled: the interpreter would prove nothing about them."""
    return {"TRITON_INTERPRET": None if cuda else "1"}


def _prepare(folder: Path, cuda: bool, cache: Path) -> list[Task]:
    arch: tuple[object, ...] = ()
    if cuda and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        arch = ("--arch", f"{p.major}{p.minor}", "--num-sms", p.multi_processor_count)
    what = ("--what", "visit", *arch) if cuda else ("--what", "core", "--op", "guided_gate")
    device = "cuda" if cuda else "cpu"
    # One core is left to what is measured meanwhile.
    processes = max(1, (os.cpu_count() or 2) - 1)
    found = [
        Task("prepare/environment", bench("env"), 40, [("versions", 6)]),
        Task("prepare/versions", (PYTHON, "-m", "equiseg_fast.env"), 40),
        Task(
            "prepare/calibrate",
            bench("calibrate", "--device", device, "--rounds", 10, "--out", folder / "calibration"),
            40, [("limits of the device", 14)],
        ),
        Task(
            "prepare/cache", bench("dry", *what, "--cache", cache, "--processes", processes),
            40 if cuda else 60, [("binaries of everything that is timed", 22)],
            {"TRITON_INTERPRET": None},
        ),
    ]  # fmt: skip
    if cuda and shutil.which("nvidia-smi"):
        # Not all of it: serial numbers and processes are nobody's business.
        query = ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY")
        found.append(Task("prepare/driver", query, 40))
    return found


def _kernels(cuda: bool) -> list[Task]:
    """The first proof that kernels run at all; an error of the device in one spoils no other."""
    how = ("--device", "cuda") if cuda else ("--device", "cpu", "--dtype", "fp32")
    return [
        Task(
            f"kernels/{op}", bench("exercise", *how, "--op", op), 20, [("start", 10), (op, 4)],
            _interpreting(cuda),
        )
        for op in (HOTTEST if cuda else REHEARSED[:1])
    ]  # fmt: skip


def _host(folder: Path, cuda: bool) -> list[Task]:
    how = ("--device", "cuda") if cuda else ("--device", "cpu", "--op", "guided_gate")
    command = bench("host", *how, "--out", folder / host.FILE)
    return [Task("host", command, 12, [("start", 6), ("every operation", 5)])]


def core_operations() -> list[str]:
    """Those of the suite core but the whole networks, single operations first."""
    names = dict.fromkeys(case.op.name for case in plan(Options(suite="core")))
    return [name for name in names if name not in HEADLINE]


def _timed(folder: Path, cuda: bool, name: str) -> Iterator[Task]:
    """One process for many cases, another only after an error that no process survives."""
    core = SUITES["core"].providers
    quick = [p for p in core if p not in (*COMPILERS, "tuned")]
    one_shape = ("--shape", "variant=b0,stage=0,stage=1", "--mode", "fwd,step")
    suite, seconds, ops, more, patience = {
        "headline": ("headline", 90, HEADLINE, (), 60),
        "operations": (
            "core",
            132, core_operations() if cuda else REHEARSED,
            ("--largest-first", "--provider", ",".join(quick)) if cuda else (), 60,
        ),
        # Compiling takes longer than everything else together.
        "compilers": (
            "core", 41, COMPILED,
            (*one_shape, "--provider", ",".join(("baseline", "triton", *COMPILERS))), 200,
        ),
    }[name]  # fmt: skip
    command = bench(
        "run", "--suite", suite if cuda else "rehearsal", "--device", "cuda" if cuda else "cpu",
        "--op", ",".join(ops), *more, "--calibration", folder / "calibration",
        "--out", folder / name, "--resume", "--no-report", "--patience", patience,
        *(() if cuda else ("--threads", 1)),
    )  # fmt: skip
    compiling = name == "compilers"
    brings = [("training", 45.0), ("model", 30.0), ("attention", 20.0)]
    if not compiling:
        own = tuple(ops) if cuda else ()
        brings = _estimates(Options(suite, own, tuple(quick), device="cuda")) if cuda else []
    yield Task(
        name, command, seconds, [("start", 7.0), *brings], restarts=20,
        impossible="inductor takes minutes on a CPU" if compiling and not cuda else "",
    )  # fmt: skip


def _estimates(options: Options) -> list[tuple[str, float]]:
    """Of a run: a guess at what building, checking and timing of each case take on a GPU."""
    found = []
    for case in plan(options):
        large = (case.shape.height / 512) ** 2 * (2 if case.shape.variant == "b2" else 1)
        whole = case.op.scope != "operation"
        start, check, time = (1 + large / 2, 0.7 + large / 8, 1.5 + large / 4)
        if not whole:
            start, check, time = 0.3, 0.1, 0.6
        providers = [p for p in case.providers if p in case.op.providers]
        checks = check * sum(2 if p.startswith("baseline") else 1 for p in providers)
        found.append((case.label, start + checks + time * len(case.modes)))
    return found


def _parity(folder: Path, cuda: bool) -> Iterator[Task]:
    """Kernels against the fp64 reference: compiled on a GPU, else interpreted."""
    patience = ("--timeout", "60") if find_spec("pytest_timeout") else ()

    def tests(
        name: str, seconds: float, stems: Sequence[str], processes: int, *chosen: str,
        brings: Estimates = (),
    ) -> Task:  # fmt: skip
        command = (
            PYTHON, "-m", "pytest", *(f"tests/test_{stem}.py" for stem in stems),
            "-p", "benchmarks.visiting.outcomes",
            "--outcomes", str(folder / "parity" / f"{name}.jsonl"), "-q", "--tb=short",
            "-n", str(processes), "--dist", "load", *patience, *chosen,
        )  # fmt: skip
        variables = {**_interpreting(cuda), "EQUISEG_FAST_BACKEND": None}
        return Task(f"parity/{name}", command, seconds, brings, variables, restarts=5)

    if not cuda:
        few = ("-k", "test_rho or test_rounds_once")
        yield tests("kernels", 60, ("guided_gate", "add_layer_norm"), 2, *few)
        return
    yield tests(
        "kernels", 92, HOTTEST, test_processes(), "-m", "not large_memory",
        brings=[("collection", 12), ("parity classes", 50), ("the other tests", 30)],
    )  # fmt: skip
    large = [("strides over 2^31", 15.0)]
    yield tests("large", 15, HOTTEST, 1, "-m", "large_memory", brings=large)
    graphs = [("graphs and workflows", 20.0)]
    yield tests("workflows", 21, GPU_ONLY, 1, "-m", "gpu", brings=graphs)


def test_processes() -> int:
    """As many as cores and the memory of the GPU allow."""
    cores = os.cpu_count() or 2
    if not torch.cuda.is_available():
        return cores
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(cores, int(gib // GIB_PER_TEST_PROCESS)))


def _memcheck(cuda: bool) -> Iterator[Task]:
    places = (os.environ.get("PATH", ""), "/usr/local/cuda/bin")
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    # A machine without a GPU, where the plan is only looked at, says nothing about one with.
    missing = torch.cuda.is_available() and not tool
    why = "compute-sanitizer is not on the PATH" if missing else ""
    # Every tensor its own allocation, or an access beyond one would hit its neighbour unseen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": None}
    for check, seconds in (("memcheck", 41.0), ("racecheck", 14.0)):
        # All kernels once: under the tool compiling takes most of the time.
        small = bench("exercise", "--device", "cuda", "--dtype", "bf16")
        yield Task(
            f"memcheck/{check}",
            (tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", *small),
            seconds, [("start under the tool", 15), (check, 25)], variables, hopeless=REFUSED,
            impossible=why if cuda else "compute-sanitizer needs a GPU",
        )  # fmt: skip


def _last(folder: Path, cuda: bool) -> Iterator[Task]:
    """tune is for a second visit, or for what time the others leave."""
    yield Task("report", bench("report", folder / "results"), 10, [("report and plots", 8)])
    how = ("--device", "cuda") if cuda else ("--device", "cpu", "--op", "guided_gate")
    yield Task(
        "tune", bench("tune", "--minutes", "{minutes}", *how, "--out", folder / "tune"), 10,
        [("start", 7), *((f"choice {i}", 4) for i in range(1, 40))],
        {**_interpreting(cuda), "EQUISEG_FAST_TUNED": None}, restarts=5,
    )  # fmt: skip

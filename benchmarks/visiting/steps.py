"""What a visit does: its steps, their commands and shares of the time, in the order of their worth.

On a CPU the same steps are rehearsed on little: kernels in Triton's interpreter, tiny shapes, few
tests. What only a GPU has is said to be impossible there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import operations
from benchmarks.measure import host
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.suites import SUITES
from benchmarks.visiting.budget import Step, Task

PYTHON = sys.executable
# The hottest first, for the case that time runs out.
HOTTEST = (
    "attention", "depthwise_conv_gelu", "add_layer_norm", "mix_ffn", "query_hub", "pooling_mixer",
    "guided_gate", "class_prototypes", "upsample_cross_entropy",
)  # fmt: skip
ENVIRONMENT = "environment.json"
GPU_ONLY = ("workflows", "testing_memory")
"""Files of tests with the marker gpu."""
HEADLINE = ("training", "model", "encoder")
COMPILERS = ("compile", "flex")
REHEARSED_TESTS = "test_rho or test_rounds_once"
REHEARSED_OPERATIONS = ("guided_gate", "query_hub")
GIB_PER_TEST_PROCESS = 4
"""Of the GPU: the context, what the kernels' tests hold at once, and what the allocator keeps."""
REFUSED = "Device not supported"
"""What compute-sanitizer says where the machine does not let it at the GPU."""


def bench(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "benchmarks", *words)


def task(name: str, command: Sequence[str], **options: Any) -> Task:
    return Task(name, tuple(command), f"logs/{name.replace('/', '-')}.log", **options)


def steps(folder: Path, device: torch.device, cache: Path) -> tuple[Step, ...]:
    """cache: folder of Triton's binaries, kept from before or filled by the first step."""
    cuda = device.type == "cuda"
    return (
        _prepare(folder, cuda, cache),
        _kernels(cuda),
        _host(folder, cuda),
        _headline(folder, cuda),
        _parity(folder, cuda),
        _operations(folder, cuda),
        _memcheck(cuda),
        _compilers(folder, cuda),
        _report(folder),
        _tune(folder, cuda),
    )


def _prepare(folder: Path, cuda: bool, cache: Path) -> Step:
    # One core is left to what is measured meanwhile.
    arch, processes = _architecture(cuda), str(max(1, (os.cpu_count() or 2) - 1))
    what = ("--what", "visit", *arch) if cuda else ("--what", "core", "--op", "guided_gate")
    tasks = [
        Task("prepare/environment", bench("env"), ENVIRONMENT, estimate=(("versions", 6.0),)),
        task("prepare/versions", (PYTHON, "-m", "equiseg_fast.env")),
        task(
            "prepare/calibrate",
            bench(
                "calibrate", "--device", "cuda" if cuda else "cpu", "--rounds", "10",
                "--out", str(folder / "calibration"),
            ),
            estimate=(("limits of the device", 14.0),),
        ),
        task(
            "prepare/cache",
            bench("dry", *what, "--cache", str(cache), "--processes", processes),
            variables={"TRITON_INTERPRET": None},
            estimate=(("binaries of everything that is timed", 22.0),),
        ),
    ]  # fmt: skip
    if cuda and shutil.which("nvidia-smi"):
        # Not all of it: serial numbers and processes are nobody's business.
        query = ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY")
        tasks.append(task("prepare/driver", query))
    what_ = "versions and limits of the device; Triton's cache is filled meanwhile"
    return Step("prepare", what_, 40.0 if cuda else 60.0, tuple(tasks), at_once=len(tasks))


def _architecture(cuda: bool) -> tuple[str, ...]:
    if not (cuda and torch.cuda.is_available()):
        return ()
    p = torch.cuda.get_device_properties(0)
    return ("--arch", f"{p.major}{p.minor}", "--num-sms", str(p.multi_processor_count))


def _kernels(cuda: bool) -> Step:
    """The first proof that kernels run at all; an error of the device in one spoils no other."""
    device, more = ("cuda", ()) if cuda else ("cpu", ("--dtype", "fp32"))
    tasks = tuple(
        task(
            f"kernels/{op}",
            bench("exercise", "--device", device, "--op", op, *more),
            variables={"TRITON_INTERPRET": None if cuda else "1"},
            estimate=(("start", 10.0), (op, 4.0)),
        )
        for op in (HOTTEST if cuda else REHEARSED_OPERATIONS[:1])
    )
    return Step("kernels", "every kernel once", 20.0, tasks, at_once=len(tasks))


def _host(folder: Path, cuda: bool) -> Step:
    device, few = ("cuda", ()) if cuda else ("cpu", ("--op", "guided_gate"))
    command = bench("host", "--device", device, *few, "--out", str(folder / host.FILE))
    own = task("host", command, estimate=(("start", 6.0), ("every operation", 5.0)))
    return Step("host", "host time of calls", 12.0, (own,))


def _run(
    name: str, folder: Path, cuda: bool, ops: Sequence[str], suite: str, *more: str,
    patience: int = 60, **options: Any,
) -> Task:  # fmt: skip
    """One process for many cases, another only after an error that no process survives."""
    device = "cuda" if cuda else "cpu"
    words = (
        "--suite", suite if cuda else "rehearsal", "--device", device, "--op", ",".join(ops), *more,
        "--calibration", str(folder / "calibration"), "--out", str(folder / name),
        "--resume", "--no-report", "--patience", str(patience),
        *(() if cuda else ("--threads", "1")),
    )  # fmt: skip
    return task(name, bench("run", *words), restarts=20, **options)


def _headline(folder: Path, cuda: bool) -> Step:
    what = "whole models in inference and training, with memory"
    own = _run(
        "headline", folder, cuda, HEADLINE, "headline",
        estimate=(("start", 7.0), *_estimates("headline", HEADLINE)),
    )  # fmt: skip
    return Step("headline", what, 100.0, (own,))


def _estimates(
    suite: str, ops: Sequence[str], left_out: Collection[str] = ()
) -> list[tuple[str, float]]:
    """Of a run, record by record: a guess at what building, checking and timing take on a GPU."""
    found = []
    for case in plan(Options(suite=suite, ops=tuple(ops), device="cuda")):
        large = (case.shape.height / 512) ** 2 * (2 if case.shape.variant == "b2" else 1)
        whole = case.op.scope != "operation"
        found.append((f"{case.label}: inputs and oracle", (1.0 + large / 2) if whole else 0.3))
        own = 0.7 + large / 8 if whole else 0.1
        found += [
            (f"{case.label}: memory of {p}", own * (2 if p.startswith("baseline") else 1))
            for p in case.providers
            if p not in left_out
        ]
        found += [
            (f"{case.label}: times, {mode}", (1.5 + large / 4) if whole else 0.6)
            for mode in case.modes
        ]
    return found


def _parity(folder: Path, cuda: bool) -> Step:
    patience = ("--timeout", "60") if find_spec("pytest_timeout") else ()

    def tests(name: str, stems: Sequence[str], processes: int, *options: str, **more: Any) -> Task:
        outcomes = folder / "parity" / f"{name}.jsonl"
        command = (
            PYTHON, "-m", "pytest", *(f"tests/test_{stem}.py" for stem in stems),
            "-p", "benchmarks.visiting.outcomes", "--outcomes", str(outcomes), "-q", "--tb=short",
            "-n", str(processes), "--dist", "load", *patience, *options,
        )  # fmt: skip
        # On a GPU kernels are compiled: the interpreter would prove nothing about them.
        variables = {"TRITON_INTERPRET": None if cuda else "1", "EQUISEG_FAST_BACKEND": None}
        return task(f"parity/{name}", command, variables=variables, restarts=5, **more)

    if not cuda:
        few = tests("kernels", ("guided_gate", "add_layer_norm"), 2, "-k", REHEARSED_TESTS)
        return Step("parity", "kernels against the fp64 reference, interpreted", 60.0, (few,))
    together = (
        tests(
            "kernels", HOTTEST, test_processes(), "-m", "not large_memory", weight=8.0,
            estimate=(("collection", 12.0), ("parity classes", 50.0), ("the other tests", 30.0)),
        ),
        tests(
            "large", HOTTEST, 1, "-m", "large_memory",
            estimate=(("strides over 2^31", 15.0),),
        ),
        tests(
            "workflows", GPU_ONLY, 1, "-m", "gpu", estimate=(("graphs and workflows", 20.0),)
        ),
    )  # fmt: skip
    return Step("parity", "kernels against the fp64 reference, compiled", 110.0, together)


def test_processes() -> int:
    """As many as cores and the memory of the GPU allow."""
    cores = os.cpu_count() or 2
    if not torch.cuda.is_available():
        return cores
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(cores, int(gib // GIB_PER_TEST_PROCESS)))


def _operations(folder: Path, cuda: bool) -> Step:
    ops = core_operations() if cuda else REHEARSED_OPERATIONS
    left_out = (*COMPILERS, "tuned")
    quick = [p for p in SUITES["core"].providers if p not in left_out]
    more = ("--largest-first", "--provider", ",".join(quick)) if cuda else ()
    own = _run(
        "operations", folder, cuda, ops, "core", *more,
        estimate=(("start", 7.0), *_estimates("core", core_operations(), left_out)),
    )  # fmt: skip
    return Step("operations", "single operations, blocks and a stage", 130.0, (own,))


def core_operations() -> list[str]:
    """Those of the suite core but the whole networks, single operations first."""
    names = [case.op.name for case in plan(Options(suite="core"))]
    first = [name for name in HOTTEST if name in names]
    return [name for name in dict.fromkeys((*first, *names)) if name not in HEADLINE]


def _memcheck(cuda: bool) -> Step:
    what = "compute-sanitizer on small shapes"
    if not cuda:
        return Step("memcheck", what, 0.0, (), impossible="compute-sanitizer needs a GPU")
    places = (os.environ.get("PATH", ""), "/usr/local/cuda/bin")
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    # Every tensor its own allocation, or an access beyond one would hit its neighbour unseen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": None}
    tasks = tuple(
        task(
            f"memcheck/{check}",
            (
                tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9",
                # All kernels once: under the tool compiling takes most of the time.
                *bench("exercise", "--device", "cuda", "--dtype", "bf16"),
            ),
            variables=variables,
            weight=weight,
            hopeless=REFUSED,
            estimate=(("start under the tool", 15.0), (check, 25.0)),
        )
        for check, weight in (("memcheck", 3.0), ("racecheck", 1.0))
    )  # fmt: skip
    # A machine without a GPU, where the plan is only looked at, says nothing about one with.
    known = torch.cuda.is_available()
    reason = "compute-sanitizer is not on the PATH" if known and not tool else ""
    return Step("memcheck", what, 55.0, tasks, impossible=reason)


def _compilers(folder: Path, cuda: bool) -> Step:
    """One shape per operation: compiling takes longer than everything else together."""
    what = "compiled rivals of models and attention"
    if not cuda:
        return Step("compilers", what, 0.0, (), impossible="inductor takes minutes on a CPU")
    ops = ("training", "model", "attention")
    wanted = ("baseline", "triton", *COMPILERS)
    known = {p for op in ops for p in operations()[op].providers}
    own = _run(
        "compilers", folder, cuda, ops, "core",
        "--shape", "variant=b0,stage=0,stage=1", "--mode", "fwd,step",
        "--provider", ",".join(p for p in wanted if p in known), patience=200,
        estimate=(("start", 7.0), ("training", 45.0), ("model", 30.0), ("attention", 20.0)),
    )  # fmt: skip
    return Step("compilers", what, 45.0, (own,))


def _report(folder: Path) -> Step:
    command = bench("report", str(folder / "results"))
    own = task("report", command, estimate=(("report and plots", 8.0),))
    return Step("report", "report and plots of all records", 10.0, (own,))


def _tune(folder: Path, cuda: bool) -> Step:
    """For a second visit, or for what time the others leave."""
    few = () if cuda else ("--op", "guided_gate")
    command = bench(
        "tune", "--minutes", "{minutes}", "--device", "cuda" if cuda else "cpu", *few,
        "--out", str(folder / "tune"),
    )  # fmt: skip
    variables = {"TRITON_INTERPRET": None if cuda else "1", "EQUISEG_FAST_TUNED": None}
    own = task(
        "tune", command, variables=variables, restarts=5,
        estimate=(("start", 7.0), *((f"choice {i}", 4.0) for i in range(1, 40))),
    )  # fmt: skip
    return Step("tune", "a search of launch configurations", 10.0, (own,))

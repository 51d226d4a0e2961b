"""A time-boxed session on a new GPU machine: everything it can tell, in the order of its worth.

Every kernel once, whole models against the strongest others, parity tests on the GPU, single
operations, memory checks, compilers. Each command has its share of the time and is killed, with its
children, when that is over; what one leaves is shared among those behind it. All is packed into one
archive after every command. The same visit goes on with what is not done. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.cases import operations
from benchmarks.command import outputs
from benchmarks.command.options import ROOT, choose_device, to_path
from benchmarks.command.table import markdown_table
from benchmarks.machines import judgement
from benchmarks.measure import record
from benchmarks.measure.resume import AGAIN
from benchmarks.measure.suites import SUITES

TINY = "--at stage=4,height=64,width=96,modalities=2"
HEADLINE = "training,model,encoder"
PARTS = ("operation", "block", "stage")
COMPILERS = ("compile", "flex")
GIB_PER_TEST_PROCESS = 4
"""Of the GPU: the context, what the kernels' tests hold at once, and what the allocator keeps."""
GRACE_SECONDS, KILL_SECONDS, POLL_SECONDS = 3.0, 10.0, 0.05
MOST_STARTS = 20
"""Of a command that wants to be started again, or died and can go on."""
LEAST_SECONDS = 2.0
"""With less left nothing is started any more."""


class Task(NamedTuple):
    """One command. seconds: what it is thought to take, may take even if others then have none, and
    its share where there is more."""

    name: str
    seconds: float
    command: tuple[str, ...]


Plan = Sequence[Sequence[Task]]
"""Tasks that run at once, one such group after the other."""
States = dict[str, dict[str, Any]]
"""What became of tasks, by name: state ("done" or "cut off"; none if it was not started), rc (the
exit status), seconds."""


def tasks(folder: Path, device: torch.device, cache: Path) -> Plan:
    """All commands, in the order of their worth.

    On a CPU the same is rehearsed on little: kernels in Triton's interpreter, tiny shapes, few
    tests, no compilers, which take minutes there, and no compute-sanitizer.
    """
    cuda = device.type == "cuda"
    on, few = f"--device {device.type}", "" if cuda else "--op guided_gate"
    out, binaries = shlex.quote(str(folder)), shlex.quote(str(cache))
    cores = at_once = os.cpu_count() or 2
    gpu = ""
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        gpu = f"--arch {p.major}{p.minor} --num-sms {p.multi_processor_count}"
        at_once = max(1, min(cores, int(p.total_memory / 2**30) // GIB_PER_TEST_PROCESS))
    plain = (
        "env -u TRITON_INTERPRET -u EQUISEG_FAST_BACKEND -u EQUISEG_FAST_TUNED "
        f"TRITON_CACHE_DIR={binaries} PYTHONFAULTHANDLER=1 COLUMNS=165"
    )
    # On a GPU kernels are compiled: the interpreter would prove nothing about them.
    kernels = plain if cuda else f"{plain} TRITON_INTERPRET=1"
    # Every tensor its own allocation, or an access beyond one would hit its neighbour unseen.
    sanitizer = (
        f"{plain} PYTORCH_NO_CUDA_MEMORY_CACHING=1 "
        f"PATH={shlex.quote(os.environ['PATH'])}:/usr/local/cuda/bin "
        "compute-sanitizer --error-exitcode 9 --tool"
    )

    def task(name: str, seconds: float, words: str, before: str = plain) -> Task:
        python = shlex.quote(sys.executable)
        return Task(name, seconds, tuple(shlex.split(f"{before} {python} -m {words}")))

    def run(name: str, seconds: float, words: str) -> Task:
        """One process for many cases, another only after an error that no process survives."""
        results = f"--out {out}/results --resume --no-report"
        return task(name, seconds, f"benchmarks run {on} {results} {words}")

    def tests(name: str, seconds: float, stems: Sequence[str], words: str) -> Task:
        """Kernels against the fp64 reference."""
        files = " ".join(f"tests/test_{stem}.py" for stem in stems)
        options = "-p benchmarks.visiting.on_gpu -v --tb=short -rfEs --timeout 60 --dist load"
        return task(f"parity/{name}", seconds, f"pytest {files} {options} {words}", kernels)

    # The hottest first, for the case that time runs out.
    hottest = [name for name, op in operations().items() if op.function]
    exercise = f"benchmarks exercise {on}"
    # One core is left to what is measured meanwhile, the limits of the device.
    fill = f"{'visit' if cuda else 'core'} {few} {gpu} --processes {max(1, cores - 1)}"
    calibrate = f"benchmarks calibrate {on} --out {out}/calibration"
    groups = [
        [
            task("prepare/environment", 40, "equiseg_fast.env"),
            task("prepare/calibrate", 40, calibrate),
            task("prepare/cache", 40, f"benchmarks dry --cache {binaries} --what {fill}"),
        ],
        # The first proof that kernels run at all; an error of the device in one spoils no other.
        [
            task(f"kernels/{op}", 20, f"{exercise} --op {op}", kernels)
            for op in (hottest if cuda else ["guided_gate"])
        ],
        [task("host", 12, f"benchmarks host {on} {few} --out {out}/results/host.json")],
    ]
    if cuda:
        parts = ",".join(name for name, op in operations().items() if op.scope in PARTS)
        eager = ",".join(p for p in SUITES["core"].providers if p not in (*COMPILERS, "tuned"))
        some = f"--op {parts} --provider {eager}"
        # One shape: compiling takes longer than everything else together.
        one = "--op training,model,attention --at variant=b0,stage=1 --mode fwd,step"
        compilers = f"{one} --provider {','.join(COMPILERS)}"
        # All kernels once: under the tool compiling takes most of the time.
        small = f"{exercise} --dtype bf16"
        groups += [
            [run("headline", 90, f"--suite headline --op {HEADLINE} --patience 60")],
            [tests("kernels", 92, hottest, f"-n {at_once} -m 'not large_memory'")],
            [tests("large", 15, hottest, "-n 1 -m large_memory")],
            [tests("workflows", 21, ("workflows", "testing_memory"), "-n 1 -m gpu")],
            [run("operations", 132, f"--suite core {some} --patience 60")],
            [task("memcheck", 41, small, f"{sanitizer} memcheck")],
            [task("racecheck", 14, small, f"{sanitizer} racecheck")],
            [run("compilers", 41, f"--suite core {compilers} --patience 200")],
        ]
    else:
        some = "-n 2 -k 'test_rho or test_rounds_once'"
        groups += [
            [run("headline", 90, f"{TINY} --op {HEADLINE}")],
            [tests("kernels", 60, ("guided_gate", "add_layer_norm"), some)],
            [run("operations", 60, f"{TINY} --op guided_gate,query_hub")],
        ]
    return [
        *groups,
        [task("report", 10, f"benchmarks report {out}/results")],
        # For a second visit, or for what time the others leave.
        [task("tune", 10, f"benchmarks tune {on} {few} --out {out}/tune", kernels)],
    ]


def share(plan: Plan, remaining: float) -> float:
    """Seconds for the first of the groups that are left."""
    seconds = [max(task.seconds for task in together) for together in plan]
    return min(remaining, max(seconds[0], remaining * seconds[0] / sum(seconds)))


def carry_out(
    plan: Plan, folder: Path, archive: Path, deadline: float, said: Callable[[str], None] = print
) -> States:
    """Every task that is not done, until `deadline` (of `time.monotonic`); what became of all."""
    path = folder / "visit.json"
    states = outputs.read_json(path) if path.is_file() else {}

    def keep(task: Task, state: str, rc: int | None, started: float) -> None:
        seconds = round(time.monotonic() - started, 1)
        states[task.name] = {"state": state, "rc": rc, "seconds": seconds}
        said(f"{task.name}: {state} in {seconds:.0f} s{f', exit status {rc}' if rc else ''}")
        outputs.write(path, json.dumps(states, indent=1) + "\n")
        for what, make in (
            (
                "summary",
                lambda: outputs.write(folder / "summary.md", summary(plan, states, folder)),
            ),
            ("archive", lambda: pack(folder, archive)),
        ):
            try:  # nothing that goes wrong here may end the visit
                make()
            except Exception as error:
                said(f"no {what}: {type(error).__name__}: {error}")

    left = [[task for task in group if not done(task, states)] for group in plan]
    left = [group for group in left if group]
    for i, group in enumerate(left):
        started = time.monotonic()
        seconds = share(left[i:], deadline - started)
        if seconds < LEAST_SECONDS:
            break
        said(f"{', '.join(task.name for task in group)}: at most {seconds:.0f} s")
        running: dict[Task, subprocess.Popen[bytes]] = {}
        starts: Counter[Task] = Counter()
        try:
            for task in group:
                running[task] = _start(task, folder, "w")
            while running and time.monotonic() < started + seconds:
                for task, process in list(running.items()):
                    rc = process.poll()
                    if rc is None:
                        continue
                    again = rc == AGAIN or (rc < 0 and "--resume" in task.command)
                    if again and starts[task] < MOST_STARTS:
                        starts[task] += 1
                        _kill([process])
                        running[task] = _start(task, folder, "a")
                    else:
                        del running[task]
                        _kill([process])
                        keep(task, "done", rc, started)
                time.sleep(POLL_SECONDS)
        finally:
            _kill(running.values())
            for task, process in running.items():
                keep(task, "cut off", process.returncode, started)
    return states


def done(task: Task, states: States) -> bool:
    return states.get(task.name, {}).get("state") == "done"


def failed(task: Task, states: States) -> bool:
    """Whether it ended by itself, and badly."""
    return done(task, states) and states[task.name]["rc"] != 0


def _start(task: Task, folder: Path, mode: str) -> subprocess.Popen[bytes]:
    """In a session of its own, so that its children end with it."""
    log = folder / f"logs/{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open(mode) as file:
        return subprocess.Popen(
            task.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _kill(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """These and all that they have started, as far as it still runs."""
    # What is stuck in a driver survives even SIGKILL; the rest of the visit goes on.
    for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        until = time.monotonic() + patience
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


def summary(plan: Plan, states: States, folder: Path) -> str:
    """As Markdown: every task with its last words, predicted and measured, and what went wrong."""
    rows = []
    for task in (task for group in plan for task in group):
        state = states.get(task.name, {"state": "not started"})
        shown = "failed" if failed(task, states) else state["state"]
        numbers = (str(state.get(name, "")) for name in ("rc", "seconds"))
        rows.append((task.name, shown, *numbers, _last_words(folder / f"logs/{task.name}.log")))
    columns = ("task", "state", "exit status", "seconds", "last words")
    lines = ["# Visit", "", markdown_table(columns, rows, words=2)]
    results, wrong = folder / "results", []
    if (results / record.FILE).is_file():
        records = record.read(results)
        device = record.read_environment(results)["device"]
        lines += ["", "## Predicted and measured", ""]
        lines += judgement.markdown(judgement.compare(records, device))
        wrong = [r for r in records if r.status not in ("ok", "unsupported")]
    logs = sorted(folder.glob("logs/parity/*.log"))
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    for title, found in (
        ("Records without numbers", [f"{r.op} {r.provider} {r.status}: {r.reason}" for r in wrong]),
        ("Tests", [x for x in said if x.startswith(("FAILED ", "ERROR ", "SKIPPED "))]),
    ):
        if found:
            lines += ["", f"## {title}", ""]
            lines += [f"- {what} ({number})" for what, number in Counter(found).items()]
    # It is read elsewhere, where only what is below the folder can be found.
    return "\n".join(lines).replace(f"{folder}/", "") + "\n"


def _last_words(log: Path) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    # Said by a sanitizer that has watched nothing.
    lines = [x for x in text.splitlines() if "Device not supported" in x] or text.split("\n")
    return next((line.strip("= ") for line in reversed(lines) if line.strip()), "")


def pack(folder: Path, archive: Path) -> None:
    """Everything but Triton's binaries; whoever takes the archive gets a whole one."""
    new = archive.with_name(f".{archive.name}.new")
    left_out = [f"visit/{name}" for name in ("triton-cache", archive.name, new.name)]
    archive.parent.mkdir(parents=True, exist_ok=True)

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        # What ends so is on its way to another name.
        out = member.name in left_out or member.name.endswith(".new")
        return None if out else member

    with tarfile.open(new, "w:gz", compresslevel=6) as tar:
        tar.add(folder, "visit", filter=kept)
    new.replace(archive)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, help="for everything; default: 9, on a CPU 4")
    parser.add_argument(
        "--out", type=to_path, default=Path("benchmark-results/visit"),
        help="folder of results, and of a resumed visit; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=to_path, metavar="FILE", help="default: the folder's name with .tar.gz"
    )
    parser.add_argument(
        "--cache", type=to_path, metavar="FOLDER",
        help="binaries compiled beforehand, by `dry --what visit --cache FOLDER` with the Python "
        "and Triton of that machine; default: triton-cache in --out",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu rehearses everything; default: cuda if there is one")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 if a command failed by itself, which includes a failed test, or a rehearsal did
    not come to its end; on a GPU what was cut off is no failure."""
    started = time.monotonic()
    device = choose_device(args.device, needed=not args.dry_run)
    rehearsal = device.type != "cuda"
    minutes = args.minutes if args.minutes is not None else 4 if rehearsal else 9
    folder = args.out.resolve()
    archive = (args.archive or folder.with_name(f"{folder.name}.tar.gz")).resolve()
    plan = tasks(folder, device, (args.cache or folder / "triton-cache").resolve())
    every = [task for group in plan for task in group]
    if args.dry_run:
        for task in every:
            text = f"{task.name}, {task.seconds:.0f} s: {shlex.join(task.command)}"
            console.print(text, markup=False, soft_wrap=True)
        console.print("nothing was run")
        return 0
    outputs.writable(folder)
    outputs.writable_file(archive, option="--archive")
    args.kept = f"what came home is in {args.out}; the same command goes on there"

    def said(text: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {text}", markup=False)

    states = carry_out(plan, folder, archive, started + 60 * minutes, said)
    left = [task.name for task in every if not done(task, states)]
    if left:
        console.print(f"did not fit: {', '.join(left)}; the same command goes on there")
    console.print(f"all of it in {archive}", markup=False, soft_wrap=True)
    return 1 if any(failed(task, states) for task in every) or (rehearsal and left) else 0

"""Two versions of `equiseg_fast` measured in turn: A B, B A, A B, ..

Each version lives in a process of its own that keeps its case warm, and is asked for one short
block of measurement at a time, so that drift and other load hit both alike. The harness, this
package `benchmarks`, is the same in both: only `equiseg_fast` differs.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.command.options import ROOT, full_fp32, use_threads
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import Record, environment
from benchmarks.measure.runner import Runner, Timings
from benchmarks.measure.suites import Suite
from benchmarks.measure.timing import Call, Timing

# The package under test is bound before the harness is found, so each comes from its own root.
BOOTSTRAP = """\
import sys
package, harness, connection = sys.argv[1:]
sys.path[0] = package
import equiseg_fast
sys.path[0] = harness
from benchmarks.versions.alternate import serve
serve(int(connection), package)
"""
READY, BLOCK, DONE = "ready", "block", "done"


@dataclass(frozen=True)
class Task:
    """A case with a single mode, and how to measure it; suite: seconds and rounds of one block."""

    case: Case
    options: Options
    suite: Suite


class Side:
    """One version: a worker process, in which `equiseg_fast` is that of `package`.

    What it prints goes to the file `log`. Raises RuntimeError if the worker ends.
    """

    def __init__(
        self, name: str, package: Path, log: Path, device: torch.device, threads: int | None
    ) -> None:
        self.name = name
        self.log = log
        self.connection, theirs = Pipe()
        command = (sys.executable, "-c", BOOTSTRAP, str(package), str(ROOT), str(theirs.fileno()))
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, pass_fds=[theirs.fileno()], stdout=out, stderr=out
            )
        theirs.close()
        self.send((str(device), threads))

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def _ended(self) -> RuntimeError:
        self.process.wait()
        lines = self.log.read_text().strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        return RuntimeError(
            f"the worker of {self.name} ended with {self.process.returncode}: {last} "
            f"(all of it in {self.log.name})"
        )

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(sides: Sequence[Side], task: Task, blocks: int) -> list[list[Record]]:
    """The records of every side. Whoever is ready, that is correct and warm, is asked in turn."""
    for side in sides:
        side.send(task)
    # What a side says instead of READY, or of the number of its block, are its records.
    answers = [side.receive() for side in sides]
    order = list(range(len(sides)))
    for i in range(blocks):
        for j in order if i % 2 == 0 else order[::-1]:
            if not _final(answers[j]):
                sides[j].send(BLOCK)
                answers[j] = sides[j].receive()
    for j, side in enumerate(sides):
        if not _final(answers[j]):
            side.send(DONE)
            answers[j] = side.receive()
    return [_errors(task, rows) if isinstance(rows, str) else rows for rows in answers]


def _final(answer: Any) -> bool:
    """Records, or the reason why there are none."""
    return answer != READY and not isinstance(answer, int)


def _errors(task: Task, reason: str) -> list[Record]:
    records = task.case.records(task.options.suite)
    return [replace(record, status="error", reason=reason) for record in records]


class BlockRunner(Runner):
    """A `Runner` that measures when it is asked to, block by block."""

    connection: Connection

    def _measure(
        self,
        calls: Mapping[str, list[Call]],
        graphs: Mapping[str, tuple[Call, int]],
        both: bool,
    ) -> Timings:
        if not calls:
            return {}
        self.connection.send(READY)
        blocks: list[Timings] = []
        while self.connection.recv() == BLOCK:
            blocks.append(super()._measure(calls, graphs, both))
            self.connection.send(len(blocks))
        return {
            method: {name: pooled([block[method][name] for block in blocks]) for name in found}
            for method, found in blocks[0].items()
        }


def pooled(blocks: Sequence[Timing]) -> Timing:
    """Quantiles over blocks. By wall clock a block counts with its fastest call, because others on
    the machine only ever add time; by CUDA events with its median."""
    method = blocks[0].method
    samples = [b.min_us if method == "wall" else b.p50_us for b in blocks]
    timing = Timing.of([us / 1e6 for us in samples], method)
    if method != "wall":
        return timing
    # The fastest calls count, and so do the quietest moments.
    cpu = statistics.median(b.cpu_us for b in blocks)
    shares = [b.cpu_share for b in blocks if b.cpu_share is not None]
    return replace(timing, cpu_us=cpu, cpu_share=max(shares, default=None))


def serve(handle: int, package: str) -> None:
    """The worker: records for every task that comes, until the other end closes."""
    import equiseg_fast

    if not Path(equiseg_fast.__file__).is_relative_to(package):
        raise RuntimeError(f"equiseg_fast was imported from elsewhere than {package}")
    connection = Connection(handle)
    device, threads = connection.recv()
    use_threads(threads)
    full_fp32()
    connection.send(environment(torch.device(device)))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        except (ImportError, AttributeError) as error:
            # A version that lacks what this operation's benchmark imports.
            reason = re.sub(r" \(/.*\)$", "", str(error))  # names a file of the checkout
            connection.send(f"{type(error).__name__}: {reason}")
            continue
        runner = BlockRunner(task.options, suite=task.suite)
        runner.connection = connection
        connection.send(runner.run(task.case))

"""The working tree against another revision, measured in turn in one run: A B, B A, A B, ..

Each version lives in a process of its own that keeps its case warm and measures one short block at
a time, so that drift and other load hit both alike. Both are measured by the benchmarks of the
working tree: a change of the benchmarks themselves is never seen as a change of speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import equiseg_fast
from benchmarks.command import outputs
from benchmarks.command.options import ROOT, device_arguments, full_fp32, to_path, use_threads
from benchmarks.measure.plan import Case, Options, dry_run, plan, selection_arguments
from benchmarks.measure.record import Writer, environment, read
from benchmarks.measure.runner import Runner, Timings
from benchmarks.measure.suites import SUITES, Suite
from benchmarks.measure.timing import Timing
from benchmarks.versions import compare

SPAWN = multiprocessing.get_context("spawn")
READY, BLOCK, DONE = "ready", "block", "done"
Task = tuple[Case, Options, Suite]
"""A case with a single mode, and how to measure it; suite: seconds and rounds of one block."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks against`."""
    parser.add_argument("--base", required=True, metavar="REV", help="any revision git knows")
    selection_arguments(parser)
    device_arguments(parser, measured=True)
    blocks = "measurements of each version, at least 3; default: 9"
    parser.add_argument("--blocks", type=int, default=9, help=blocks)
    default = "default: benchmark-results/against-<base>-<date>"
    parser.add_argument("--out", type=to_path, help=default)
    compare.verdict_arguments(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 under --fail if anything is slower or lost."""
    if args.blocks < 3:
        raise ValueError(f"--blocks must be at least 3, or bands mean nothing; got {args.blocks}")
    options = Options.of(args)
    options = replace(options, providers=options.providers or ("torch", "triton"))
    suite = replace(SUITES[args.suite], seconds=0.1, rounds=(2, 100))
    cases = plan(options)
    sha = _git("rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}")
    console.print(f"base: {_git('log', '-1', '--format=%h %s', sha)}; new: the working tree")
    if args.dry_run:
        lines = dry_run(cases, torch.device(options.device))
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        return 0
    default = Path("benchmark-results") / f"against-{sha[:10]}-{datetime.now():%Y%m%d-%H%M}"
    out = outputs.writable(args.out or outputs.fresh(default), "base", "new")
    args.kept = f"what was measured on both sides is in {out}, for `compare`"
    with TemporaryDirectory(prefix="equiseg-base-") as folder:
        base = Path(folder).resolve() / "base"
        _git("archive", f"--output={base}.tar", sha)
        shutil.unpack_archive(f"{base}.tar", base)
        shutil.rmtree(base / "benchmarks", ignore_errors=True)
        sides = Side(base, out / "base"), Side(ROOT, out / "new")
        # The harness stands in the working tree and knows the commit of that alone.
        for side, known in zip(sides, ({"git_sha": sha, "git_dirty": False}, {}), strict=True):
            side.ask((options.device, args.threads, known))
        tasks = [(replace(c, modes=(m,)), options, suite) for c in cases for m in c.modes]
        for task in track(tasks, "measuring in turn", console=console, transient=True):
            for line in measure(sides, task, args.blocks):
                console.print(line, markup=False)
    console.print(f"medians of {args.blocks} blocks; written to {out}", soft_wrap=True)
    return compare.judge(read(out / "base"), read(out / "new"), args, console)


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no such revision"
        raise ValueError(f"git {' '.join(arguments)}: {reason}")
    return done.stdout.strip()


class Side:
    """One version: a worker process, in which `equiseg_fast` is that of the folder `package`, and
    which writes into the folder `out`."""

    def __init__(self, package: Path, out: Path) -> None:
        self.out = out
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, package, out), daemon=True)
        sys.path.insert(0, str(package))  # which the process inherits
        self.process.start()
        sys.path.pop(0)
        theirs.close()

    def ask(self, message: Any) -> Any:
        """The answer. Raises RuntimeError if the worker has ended."""
        try:
            self.connection.send(message)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise RuntimeError(
                f"the worker of {self.out.name} ended with {self.process.exitcode}, see above"
            ) from error


def measure(sides: Sequence[Side], task: Task, blocks: int) -> list[str]:
    """Asks in turn who answers READY, that is correct and warm. Returns who cannot have any records
    of the task, and why."""
    answers = [side.ask(task) for side in sides]
    for i in range(blocks):
        for j in sorted(range(len(sides)), reverse=i % 2 == 1):
            if answers[j] == READY:
                answers[j] = sides[j].ask(BLOCK)
    ends = [s.ask(DONE) if a == READY else a for s, a in zip(sides, answers, strict=True)]
    said = zip(sides, ends, strict=True)
    return [f"{side.out.name} has no {task[0].label}: {why}" for side, why in said if why]


def serve(connection: Connection, package: Path, out: Path) -> None:
    """The worker: measures every task that comes, until it is killed."""
    if not Path(equiseg_fast.__file__).is_relative_to(package):
        raise RuntimeError(f"equiseg_fast must be that of {package}; got {equiseg_fast.__file__}")
    device, threads, known = connection.recv()
    use_threads(threads)
    full_fp32()
    env = environment(torch.device(device)) | known
    env["env_id"] += f"-{out.name}"
    outputs.write(out / "env.json", json.dumps(env, indent=1) + "\n")
    writer = Writer(out, env_id=env["env_id"])
    why = ""
    while True:
        connection.send(why)
        try:
            case, options, suite = connection.recv()
        except EOFError:  # that was all
            return
        except (ImportError, AttributeError) as error:
            # A version that lacks what this operation's benchmark imports.
            why = f"{type(error).__name__}: {error}".partition(" (/")[0]  # a file of the checkout
            continue
        runner = BlockRunner(options, suite=suite)
        runner.connection = connection
        writer.add(runner.run(case))  # as it goes: an interrupted run keeps what it has
        why = ""


class BlockRunner(Runner):
    """A `Runner` that measures when it is asked to, block by block."""

    connection: Connection

    def _measure(self, *arguments: Any) -> Timings:
        blocks: list[Timings] = []
        self.connection.send(READY)
        while self.connection.recv() == BLOCK:
            blocks.append(super()._measure(*arguments))
            self.connection.send(READY)
        return {
            method: {name: pooled([block[method][name] for block in blocks]) for name in found}
            for method, found in blocks[0].items()
        }


def pooled(blocks: Sequence[Timing]) -> Timing:
    """Quantiles over blocks. By wall clock a block counts with its fastest call, because others on
    the machine only ever add time; by CUDA events with its median."""
    wall = blocks[0].method == "wall"
    seconds = [(block.min_us if wall else block.p50_us) / 1e6 for block in blocks]
    quiet = min(blocks, key=lambda block: block.min_us)
    timing = Timing.of(seconds, quiet.method)
    return replace(timing, cpu_us=quiet.cpu_us, cpu_share=quiet.cpu_share)

"""The working tree against another revision, measured in turn in one run.

The base is checked out into a temporary git worktree, which is removed afterwards. Both versions
are measured by the benchmarks of the working tree, so the base needs no benchmarks of its own, only
the functions they call; a change of the benchmarks themselves is therefore never seen as a change
of speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.command import outputs
from benchmarks.command.options import ROOT, device_arguments, to_path, verdict_arguments
from benchmarks.measure.plan import Options, dry_run, plan, selection_arguments
from benchmarks.measure.record import Record, write_jsonl
from benchmarks.measure.suites import SUITES
from benchmarks.versions import compare
from benchmarks.versions.alternate import Side, Task, measure

OURS = ("torch", "triton")
BLOCK_SECONDS = 0.1
BLOCK_ROUNDS = (2, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks against`."""
    parser.add_argument("--base", required=True, metavar="REV", help="any revision git knows")
    selection_arguments(parser)
    device_arguments(parser, measured=True)
    parser.add_argument(
        "--blocks", type=int, default=9, help="measurements of each version, at least 3"
    )
    parser.add_argument(
        "--out", type=to_path, help="default: benchmark-results/against-<base>-<date>"
    )
    verdict_arguments(parser)


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 under --fail if anything is slower or lost."""
    if args.blocks < 3:
        raise ValueError(f"--blocks must be at least 3, or bands mean nothing; got {args.blocks}")
    options = Options.of(args)
    options = replace(options, providers=options.providers or OURS)
    device = torch.device(options.device)
    suite = replace(SUITES[args.suite], seconds=BLOCK_SECONDS, rounds=BLOCK_ROUNDS)
    cases = plan(options)
    tasks = [
        Task(replace(case, modes=(mode,)), options, suite) for case in cases for mode in case.modes
    ]
    sha = _git("rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}")
    console.print(f"base: {_git('log', '-1', '--format=%h %s', sha)}; new: the working tree")
    if args.dry_run:
        console.print("\n".join(dry_run(cases, device)), markup=False, soft_wrap=True)
        return 0

    default = Path("benchmark-results") / f"against-{sha[:10]}-{datetime.now():%Y%m%d-%H%M}"
    out = outputs.writable(args.out or outputs.fresh(default), "base", "new", "comparison.md")
    args.kept = f"what was measured on both sides is in {out}, for `compare`"
    for name in ("base", "new"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with _worktree(sha) as base, ExitStack() as stack:
        sides = [
            stack.enter_context(closing(Side(name, package, log, device, args.threads)))
            for name, package in (("base", base), ("new", ROOT))
            for log in [out / f"{name}.log"]
        ]
        envs = _environments(sides, sha, out)
        rows: list[list[Record]] = [[], []]
        for task in track(tasks, "measuring in turn", console=console, transient=True):
            for kept, found, env, side in zip(
                rows, measure(sides, task, args.blocks), envs, sides, strict=True
            ):
                kept += [replace(row, env_id=env["env_id"]) for row in found]
                # Written as it goes: an interrupted run keeps what it has.
                write_jsonl(kept, out / side.name / "results.jsonl")
    changes = compare.compare(*rows, threshold=args.threshold, atol_us=args.atol_us)
    title = f"working tree against {sha[:10]}, medians of {args.blocks} blocks (p20 to p80)"
    outputs.write(out / "comparison.md", compare.markdown(changes, title))
    console.print(compare.table(changes, title))
    for line in (*_without_base(*rows), *compare.notes(*rows, changes, args.threshold)):
        console.print(line, markup=False)
    console.print(f"{compare.summary(changes)}; written to {out}", markup=False, soft_wrap=True)
    return 1 if args.fail and compare.failed(changes) else 0


def _environments(sides: Sequence[Side], sha: str, out: Path) -> list[dict[str, Any]]:
    """The workers' records of their environment, also written into `out`."""
    envs = [side.receive() for side in sides]
    # The harness stands in the working tree and knows the commit of that alone.
    envs[0] |= {"git_sha": sha, "git_dirty": False, "env_id": f"{envs[0]['env_id']}-{sha[:10]}"}
    for side, env in zip(sides, envs, strict=True):
        outputs.write(out / side.name / "env.json", json.dumps(env, indent=1) + "\n")
    return envs


def _without_base(base: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What cannot be compared because base has no numbers, with its reasons."""
    reasons = {row.key: f"{row.status}, {row.reason}" for row in base if row.p50_us is None}
    return [
        f"not compared: {row.op} {row.mode} {row.provider}: base: {reasons[row.key]}"
        for row in new
        if row.key in reasons and row.status != "unsupported"
    ]


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no such revision"
        raise ValueError(f"git {' '.join(arguments)}: {reason}")
    return done.stdout.strip()


@contextmanager
def _worktree(sha: str) -> Iterator[Path]:
    """A checkout of this commit, removed however the block ends."""
    with TemporaryDirectory(prefix="equiseg-base-") as folder:
        path = Path(folder) / "base"
        try:
            _git("worktree", "add", "--quiet", "--detach", str(path), sha)
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))

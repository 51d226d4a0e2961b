"""`python -m benchmarks`: see `--help`. What fails while measured becomes a row, no exit code.

Exit status: 0; 1 for what was found wrong (failures, regressions under --fail, what is stale under
--check); 2 for what cannot be done as asked, read or written; 75 if the same command with --resume
goes on in a new process; 130 if interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from benchmarks import readme, run
from benchmarks.cases import operations
from benchmarks.cases.common.op import unavailable
from benchmarks.command.options import choose_device
from benchmarks.machines import calibrate, predictions, roofline, tune
from benchmarks.measure import breakdown, host, profiling
from benchmarks.measure import record as records_of
from benchmarks.measure.plan import Options, plan
from benchmarks.measure.suites import SUITES
from benchmarks.miniature import run as miniature
from benchmarks.offline import dry, exercise, resources
from benchmarks.providers.provider import PROVIDERS
from benchmarks.reporting import report
from benchmarks.versions import against, compare
from benchmarks.visiting import visit

INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, see above; 2 is raised as SystemExit."""
    parser = _parser()
    args = parser.parse_args(arguments)
    # A pipe has no width; the table needs this much.
    console = Console(width=None if sys.stdout.isatty() else 165, highlight=False)
    try:
        with _terminable():
            return args.run(args, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {args.kept}", markup=False, soft_wrap=True)
        return INTERRUPTED
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # a full disk, a missing file: the place says more than a traceback
        where = f"{error.filename}: " if error.filename else ""
        parser.error(f"{where}{error.strerror or error}; {args.kept}")
    except RuntimeError as error:  # of PyTorch or Triton, perhaps: where it came from matters
        traceback.print_exc()
        parser.error(str(error))


@contextmanager
def _terminable() -> Iterator[None]:
    """Being terminated, or losing the terminal, ends the block as Ctrl-C does, so that nothing is
    left, nor goes on."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt

    hangup = getattr(signal, "SIGHUP", None)  # not on Windows; ignored under nohup
    heeded = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    signals = (signal.SIGTERM, hangup) if heeded else (signal.SIGTERM,)
    before = {number: signal.signal(number, terminated) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS: dict[str, tuple[Any, str]] = {
    "run": (run, "check, measure, and write a folder of results"),
    "report": (report, "report and plots again, from results.jsonl"),
    "breakdown": (breakdown, "where the time of the model goes, for the report of a run"),
    "compare": (compare, "what became slower between two runs"),
    "against": (against, "the working tree beside another revision, measured in turn"),
    "profile": (profiling, "the operators or kernels of one case, and a trace"),
    "host": (host, "how long the host works for a call, and on what"),
    "exercise": (exercise, "every kernel once on small shapes, for compute-sanitizer"),
    "visit": (visit, "all that a few minutes on a GPU machine should bring home"),
    "dry": (dry, "bind and compile for a GPU that is not there, or fill a cache of binaries"),
    "tune": (tune, "search faster launch configurations on a GPU"),
    "roofline": (roofline, "predicted floors on a GPU, without having one"),
    "predict": (predictions, "what a GPU should take for everything that is timed there"),
    "miniature": (miniature, "what the parts of EQUISeg are worth when sensors fail"),
    "readme": (readme, "the numbers of README.md from the results that are committed"),
    "resources": (resources, "what every kernel needs, without a GPU"),
    "calibrate": (calibrate, "what this device can do at most"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # What is said when a command is interrupted or the disk is full; some know more.
    parser.set_defaults(kept="the same command starts anew")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="operations, their costs, providers and suites")
    listing.set_defaults(run=_list)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
        if name == "resources":
            command.set_defaults(run=lambda args, console: resources.main(args))
    env = commands.add_parser("env", help="the environment record of this machine")
    env.set_defaults(run=_env)
    return parser


def _list(args: argparse.Namespace, console: Console) -> int:
    for name, op in operations().items():
        providers = [p for p in PROVIDERS if not unavailable(op, p, torch.device("cpu"))]
        console.print(f"[bold]{name}[/]: {op.formula}; on a CPU: {', '.join(providers)}")
    for name, suite in SUITES.items():
        cases = plan(Options(suite=name))
        console.print(
            f"suite [bold]{name}[/]: {len(cases)} cases, {sum(len(c.modes) for c in cases)} with "
            f"their modes; dtypes {', '.join(suite.dtypes)}"
        )
    for name, provider in PROVIDERS.items():
        console.print(f"provider [bold]{name}[/]: {provider.what}")
    return 0


def _env(args: argparse.Namespace, console: Console) -> int:
    console.print_json(json.dumps(records_of.environment(choose_device(None))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

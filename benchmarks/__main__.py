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
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

INTERRUPTED = 128 + signal.SIGINT
COMMANDS = {
    "run": ("run", "check, measure, and write a folder of results"),
    "report": ("reporting.report", "report and plots again, from results.jsonl"),
    "breakdown": ("measure.breakdown", "where the time of the model goes, for the report of a run"),
    "compare": ("versions.compare", "what became slower between two runs"),
    "against": ("versions.against", "the working tree beside another revision, measured in turn"),
    "profile": ("measure.profiling", "the operators or kernels of one case, and a trace"),
    "host": ("measure.host", "how long the host works for a call, and on what"),
    "exercise": ("offline.exercise", "every kernel once on small shapes, for compute-sanitizer"),
    "visit": ("visiting.visit", "all that a few minutes on a GPU machine should bring home"),
    "dry": ("offline.dry", "bind and compile for a GPU that is not there, or fill a cache"),
    "tune": ("machines.tune", "search faster launch configurations on a GPU"),
    "roofline": ("machines.roofline", "predicted floors on a GPU, without having one"),
    "predict": ("machines.predictions", "what a GPU should take for everything timed there"),
    "miniature": ("miniature.run", "what the parts of EQUISeg are worth when sensors fail"),
    "readme": ("readme", "the numbers of README.md from the results that are committed"),
    "resources": ("offline.resources", "what every kernel needs, without a GPU"),
    "calibrate": ("machines.calibrate", "what this device can do at most"),
    "env": ("", "the environment record of this machine"),
}
"""Module below `benchmarks`, and help. Only that of the command at hand is imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, see above; 2 is raised as SystemExit."""
    # Being terminated, or losing the terminal, ends a command as Ctrl-C does, so that nothing is
    # left, nor goes on. There is no SIGHUP on Windows, and nohup ignores it.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser("".join(words[:1]))
    args = parser.parse_args(words)
    # A pipe has no width; the table needs this much.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    try:
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


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Of all commands, with the arguments of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # What is said when a command is interrupted or the disk is full; some know more.
    parser.set_defaults(kept="the same command starts anew")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (path, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == "env":
            command.set_defaults(run=_env)
        elif name == chosen:
            module = import_module(f"benchmarks.{path}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    return parser


def _env(args: argparse.Namespace, console: Console) -> int:
    from benchmarks.command.options import choose_device
    from benchmarks.measure.record import environment

    console.print_json(json.dumps(environment(choose_device(None))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

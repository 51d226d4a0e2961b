"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
Pairs = tuple[tuple[str, str], ...]


def kernel_stems() -> list[str]:
    """The files of kernels, each of which has `offline_entries(arch)`. (Here because who compiles
    them must not import equiseg_fast before it has said that nothing is interpreted.)"""
    return sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_"))


def device_arguments(parser: argparse.ArgumentParser, measured: bool = False) -> None:
    """Where, and on which inputs; measured: also how times are taken, for `run` and `against`."""
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    dry = "only say what would run, and who is left out and why"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    if measured:
        methods, how = ("graph", "eager"), "how a GPU is timed"
        parser.add_argument("--method", choices=methods, default="graph", help=how)
        threads_argument(parser)


def threads_argument(parser: argparse.ArgumentParser) -> None:
    threads = "of PyTorch on the CPU; default: its own choice"
    parser.add_argument("--threads", type=to_threads, help=threads)


def to_path(text: str) -> Path:
    """A path; an empty one, of a shell variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def to_threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"must be 1 to 1024; got {text!r}")
    return int(text)


def use_threads(number: int | None) -> None:
    """As many threads of PyTorch, or as it has by itself."""
    if number is not None:
        torch.set_num_threads(number)


def full_fp32() -> None:
    """Every provider multiplies fp32 in fp32, whatever cuDNN would like."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def names(text: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return tuple(name for name in text.split(",") if name)


def pairs(text: str) -> Pairs:
    """`variant=b2,stage=1` as pairs."""
    found = tuple((name, value) for name, _, value in (p.partition("=") for p in names(text)))
    if not all(value for _, value in found):
        raise argparse.ArgumentTypeError(f"must be like variant=b2,stage=1; got {text!r}")
    return found


def choose_device(name: str | None, needed: bool = True) -> torch.device:
    """The device of this name; by default the GPU if there is one. Raises ValueError if it cannot
    be measured, or is needed and does not exist."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or, as in cuda:1, one of them; got {name!r}")
    device = torch.device(name)
    there = torch.cuda.device_count()
    if needed and device.type == "cuda" and (device.index or 0) >= there:
        seen = f"only {there} here" if there else "no GPU here"
        raise ValueError(f"--device is {name}, but torch sees {seen}")
    return device

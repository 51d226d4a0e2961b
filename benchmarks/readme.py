"""The numbers of README.md and of docs/, written from the results in `benchmarks/results` and from
nothing else: what stands between `<!-- numbers: NAME -->` and `<!-- /numbers -->`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import ROOT
from benchmarks.command.table import markdown_table, milliseconds
from benchmarks.machines import gpus, roofline
from benchmarks.measure.record import Record, read
from benchmarks.reporting.report import contests, overview

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE = "cpu-2-cores"
REGION = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- /numbers -->)", re.DOTALL)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PREDICTED = ("a100", "h100", "h200", "b200")
PREDICTIONS = """\
No GPU has been measured yet. What follows are predictions, not measurements: the least
time in ms that the bytes, FLOPs and exponentials of what EQUISeg calls take at published
peaks, one call after the other, under autocast to bf16, with four modalities at
1024 x 1024, batch 1 (`python -m benchmarks roofline --gpu h200`)."""


class Folder(NamedTuple):
    """Results of one machine."""

    name: str
    env: dict[str, Any]
    records: list[Record]

    @property
    def gpu(self) -> bool:
        return "capability" in self.env

    @property
    def report(self) -> str:
        return f"([report](benchmarks/results/{self.name}/report.md))"


def folders() -> list[Folder]:
    """All results of runs, by name."""
    paths = [path.parent for path in sorted(RESULTS.glob("*/results.jsonl"))]
    return [Folder(p.name, outputs.read_json(p / "env.json"), read(p)) for p in paths]


def rewritten(pages: Mapping[Path, str], found: Sequence[Folder]) -> dict[Path, str]:
    """The pages with their regions filled from these results. Raises ValueError on a region that
    does not exist, or is nowhere."""
    names = sorted(match[2] for text in pages.values() for match in REGION.finditer(text))
    if names != sorted(REGIONS):
        raise ValueError(
            f"README.md and docs/ must have the regions {', '.join(sorted(REGIONS))}, each once "
            f"and closed; got {', '.join(names) or 'none'}"
        )
    fresh = dict(pages)
    for path, text in pages.items():
        for match in REGION.finditer(text):
            numbers = REGIONS[match[2]](found)
            if path.parent.name == "docs":
                numbers = numbers.replace("](benchmarks/", "](../benchmarks/")
            fresh[path] = fresh[path].replace(match[0], f"{match[1]}{numbers}\n{match[4]}")
    return fresh


def headline(found: Sequence[Folder]) -> str:
    """The whole model, one sentence."""
    here = next(folder for folder in found if folder.name == HEADLINE)
    by_op = {(c.ours.op, c.ours.mode): c for c in contests(here.records)}
    forward, step = by_op["model", "fwd"], by_op["training", "step"]
    if not (forward.settled and step.settled):
        raise ValueError(
            f"{HEADLINE} has no headline: too few samples, a band that is too wide, or a busy "
            "machine; run it again"
        )
    shape = forward.ours.shape
    threads, modalities = (NUMBERS[n] for n in (here.env["threads"], shape.modalities))
    ms = [milliseconds(r.p50_us) for c in (forward, step) for r in (c.other, c.ours)]
    memory = 100 * step.ours.peak_mib / step.other.peak_mib
    return (
        f"On {threads} CPU cores EQUISeg-{shape.variant.upper()} at {shape.height} x {shape.width} "
        f"with {modalities} modalities takes {ms[0]} ms\nin plain PyTorch and {ms[1]} ms here; a "
        f"training step takes {ms[2]} ms and {ms[3]} ms,\nwith {memory:.0f} % of the memory "
        f"{here.report}. By operation:"
    )


def sections(found: Iterable[Folder]) -> str:
    """A table for each of these folders."""
    tables = []
    for folder in found:
        env, suites = folder.env, ", ".join(dict.fromkeys(r.suite for r in folder.records))
        where = env["device"] if folder.gpu else f"{env['threads']} threads of {env['cpu']}"
        title = f"{where}, torch {env['torch']}, suite {suites} {folder.report}:"
        tables.append(f"{title}\n\n{overview(contests(folder.records))}")
    return "\n\n".join(tables)


def predictions() -> str:
    """Floors of the whole model, from published peaks."""
    known = [gpus.GPUS[name] for name in PREDICTED]
    rows = []
    for variant in ("b0", "b2"):
        shape = Shape(variant, 0, 1024, 1024, batch=1, modalities=4)
        for mode, what in (("fwd", "forward"), ("step", "training step")):
            works = roofline.model_works(shape, "bf16", mode)
            floors = (milliseconds(1e6 * gpu.limits.floor(works, "bf16")) for gpu in known)
            rows.append([f"EQUISeg-{variant.upper()}, {what}", *floors])
    columns = ["predicted floor", *(gpu.title for gpu in known)]
    return f"{PREDICTIONS}\n\n{markdown_table(columns, rows, words=1)}"


def miniature() -> str:
    """What parts of EQUISeg are worth when sensors fail."""
    from benchmarks.miniature import report  # the data and their libraries, for this alone

    return report.overview(outputs.read_json(RESULTS / "miniature" / "results.json"))


REGIONS: dict[str, Callable[[Sequence[Folder]], str]] = {
    "headline": headline,
    "quick": lambda found: sections(f for f in found if f.name == HEADLINE),
    "cpu": lambda found: sections(f for f in found if not f.gpu and f.name != HEADLINE),
    "gpu": lambda found: sections(f for f in found if f.gpu) or predictions(),
    "miniature": lambda found: miniature(),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks readme`."""
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if stale")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 under --check if a page is not what the results say."""
    pages = {path: path.read_text() for path in PAGES}
    fresh = rewritten(pages, folders())
    changed = [path for path in pages if fresh[path] != pages[path]]
    for path in changed:
        console.print(f"{'stale' if args.check else 'written'}: {path.name}")
        if not args.check:
            path.write_text(fresh[path])
    return 1 if changed and args.check else 0

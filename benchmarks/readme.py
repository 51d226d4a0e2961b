"""The numbers of README.md and of docs/, written from the results in `benchmarks/results` and from
nothing else.

What stands between `<!-- numbers: NAME -->` and `<!-- /numbers -->` is replaced: `headline`, a
sentence about the whole model on a CPU; `quick`, its table; `cpu` and `gpu`, a table for every
other folder of results; `miniature`, the table of `benchmarks.miniature`. Until there are results
of a GPU, `gpu` says that none was measured, and gives predictions called that.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases.common.problem import Shape
from benchmarks.command import outputs
from benchmarks.command.options import ROOT
from benchmarks.command.table import milliseconds, significant, times
from benchmarks.machines import gpus, roofline
from benchmarks.measure.record import Record, read
from benchmarks.reporting.analysis import Contest, contests

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = Path("benchmarks") / "results"
HEADLINE = "cpu-2-cores"
REGION = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- /numbers -->)", re.DOTALL)
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
MODES = {"fwd": "forward", "step": "training step"}
PREDICTED = ("a100", "h100", "h200", "b200")


@dataclass(frozen=True)
class Folder:
    """Results of one machine. link: the folder, from the root."""

    link: str
    env: dict[str, Any]
    records: list[Record]

    @property
    def gpu(self) -> bool:
        return "capability" in self.env

    @property
    def machine(self) -> str:
        env = self.env
        where = env["device"] if self.gpu else f"{env['threads']} threads of {env['cpu']}"
        return f"{where}, torch {env['torch']}"


def folders(root: Path) -> list[Folder]:
    """All results of runs below `root`, by name."""
    paths = [path.parent for path in sorted((root / RESULTS).glob("**/results.jsonl"))]
    return [
        Folder(str(path.relative_to(root)), outputs.read_json(path / "env.json"), read(path))
        for path in paths
    ]


def rewritten(pages: Mapping[Path, str], found: Sequence[Folder]) -> dict[Path, str]:
    """The pages with their regions filled from these results. Raises ValueError on a region that
    does not exist, or is nowhere."""
    text = "".join(pages.values())
    names = re.findall(r"<!-- numbers: (\w+) -->", text)
    if sorted(names) != sorted(REGIONS) or len(REGION.findall(text)) != len(names):
        raise ValueError(
            f"README.md and docs/ must have the regions {', '.join(sorted(REGIONS))}, each once "
            f"and closed; got {', '.join(sorted(names)) or 'none'}"
        )

    def filled(path: Path, text: str) -> str:
        above = "../" if path.parent.name == "docs" else ""

        def region(match: re.Match[str]) -> str:
            numbers = REGIONS[match[2]](found).replace("](benchmarks/", f"]({above}benchmarks/")
            return f"{match[1]}{numbers}\n{match[4]}"

        return REGION.sub(region, text)

    return {path: filled(path, text) for path, text in pages.items()}


def headline(found: Sequence[Folder]) -> str:
    """The whole model, one sentence."""
    here = _headline_folder(found)
    by_op = {(c.ours.op, c.ours.mode): c for c in contests(here.records)}
    forward, step = by_op["model", "fwd"], by_op["training", "step"]
    for contest in (forward, step):
        if not contest.settled:
            raise ValueError(
                f"{here.link} has no headline: {contest.label} has too few samples, a band that is "
                "too wide, or was measured on a busy machine; run it again"
            )
    shape = forward.ours.shape
    memory = step.ours.peak_mib / step.other.peak_mib
    return (
        f"On {_word(here.env['threads'])} CPU cores EQUISeg-{shape.variant.upper()} at "
        f"{shape.height} x {shape.width} with {_word(shape.modalities)} modalities takes "
        f"{milliseconds(forward.other.p50_us)} ms\nas public code writes it and "
        f"{milliseconds(forward.ours.p50_us)} ms here; a training step takes "
        f"{milliseconds(step.other.p50_us)} ms and {milliseconds(step.ours.p50_us)} ms,\nwith "
        f"{100 * memory:.0f} % of the memory ([report]({here.link}/report.md)). By operation:"
    )


def quick(found: Sequence[Folder]) -> str:
    return _section(_headline_folder(found))


def _headline_folder(found: Sequence[Folder]) -> Folder:
    for folder in found:
        if Path(folder.link).name == HEADLINE:
            return folder
    raise ValueError(f"{RESULTS} must have the folder {HEADLINE}")


def _word(number: int) -> str:
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


def failures(found: Sequence[Folder]) -> str:
    """What parts of EQUISeg are worth when sensors fail."""
    from benchmarks.miniature import report  # the data and their libraries, for this alone

    return report.overview(outputs.read_json(ROOT / RESULTS / "miniature" / "results.json"))


def cpu(found: Sequence[Folder]) -> str:
    others = (f for f in found if not f.gpu and Path(f.link).name != HEADLINE)
    return "\n\n".join(map(_section, others))


def gpu(found: Sequence[Folder]) -> str:
    measured = [_section(folder) for folder in found if folder.gpu]
    return "\n\n".join(measured) if measured else _predictions()


def _section(folder: Folder) -> str:
    """The table of a folder: of every operation the first shape with each number of modalities, of
    whole networks of each variant; the others are in the report."""
    first: dict[tuple[str, int, str], Shape] = {}
    rows: dict[tuple[str, str], dict[str, Contest]] = {}
    for contest in contests(folder.records):
        shape = contest.ours.shape
        # Training is the step of the model: one row.
        op = "model" if contest.ours.op == "training" else contest.ours.op
        variant = "" if shape.stage else shape.variant
        if shape == first.setdefault((op, shape.modalities, variant), shape):
            own = rows.setdefault((op, f"{shape.label} {contest.ours.dtype}"), {})
            own[contest.ours.mode] = contest
    suite = ", ".join(dict.fromkeys(r.suite for r in folder.records))
    head = [f"| {mode}: other | here | ratio " for mode in MODES]
    lines = [f"| {op} | {label} | {' | '.join(_cells(m))} |" for (op, label), m in rows.items()]
    return "\n".join([
        f"{folder.machine}, suite {suite} ([report]({folder.link}/report.md)):", "",
        f"| | case {''.join(head)}| MiB: other | here |",
        f"|---|---|{'--:|' * (3 * len(MODES) + 2)}", *lines,
    ])  # fmt: skip


def _cells(modes: dict[str, Contest]) -> list[str]:
    cells = []
    for contest in map(modes.get, MODES):
        if contest is None:
            cells += ["", "", ""]
            continue
        other, ratio = milliseconds(contest.other.p50_us), times(contest.ratio)
        named = "" if contest.other.provider == "baseline" else f" {contest.other.provider}"
        cells += [other + named, milliseconds(contest.ours.p50_us)]
        ratio = ratio if contest.clear else f"({ratio})"
        cells.append(ratio if contest.settled else f"{ratio} †")
    last = modes.get("step") or next(iter(modes.values()))
    return [*cells, significant(last.other.peak_mib), significant(last.ours.peak_mib)]


def _predictions() -> str:
    """Floors of the whole model, from published peaks."""
    titles = [gpus.by_name(name).title for name in PREDICTED]
    lines = [
        "No GPU has been measured yet. What follows are predictions, not measurements: the least",
        "time in ms that the bytes, FLOPs and exponentials of what EQUISeg calls take at published",
        "peaks, one call after the other, under autocast to bf16, with four modalities at",
        "1024 x 1024, batch 1 (`python -m benchmarks roofline --gpu h200`).",
        "",
        f"| predicted floor | {' | '.join(titles)} |",
        f"|---|{'--:|' * len(titles)}",
    ]
    for variant in ("b0", "b2"):
        for mode, what in MODES.items():
            cells = [milliseconds(1e6 * _floor(variant, mode, name)) for name in PREDICTED]
            lines.append(f"| EQUISeg-{variant.upper()}, {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _floor(variant: str, mode: str, name: str) -> float:
    shape = Shape(variant, 0, 1024, 1024, batch=1, modalities=4)
    works = roofline.model_works(shape, "bf16", mode)
    return gpus.by_name(name).limits.floor(works, "bf16")


REGIONS: dict[str, Callable[[Sequence[Folder]], str]] = {
    "headline": headline,
    "quick": quick,
    "miniature": failures,
    "cpu": cpu,
    "gpu": gpu,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks readme`."""
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if stale")


def main(args: argparse.Namespace, console: Console) -> int:
    """Exit status 1 under --check if a page is not what the results say."""
    pages = {path: path.read_text() for path in PAGES}
    fresh = rewritten(pages, folders(ROOT))
    names = stale(pages, fresh)
    for name in names:
        console.print(f"{'stale' if args.check else 'written'}: {name}")
    if not names:
        console.print("README.md and docs/ are what the results say")
    elif not args.check:
        for path, text in fresh.items():
            path.write_text(text)
    return 1 if names and args.check else 0


def stale(pages: Mapping[Path, str], fresh: Mapping[Path, str]) -> list[str]:
    """The regions in which two versions of the pages differ."""
    texts = ("".join(versions.values()) for versions in (pages, fresh))
    pairs = zip(*map(REGION.finditer, texts), strict=True)
    return [before[2] for before, after in pairs if before[3] != after[3]]

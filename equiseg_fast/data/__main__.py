"""`python -m equiseg_fast.data`: look at data, as it is or under a degradation."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from equiseg_fast._command import parser_of, run_command
from equiseg_fast.ops._checks import check_choice

from . import DataConfig, Degraded, SensorDataset
from .degradations import degradations_for
from .folder import SPLITS
from .pictures import panels, sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: see `run_command`."""
    parser = parser_of("data", "Write a PNG of what sensors saw, one row per scene.")
    parser.add_argument("data", help='"synthetic", or a YAML file of data or of a training')
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--split", default="val", choices=SPLITS, help="default val")
    parser.add_argument("--count", type=int, default=6, help="scenes, evenly spaced; default 6")
    parser.add_argument("--degradation", help="such as night; a wrong name lists all")
    parser.add_argument(
        "--severity",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 1.0],
        help="of the degradation, 0 to 1, one row for each; default 0 0.25 0.5 1",
    )
    return run_command(parser, draw, arguments)


def draw(args: argparse.Namespace) -> None:
    """What the command does."""
    config = DataConfig() if args.data == "synthetic" else DataConfig.load(args.data)
    dataset = config.open(args.split)
    if args.count < 1:
        raise ValueError(f"count must be at least 1; got {args.count}")
    count = min(args.count, len(dataset))
    indices = [k * len(dataset) // count for k in range(count)]
    looks: list[tuple[str, SensorDataset]] = [("", dataset)]
    if args.degradation is not None:
        check_choice("degradation", args.degradation, degradations_for(dataset.sensors))
        looks = [
            (f"\n{args.degradation} {s:g}", Degraded(dataset, args.degradation, s))
            for s in args.severity
        ]
    samples = [(look.raw(i), suffix) for i in indices for suffix, look in looks]
    rows = [(sample.name + suffix, panels(dataset, sample)) for sample, suffix in samples]
    sheet(rows, args.out, classes=dataset.classes, palette=dataset.palette)
    print(f"{args.out}: {count} of {len(dataset)} scenes of split {args.split}")


if __name__ == "__main__":
    raise SystemExit(main())

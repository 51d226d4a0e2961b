"""`python -m equiseg_fast.evaluate MODEL DATA`: how well a model does, and when sensors fail."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equiseg_fast._version import __version__
from equiseg_fast.ops._checks import check_choice, check_seed, check_sizes

from ._command import PRECISIONS, Failed, choose_device, parser_of, progress_bar, run_command
from .data import DataConfig, SensorDataset, collate
from .data.samples import Cached
from .env import package_versions
from .evaluation.record import Record, digest_of_file, digest_of_samples
from .models import EQUISeg, EQUISegConfig
from .models.pretrained import WEIGHTS
from .robustness import (
    PROTOCOLS,
    Condition,
    Conditioned,
    conditions,
    evaluate_dataset,
)

RECORD, SHEET = "evaluation.json", "sheet.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = parser_of(
        "evaluate",
        "Evaluate a model, also with sensors that fail.",
        "%(prog)s MODEL DATA [options]",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that save_pretrained, or training, wrote")
    add(
        "data",
        metavar="DATA",
        help='folder with the folder val, YAML with a section "data", or "synthetic"',
    )
    add("--split", default="val", metavar="NAME", help="train, val (default) or test")
    add(
        "--protocols",
        default=",".join(PROTOCOLS),
        metavar="LIST",
        help=f"of {','.join(PROTOCOLS)} (default: all)",
    )
    add("--limit", type=int, metavar="N", help="at most N samples, spread over the split")
    add("--batch-size", type=int, default=1, metavar="N", help="default: 1, for any sizes")
    add("--device", metavar="NAME", help="default: a GPU if there is one, or cpu")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    add("--seed", type=int, default=0, metavar="N", help="of noise and failures (default: 0)")
    add("--out", default="evaluation", metavar="FOLDER", help="default: evaluation")
    add("--sheet", type=int, default=3, metavar="N", help="samples in sheet.png (default: 3)")
    add("--dry-run", action="store_true", help="say what would be done, and how long it takes")
    parser.epilog = (
        f"Writes {RECORD} and {SHEET}. Conditions that are finished are kept: the same command "
        "goes on where it was stopped, and more protocols can be added later."
    )
    return run_command(parser, _work, arguments)


def _work(args: argparse.Namespace) -> None:
    from rich.console import Console

    protocols = [name.strip() for name in args.protocols.split(",")]
    for protocol in protocols:
        check_choice("protocols", protocol, PROTOCOLS)
    check_sizes(**{"batch-size": args.batch_size})
    if args.limit is not None:
        check_sizes(limit=args.limit)
    if args.sheet < 0:
        raise ValueError(f"sheet must be at least 0; got {args.sheet}")
    check_seed(args.seed)
    device = choose_device(args.device)

    model = EQUISeg.from_pretrained(args.model, device=device)
    config = model.config
    data = read_data(args.data, config)
    dataset = data.open(args.split)
    dataset = Conditioned(dataset, limit=args.limit)
    agree(dataset, config)

    todo = conditions(dataset.sensors, protocols)
    out = Path(args.out)
    record = Record(
        out / RECORD,
        {
            "weights": digest_of_file(Path(args.model) / WEIGHTS),
            "config": config.to_dict(),
            "data": {**data.to_dict(), "split": args.split, "limit": args.limit},
            "samples": digest_of_samples(dataset),
            "seed": args.seed,
            "precision": args.precision,
            "device": device.type,
            "version": __version__,
        },
    )
    left = [condition for condition in todo if condition not in record.results]
    from .evaluation.tables import show_plan, show_tables

    console = Console()
    if args.dry_run:
        seconds = _seconds_per_image(model, dataset, device, PRECISIONS[args.precision])
        show_plan(console, config, dataset, todo, left, seconds, device)
        return
    out.mkdir(parents=True, exist_ok=True)
    record.facts = {
        "model": str(Path(args.model).resolve()),
        "versions": package_versions(),
        "device": _name_of(device),
        "sensors": [sensor.name for sensor in dataset.sensors],
        "classes": list(dataset.classes),
        "images": len(dataset),
    }
    _run(model, dataset, left, record, args, device)
    record.write()
    if args.sheet:
        from .evaluation.sheet import draw_sheet

        draw_sheet(
            out / SHEET,
            model,
            Conditioned(dataset, limit=args.sheet),
            device=device,
            dtype=PRECISIONS[args.precision],
            seed=args.seed,
        )
    show_tables(console, config, dataset, record.results)
    files = f"{out / RECORD}" + (f" and {out / SHEET}" if args.sheet else "")
    console.print(f"{len(left)} conditions run, {len(todo) - len(left)} kept; see {files}")
    broken = {c: r["not_finite"] for c, r in record.results.items() if r["not_finite"]}
    if broken:
        first = next(iter(broken))
        raise Failed(
            f"logits of {broken[first]} images were not finite under {first}, and so in "
            f"{len(broken)} conditions; their scores mean nothing"
        )


def read_data(data: str, config: EQUISegConfig) -> DataConfig:
    """The data that DATA on the command line means, with the sensors as the model knows them.

    data: "synthetic", a folder for `FolderDataset` in its splits, or a YAML file of a `DataConfig`,
    alone or as its section "data". Raises ValueError where data and model disagree on modalities or
    in_channels.
    """
    path = Path(data).expanduser()
    if data == "synthetic":
        found = DataConfig()
    elif path.is_dir():
        names = config.class_names or tuple(f"class {k}" for k in range(config.num_classes))
        found = DataConfig(
            "folder",
            root=str(path),
            sensors=config.sensors or config.modalities,  # type: ignore[arg-type]
            classes=names,
            palette=config.palette,
            ignore_index=config.ignore_index,
        )
    elif path.suffix in (".yaml", ".yml"):
        found = DataConfig.load(path)
    else:
        raise ValueError(
            f'data must be a folder, a YAML file (.yaml, .yml) or "synthetic"; got {data}, which '
            f"{'is a file' if path.exists() else 'is not there'}"
        )
    assert found.sensors is not None  # every kind of data has some
    given = {sensor.name: sensor for sensor in found.sensors}
    if lacking := [name for name in config.modalities if name not in given]:
        raise ValueError(
            f"modalities of the model are {', '.join(config.modalities)}; the data has "
            f"{', '.join(given)} and lacks {', '.join(lacking)}"
        )
    assert isinstance(config.in_channels, tuple)
    for name, channels in zip(config.modalities, config.in_channels, strict=True):
        if given[name].channels != channels:
            raise ValueError(
                f"in_channels of the model is {channels} for {name}; the data has "
                f"{given[name].channels}"
            )
    # The model was trained with a normalisation and an order, and the data may state others.
    return replace(found, sensors=config.sensors or tuple(given[n] for n in config.modalities))


def agree(dataset: SensorDataset, config: EQUISegConfig) -> None:
    """Raises ValueError where dataset and model disagree on classes, or there is no sample."""
    theirs, ours = dataset.classes, config.class_names
    if ours is not None and tuple(theirs) != ours:
        raise ValueError(
            f"class_names of the model are {', '.join(ours)}; the data has {', '.join(theirs)}"
        )
    if len(theirs) != config.num_classes:
        raise ValueError(
            f"num_classes of the model is {config.num_classes}; the data has {len(theirs)} classes"
        )
    if not len(dataset):
        raise ValueError("data must have at least one sample; it has none")


def _run(
    model: EQUISeg,
    dataset: Conditioned,
    left: Sequence[Condition],
    record: Record,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Run the conditions that are left, with a bar over their images."""
    from rich.console import Console

    # Where batches go to a GPU, reading them would be what it waits for.
    workers = min(8, (os.cpu_count() or 1) - 1) if device.type != "cpu" else 0
    images: SensorDataset = dataset
    if not workers:  # worker processes end with their condition
        images = Cached(dataset)
    with progress_bar(Console(stderr=True), transient=True) as bar:
        whole = bar.add_task("all", total=len(left) * len(dataset))
        for i, condition in enumerate(left):
            one = bar.add_task(str(condition), total=len(dataset))
            bar.update(whole, description=f"condition {i + 1} of {len(left)}, images")

            def done(count: int, one: Any = one) -> None:
                bar.advance(one, count)
                bar.advance(whole, count)

            start = time.perf_counter()
            result = evaluate_dataset(
                model,
                images,
                condition=condition,
                seed=args.seed,
                batch_size=args.batch_size,
                workers=workers,
                device=device,
                dtype=PRECISIONS[args.precision],
                progress=done,
            )
            result["seconds"] = round(time.perf_counter() - start, 3)
            record.add(condition, result)
            bar.remove_task(one)
            if not bar.console.is_terminal:  # where no bar is seen, as in a log
                bar.console.print(f"{i + 1}/{len(left)} {condition}: mIoU {result['miou']:.4f}")


def _seconds_per_image(
    model: EQUISeg, dataset: Conditioned, device: torch.device, dtype: torch.dtype | None
) -> float:
    """What the model needs for the first sample, the second time."""
    batch = collate([dataset[0]]).to(device)
    seconds = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for _ in range(2):
            start = time.perf_counter()
            model(batch.images, present=batch.mask).argmax(dim=1).cpu()
            seconds = time.perf_counter() - start
    return seconds


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m equiseg_fast.predict`: label maps for folders of sensor images."""

import argparse
import hashlib
import json
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from equiseg_fast._command import (
    PRECISIONS,
    Failed,
    choose_device,
    parser_of,
    progress_bar,
    run_command,
)
from equiseg_fast._files import replace_file
from equiseg_fast.data import Sample, SensorDataset, collate, palette_of
from equiseg_fast.ops._checks import check_sizes
from equiseg_fast.sliding import bands, check_window

if TYPE_CHECKING:
    from PIL.Image import Image

    from equiseg_fast.data import FolderDataset
    from equiseg_fast.models import EQUISeg

WRITERS = 2
"""Threads that encode and write files, while the next images are computed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if an image could not be read, 2 for bad usage (see `run_command`)."""
    parser = parser_of(
        "predict",
        "Label maps for folders of sensor images: PNGs of class numbers in OUT/labels, the same "
        "in colours in OUT/colour, at the size of the images. The same command goes on where it "
        "was stopped.",
        "%(prog)s MODEL INPUT OUT [options]",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that save_pretrained, or training, wrote")
    add("input", metavar="INPUT", help="folder with a sub-folder per sensor; files may be missing")
    add("out", metavar="OUT", help="folder for the results")
    text = "average over windows of this size; default: whole images"
    add("--window", nargs=2, type=int, metavar=("H", "W"), help=text)
    text = "overlap of windows, in [0, 1); default: %(default)s"
    add("--overlap", type=float, default=0.5, metavar="PART", help=text)
    text = "images of one size, or windows, at a time; default: 1"
    add("--batch-size", type=int, default=1, metavar="N", help=text)
    text = "fp32 (default), or autocast to bf16 or fp16"
    add("--precision", choices=tuple(PRECISIONS), default="fp32", metavar="TYPE", help=text)
    add("--device", help="cpu, cuda, cuda:1, ..; default: a GPU if there is one")
    workers = min(4, torch.get_num_threads())
    text = "processes that read files; default: 4, or fewer on few cores"
    add("--workers", type=int, default=workers, metavar="N", help=text)
    text = "delete what an earlier run left in OUT"
    add("--overwrite", action="store_true", help=text)
    add("--dry-run", action="store_true", help="say what would be done, write nothing")
    return run_command(parser, _work, arguments)


def _work(args: argparse.Namespace) -> None:
    check_sizes(batch_size=args.batch_size)
    if args.workers < 0:
        raise ValueError(f"workers must be at least 0; got {args.workers}")
    window = check_window(args.window, args.overlap) if args.window else None
    device = choose_device(args.device)
    from equiseg_fast.models import EQUISeg

    model = EQUISeg.from_pretrained(args.model, device=device).fold_()
    dataset = _open(args.input, model)
    settings = {
        "model": _fingerprint(args.model, model),
        "input": str(Path(args.input).resolve()),
        "window": window and list(window),
        "overlap": window and args.overlap,
        "precision": args.precision,
        "classes": list(dataset.classes),
    }
    palette = palette_of(len(dataset.classes), dataset.palette)
    outputs = Outputs(Path(args.out), settings, palette, anew=args.overwrite)
    names = [scene.name for scene in dataset.scenes]
    todo = [i for i, name in enumerate(names) if not outputs.has(name)]
    print(f"{args.model}: {model.config.variant}, {len(dataset.classes)} classes, on {device}")
    print(f"{args.input}: {_contents(dataset)}")
    print(f"{args.out}: {len(names) - len(todo)} of {len(names)} images done, {len(todo)} to do")
    if args.dry_run or not todo:
        return
    outputs.begin()
    passes = Passes(model, window, args.overlap, args.batch_size, PRECISIONS[args.precision])
    unread = _predict(dataset, todo, passes, outputs, args.workers)
    if unread:
        reasons = "".join(f"\n  {x.reason}" for x in unread)
        raise Failed(f"{len(unread)} of {len(todo)} images cannot be read:{reasons}")


def _open(root: str, model: "EQUISeg") -> "FolderDataset":
    """The images for a model, any of whose sensors may be missing."""
    from equiseg_fast.data import FolderDataset

    config = model.config
    classes = config.class_names or [str(i) for i in range(config.num_classes)]
    sensors = config.sensors or config.modalities
    with warnings.catch_warnings():  # we say ourselves what is missing
        warnings.simplefilter("ignore")
        return FolderDataset(
            root,
            sensors,
            classes=classes,
            labels=None,
            palette=config.palette,
            missing="absent",
        )


def _contents(dataset: "FolderDataset") -> str:
    total = len(dataset)
    lacks = Counter(
        x.name for x in dataset.sensors for s in dataset.scenes if x.name not in s.files
    )
    return f"{total} images of {', '.join(x.name for x in dataset.sensors)}{_missing(lacks, total)}"


def _missing(lacks: Mapping[str, int], total: int) -> str:
    counts = [f"{name} is missing in {count}" for name, count in lacks.items()]
    return f"; of {total}, {', '.join(counts)}" if counts else ""


def _fingerprint(folder: str, model: "EQUISeg") -> str:
    """Tells models apart, by their configuration and weights."""
    from equiseg_fast.models.pretrained import WEIGHTS

    digest = hashlib.sha256(json.dumps(model.config.to_dict()).encode())
    digest.update(Path(folder, WEIGHTS).read_bytes())
    return digest.hexdigest()[:16]


class Outputs:
    """The folder OUT, which holds the results of one model with one choice of settings.

    palette: uint8 `[K, 3]`, the colours of the classes. Raises ValueError for a folder of anything
    else. A file is there whole or not at all.
    """

    RECORD = "predict.json"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], palette: np.ndarray, *, anew: bool
    ) -> None:
        self.folder, self.settings, self.palette, self.anew = folder, settings, palette, anew
        record = folder / self.RECORD
        if record.exists():
            if not anew:
                self._check_same(record)
        elif folder.exists() and any(not x.name.startswith(".") for x in folder.iterdir()):
            raise ValueError(
                f"{folder}: must be new, empty, or of an earlier run; it holds other files"
            )

    def _check_same(self, record: Path) -> None:
        try:
            theirs = json.loads(record.read_text(encoding="utf-8"))
            names = [name for name in self.settings if theirs.get(name) != self.settings[name]]
        except (ValueError, AttributeError):
            raise ValueError(f"{record}: is damaged; --overwrite starts anew") from None
        if names:
            pairs = [f"{n} {theirs.get(n)!r}, now {self.settings[n]!r}" for n in names]
            raise ValueError(
                f"{self.folder}: holds results of {'; of '.join(pairs)}. Choose another folder, or "
                "--overwrite to delete them"
            )

    def has(self, name: str) -> bool:
        """Whether an image is done."""
        return not self.anew and all(path.exists() for path in self._paths(name))

    def begin(self) -> None:
        """Make the folder ready for results."""
        if self.anew:
            for place in ("labels", "colour"):
                if (self.folder / place).exists():
                    shutil.rmtree(self.folder / place)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2) + "\n"
        replace_file(self.folder / self.RECORD, lambda file: file.write(text.encode()))

    def save(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Write labels uint8 `[H, W]`; returns the number of pixels of every class."""
        from PIL import Image

        image = Image.fromarray(labels)
        numbers, coloured = self._paths(name)
        _write(numbers, image)
        image.putpalette(self.palette.tobytes())  # the same numbers, shown in colours
        _write(coloured, image)
        return np.bincount(labels.ravel(), minlength=len(self.palette))

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / "labels" / f"{name}.png", self.folder / "colour" / f"{name}.png"


def _write(path: Path, image: "Image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: image.save(file, "PNG"))


@dataclass(frozen=True)
class Passes:
    """How labels are computed: a model, and what goes through it at a time."""

    model: "EQUISeg"
    window: tuple[int, int] | None
    overlap: float
    batch_size: int
    dtype: torch.dtype | None

    def groups(self, samples: Iterable["Sample | Unread"]) -> Iterator["list[Sample] | Unread"]:
        """Neighbours of one size that lack the same sensors."""
        size = 1 if self.window else self.batch_size
        group: list[Sample] = []
        for sample in samples:
            if isinstance(sample, Unread):
                yield sample
                continue
            if group and (len(group) == size or _form(sample) != _form(group[0])):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group

    @torch.inference_mode()
    def labels(self, group: Sequence[Sample]) -> np.ndarray:
        """Classes uint8 `[B, H, W]`. Raises `Failed` where memory of the device runs out."""
        try:
            return self._labels(group)
        except torch.OutOfMemoryError as error:
            raise Failed(
                f"out of memory at {group[0].name}: choose a smaller --window or --batch-size "
                f"({str(error).splitlines()[0]})"
            ) from None

    def _labels(self, group: Sequence[Sample]) -> np.ndarray:
        weight = next(self.model.parameters())
        batch = collate(group)
        images = {name: x.to(weight.device, weight.dtype) for name, x in batch.images.items()}
        there = batch.present[:, 0].tolist()
        names = [name for name, here in zip(images, there, strict=True) if here]
        present = None if all(there) else names
        with torch.autocast(weight.device.type, self.dtype, enabled=self.dtype is not None):
            if self.window is None:
                labels = self.model(images, present=present).argmax(dim=1)
            else:
                parts = bands(
                    self.model, images, self.window, self.overlap, present, self.batch_size
                )
                labels = torch.cat([part.argmax(dim=1) for part in parts], dim=1)
        return labels.to(torch.uint8).cpu().numpy()


def _form(sample: Sample) -> tuple[Any, ...]:
    return (*sample.present.tolist(), *next(iter(sample.images.values())).shape[-2:])


@dataclass(frozen=True)
class Unread:
    """An image that could not be read, and why."""

    reason: str


class _Readable(Dataset["Sample | Unread"]):
    """A dataset without errors of files: they are samples, too, and others go on."""

    def __init__(self, dataset: SensorDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | Unread:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return Unread(str(error))


def _predict(
    dataset: SensorDataset,
    todo: Sequence[int],
    passes: Passes,
    outputs: Outputs,
    workers: int,
) -> list[Unread]:
    """Predict and write some images of a dataset, and print a summary. Returns the unread ones."""
    from rich.console import Console

    start = time.monotonic()
    done, pixels = 0, np.zeros(len(dataset.classes), np.int64)
    lacks: Counter[str] = Counter()
    unread: list[Unread] = []
    loader = DataLoader(
        _Readable(dataset),
        sampler=todo,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
    )
    console = Console(stderr=True)
    with progress_bar(console) as bar, ThreadPoolExecutor(WRITERS) as pool:
        task = bar.add_task("", total=len(todo))
        writing: deque[Future[np.ndarray]] = deque()

        def finish(most: int) -> None:
            """Wait until at most so many images are still to be written."""
            nonlocal done
            while len(writing) > most:
                np.add(pixels, writing.popleft().result(), out=pixels)
                done += 1
                speed = done / (time.monotonic() - start)
                bar.update(task, advance=1, description=f"{speed:.1f} images/s")

        for group in passes.groups(loader):
            if isinstance(group, Unread):
                unread.append(group)
                console.print(
                    f"left out: {group.reason}", markup=False, highlight=False, soft_wrap=True
                )
                bar.advance(task)
                continue
            for sample, labels in zip(group, passes.labels(group), strict=True):
                present = sample.present.tolist()
                lacks.update(
                    x.name for x, here in zip(dataset.sensors, present, strict=True) if not here
                )
                writing.append(pool.submit(outputs.save, sample.name, labels))
            finish(2 * WRITERS)
        finish(0)
    if done:
        seconds = time.monotonic() - start
        speed = f"{done / seconds:.1f} images/s"
        print(
            f"{done} images in {seconds:.1f} s ({speed}){_missing(lacks, done)}. Of their pixels:"
        )
        for i in filter(pixels.__getitem__, pixels.argsort()[::-1]):
            print(f"  {pixels[i] / pixels.sum():8.3%}  {dataset.classes[i]}")
        print(f"{outputs.folder}: class numbers in labels/, the same in colours in colour/")
    return unread


def _as_it_is(sample: Any) -> Any:
    """Instead of what a DataLoader makes of samples."""
    return sample


if __name__ == "__main__":
    raise SystemExit(main())

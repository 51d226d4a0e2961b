"""Datasets in folders: files of sensors and labels that belong to one scene have one name."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from equiseg_fast.ops._checks import check_choice, check_ignore_index, check_sequence, check_strings

from .files import SUFFIXES, check_labels, read_labels, read_sensor
from .samples import Sample, SensorDataset
from .sensors import Sensor, as_sensors, check_palette, check_sensors

Missing = Literal["error", "absent"]
Files = dict[str, Path]
"""Name of a scene -> a file."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Scene:
    """The files of one scene: name of a sensor -> its file, and labels where there are any."""

    name: str
    files: dict[str, Path]
    labels: Path | None


class SceneFiles(SensorDataset):
    """What datasets on disk share: scenes whose sensors and labels lie in one file each.

    Names are looked at at once, pixels when a scene is read. Subclasses say how files are read.
    """

    nearest: tuple[str, ...] = ()
    """Sensors whose images are brought to the size of the others, without interpolation."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        sensors: Sequence[Sensor],
        classes: Sequence[str],
        ignore_index: int = 255,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.scenes = tuple(scenes)
        self.sensors = check_sensors(sensors)
        self.classes = check_classes(classes)
        check_ignore_index(ignore_index)
        self.ignore_index = int(ignore_index)
        self.palette = check_palette(palette, len(self.classes))

    def __len__(self) -> int:
        return len(self.scenes)

    def raw(self, index: int) -> Sample:
        """Scene `index` in the units of the files.

        Raises ValueError naming the file that is broken, has another size or unknown labels.
        """
        scene = self.scenes[index]
        found: dict[str, Tensor] = {}
        for sensor in self.sensors:
            if path := scene.files.get(sensor.name):
                found[sensor.name] = self.read_sensor(path, sensor)
        labels = None
        if scene.labels is not None:
            labels = self.read_labels(scene.labels)
            check_labels(labels, len(self.classes), self.ignore_index, scene.labels)
        size = self._fit(scene, found, labels)
        images = {
            sensor.name: found[sensor.name]
            if sensor.name in found
            else torch.zeros(sensor.channels, *size)
            for sensor in self.sensors
        }
        present = torch.tensor([sensor.name in found for sensor in self.sensors])
        return Sample(scene.name, images, present, labels)

    def read_sensor(self, path: Path, sensor: Sensor) -> Tensor:
        """The values in a file of a sensor, fp32 `[C, H, W]`."""
        values = read_sensor(path, sensor.channels)
        if sensor.scale == 1 / 255 and (largest := float(values.max())) > 255:
            raise ValueError(
                f"{path}: must hold values of 8 bits, 0 to 255, as sensor {sensor.name!r} has the "
                f"scale 1/255; got {largest:g}: declare its scale, mean and std"
            )
        return values

    def read_labels(self, path: Path) -> Tensor:
        """The classes in a file of labels, int64 `[H, W]`."""
        return read_labels(path)

    def _fit(self, scene: Scene, images: dict[str, Tensor], labels: Tensor | None) -> torch.Size:
        """Bring `nearest` sensors to the size of the others, which must be one, and return it."""
        sizes = {
            scene.files[name]: x.shape[1:] for name, x in images.items() if name not in self.nearest
        }
        if scene.labels is not None and labels is not None:
            sizes[scene.labels] = labels.shape
        if not sizes:
            sizes = {scene.files[name]: x.shape[1:] for name, x in images.items()}
        first, size = next(iter(sizes.items()))
        for path, other in sizes.items():
            if other != size:
                raise ValueError(
                    f"{path}: must have the height and width of {first}, {list(size)}; got "
                    f"{list(other)}"
                )
        for name in self.nearest:
            if name in images and images[name].shape[1:] != size:
                images[name] = torch.nn.functional.interpolate(images[name][None], list(size))[0]
        return size


class FolderDataset(SceneFiles):
    """Scenes in one folder per sensor and one of labels, joined by the names of their files.

        root/rgb/a/0001.png  root/thermal/a/0001.npy  root/labels/a/0001.png

    are the scene "a/0001". Names are compared without suffix, below their folders, which are named
    like the sensors. Hidden files, and those that are no PNG, JPEG, NPY or NPZ, count for nothing.
    See `data.files` for what files may hold.

    modalities: sensors in the order that models see, or names of usual ones (`sensor`).
    classes: names of the classes, whose numbers labels are. labels: folder of the labels, None for
    scenes without. ignore_index: label of pixels that count for nothing. missing: what a scene is
    that lacks the file of a sensor, an "error" or a scene where that sensor is "absent"; then
    the folder may be missing too, which warns.
    palette: colours of the classes, 0 to 255.

    Raises ValueError naming the folder or file: a folder that is not there or holds nothing, two
    files of one name, scenes without labels or labels without a scene; TypeError or ValueError
    naming the argument.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        modalities: Sequence[Sensor | str],
        *,
        classes: Sequence[str],
        labels: str | None = "labels",
        ignore_index: int = 255,
        missing: Missing = "error",
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        sensors = as_sensors(modalities)
        if labels is not None:
            check_strings(labels=labels)
        names = [sensor.name for sensor in sensors]
        if labels in names:
            raise ValueError(f"labels must be a folder of its own; got that of sensor {labels!r}")
        check_choice("missing", missing, ("error", "absent"))
        files: dict[str, Files] = {name: {} for name in names}
        there = [name for name in names if missing == "error" or (Path(root) / name).is_dir()]
        for name in there or names:
            files[name] = files_in(folder_in(root, name))
        if absent := [name for name in names if name not in there]:
            warnings.warn(f"{root} has no folder for {', '.join(absent)}: absent", stacklevel=2)
        truth = None if labels is None else files_in(folder_in(root, labels))
        scenes = join(files, truth, missing)
        super().__init__(scenes, sensors, classes, ignore_index, palette)


def folder_in(root: str | os.PathLike[str], name: str) -> Path:
    """The folder root/name. Raises ValueError listing those that are there if it is not."""
    if not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root must be a path; got {root!r}")
    folder = Path(root) / name
    if not folder.is_dir():
        if not Path(root).is_dir():
            raise ValueError(f"{root}: must be a folder of data; there is none")
        there = sorted(x.name for x in Path(root).iterdir() if x.is_dir() and x.name[0] != ".")
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        names = ", ".join(there[:12]) or "none"
        raise ValueError(f"{folder}: must be a folder; {root} has {names}{more}")
    return folder


def files_in(folder: Path) -> Files:
    """The files below a folder that can be read, by their path in it without suffix.

    Raises ValueError if there is none, or two differ in their suffix only.
    """
    found: Files = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        # sorted: errors are the same everywhere
        folders[:] = sorted(x for x in folders if x[0] != "." and not _leads_up(place, x))
        for name in sorted(files):
            path = Path(place, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise ValueError(f"{path}: is the same scene as {found[stem]}; keep one of them")
            found[stem] = path
    if not found:
        raise ValueError(f"{folder}: must hold files {', '.join(SUFFIXES)}; there is none")
    return found


def _leads_up(place: str, name: str) -> bool:
    """Whether a folder is a link to one above it, which would never end."""
    path = Path(place, name)
    return path.is_symlink() and path.resolve() in {x.resolve() for x in path.parents}


def join(files: Mapping[str, Files], labels: Files | None, missing: Missing) -> list[Scene]:
    """The scenes that files of sensors, and labels if there are any, make together, by name.

    Raises ValueError naming the first that is not whole, and how many there are.
    """
    check_choice("missing", missing, ("error", "absent"))
    example: Files = {}  # of the files of a scene the first
    for found in files.values():
        for stem, path in found.items():
            example.setdefault(stem, path)
    stems = sorted(example)
    if missing == "error":
        for name, found in files.items():
            lacking = [stem for stem in stems if stem not in found]
            hint = "; missing: absent (or missing='absent') takes scenes without it"
            _refuse(lacking, example, f"sensor {name!r} has no", hint)
    if labels is not None:
        _refuse(
            [stem for stem in stems if stem not in labels], example, "the folder of labels has no"
        )
        _refuse([stem for stem in sorted(labels) if stem not in example], labels, "no sensor has")
    return [
        Scene(
            stem,
            {name: found[stem] for name, found in files.items() if stem in found},
            None if labels is None else labels[stem],
        )
        for stem in stems
    ]


def check_cases(cases: Sequence[str] | None, *groups: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The cases chosen of each group of names; none of a group is all of it."""
    if cases is not None:
        check_sequence("cases", cases, str, "names")
        for case in cases:
            check_choice("cases", case, [name for group in groups for name in group])
    return tuple(tuple(name for name in group if name in (cases or ())) for group in groups)


def choose(
    root: str | os.PathLike[str],
    folder: str,
    ending: str,
    split: str,
    at: int,
    cases: Sequence[Sequence[str]],
) -> Files:
    """The files root/folder/a/b/c<ending>.* of a split and of cases, by "a/b/c".

    The split is one more folder at place `at` of the path, 0 or 1. cases: names that a may be, and
    names of which b has one among its words, joined by `_`; none is any. Names are compared whole:
    "rain" is not in "train". Raises ValueError if there is none.
    """
    found: Files = {}
    for stem, path in files_in(folder_in(root, folder)).items():
        parts = stem.split("/")
        if len(parts) != 4 or parts.pop(at) != split or not stem.endswith(ending):
            continue
        marks = {parts[0]}, set(parts[1].split("_"))
        if all(not some or mark & set(some) for mark, some in zip(marks, cases, strict=True)):
            found["/".join(parts).removesuffix(ending)] = path
    if not found:
        chosen = " of the cases chosen" if any(cases) else ""
        raise ValueError(f"{Path(root) / folder}: has no *{ending}.* of split {split!r}{chosen}")
    return found


def _refuse(lacking: Sequence[str], files: Files, who: str, hint: str = "") -> None:
    if lacking:
        more = f", nor for {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise ValueError(f"{files[lacking[0]]}: {who} {lacking[0]}.* for it{more}{hint}")


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes as a tuple: 1 to 256, unique, not empty."""
    check_sequence("classes", classes, str, "names")
    if not 1 <= len(classes) <= 256 or len(set(classes)) != len(classes) or "" in classes:
        raise ValueError(f"classes must be 1 to 256 unique names, none empty; got {list(classes)}")
    return tuple(classes)

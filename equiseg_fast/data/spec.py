"""Which data, as one section of a configuration file."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from equiseg_fast._files import as_json, read_yaml
from equiseg_fast.ops._checks import (
    check_choice,
    check_ignore_index,
    check_seed,
    check_sequence,
    check_sizes,
    check_strings,
)

from . import deliver, muses, synthetic
from .folder import (
    SPLITS,
    FolderDataset,
    Missing,
    check_cases,
    check_classes,
    folder_in,
)
from .samples import SensorDataset
from .sensors import Palette, Sensor, as_sensors, check_palette, is_usual, named, sensor

_NEEDED: Any = object()
_FIELDS: dict[str, dict[str, Any]] = {
    "folder": {
        "root": _NEEDED,
        "sensors": _NEEDED,
        "classes": _NEEDED,
        "labels": "labels",
        "ignore_index": 255,
        "palette": None,
        "missing": "error",
    },
    "deliver": {"root": _NEEDED, "sensors": deliver.SENSORS, "cases": None, "missing": "error"},
    "muses": {"root": _NEEDED, "sensors": muses.SENSORS, "cases": None, "missing": "error"},
    "synthetic": {
        "sensors": synthetic.SENSORS,
        "size": (96, 128),
        "length": 1000,
        "held_out": 200,
        "seed": 0,
    },
}
"""The fields of every kind of data, and what they are where nothing is said."""


@dataclass(frozen=True)
class DataConfig:
    """Which data. A field that is no field of the kind stays None.

    kind: "folder" (`FolderDataset`), "deliver" (`DeLiVER`), "muses" (`MUSES`) or "synthetic"
        (`SyntheticScenes`).
    root: folder of the data; for kind folder it holds the folders train, val and test.
    sensors: in the order that the model sees; each the name of a usual one (of one of the dataset,
        for the other kinds), or a mapping of the fields of `Sensor`, where a usual name fills in
        what is left out. All sensors of the dataset if left out.
    classes: folder: names of the classes, whose numbers labels are.
    labels: folder: name of the folder of labels; "labels" if left out.
    ignore_index: folder: label of pixels that count for nothing; 255 if left out.
    palette: folder: colours of the classes, [red, green, blue] of 0 to 255.
    missing: what a scene without the file of a sensor is: "error" or "absent"; not for synthetic.
    cases: deliver, muses: weathers, times and failing sensors to choose; all if left out.
    size: synthetic: height and width of the scenes; [96, 128] if left out.
    length: synthetic: number of scenes of split train; 1000 if left out.
    held_out: synthetic: number of scenes of each of the splits val and test; 200 if left out.
    seed: synthetic: of the scenes, 0 if left out. Splits have seeds of their own, 3 * seed for
        train, 3 * seed + 1 for val and 3 * seed + 2 for test: no two seeds share a scene.

    Raises TypeError or ValueError naming the field on a value that it cannot have. Sequences may
    be lists, and are tuples afterwards; sensors are `Sensor`.
    """

    kind: Literal["folder", "deliver", "muses", "synthetic"] = "synthetic"
    root: str | None = None
    sensors: tuple[Sensor, ...] | None = None
    classes: tuple[str, ...] | None = None
    labels: str | None = None
    ignore_index: int | None = None
    palette: Palette | None = None
    missing: Missing | None = None
    cases: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    length: int | None = None
    held_out: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(_FIELDS))
        allowed = _FIELDS[self.kind]
        for name in (field.name for field in fields(self)[1:]):
            value = getattr(self, name)
            if value is not None and name not in allowed:
                kinds = [kind for kind, names in _FIELDS.items() if name in names]
                raise ValueError(
                    f"{name} is a field of kind {' and '.join(kinds)}, not of {self.kind!r}"
                )
            if value is None:
                value = allowed.get(name)
            if value is _NEEDED:
                raise ValueError(f"{name} must be given for kind {self.kind!r}")
            if value is not None:
                object.__setattr__(self, name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """The value of a field as it is kept."""
        if name == "root":
            check_strings(root=os.fspath(value) if isinstance(value, os.PathLike) else value)
            return str(value)
        if name == "sensors":
            return self._sensors(value)
        if name == "classes":
            return check_classes(value)
        if name == "palette":
            return check_palette(value, len(self.classes or ()))
        if name == "cases":
            module = deliver if self.kind == "deliver" else muses
            check_cases(value, *module.CASES)
            return tuple(value)
        if name == "size":
            check_sequence("size", value, int, "height and width")
            if len(value) != 2:
                raise ValueError(f"size must be height and width; got {list(value)}")
            check_sizes(**{"size[0]": value[0], "size[1]": value[1]})
            return tuple(value)
        if name == "labels":
            check_strings(labels=value)
        elif name == "ignore_index":
            check_ignore_index(value)
        elif name == "missing":
            check_choice("missing", value, ("error", "absent"))
        elif name == "seed":
            check_seed(value)
            if value < 0:
                raise ValueError(f"seed must be at least 0; got {value}")
        else:
            check_sizes(**{name: value})
        return value

    def _sensors(self, value: Any) -> tuple[Sensor, ...]:
        check_sequence("sensors", value, object, "names or mappings")
        if self.kind == "folder":
            return as_sensors([_declared(i, x, _usual) for i, x in enumerate(value)])
        known = {x.name: x for x in _FIELDS[self.kind]["sensors"]}
        given = [_declared(i, x, known.get) for i, x in enumerate(value)]
        return named("sensors", given, tuple(known.values()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataConfig":
        """The configuration in a mapping, as `to_dict` or YAML gives it."""
        if not isinstance(values, Mapping):
            raise TypeError(f"data must be a mapping of fields; got {values!r}")
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"{name} is no field of data; there are {', '.join(names)}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DataConfig":
        """The configuration in a YAML file: all that it holds, or its section "data", as of a
        training. Raises ValueError naming the file and the field."""
        content = read_yaml(path)
        try:
            return cls.from_dict(content.get("data", content))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that have a value, in types that JSON and YAML have."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["sensors"] = [asdict(x) for x in self.sensors or ()]
        return {name: as_json(value) for name, value in values.items() if value is not None}

    def open(self, split: str) -> SensorDataset:
        """The dataset of split "train", "val" or "test"."""
        check_choice("split", split, SPLITS)
        own: Any = self  # what its kind needs is not None
        if self.kind == "synthetic":
            length = own.length if split == "train" else own.held_out
            seed = 3 * own.seed + SPLITS.index(split)
            return synthetic.SyntheticScenes(own.size, length, seed, own.sensors)
        root = Path(own.root).expanduser()
        if self.kind == "folder":
            return FolderDataset(
                folder_in(root, split),
                own.sensors,
                classes=own.classes,
                labels=own.labels,
                ignore_index=own.ignore_index,
                missing=own.missing,
                palette=own.palette,
            )
        kind = deliver.DeLiVER if self.kind == "deliver" else muses.MUSES
        return kind(root, split, own.sensors, cases=own.cases, missing=own.missing)


def _usual(name: str) -> Sensor | None:
    return sensor(name) if is_usual(name) else None


def _declared(i: int, value: Any, usual: Callable[[str], Sensor | None]) -> Sensor | str:
    """Element i of `sensors`: a Sensor, a name, or a mapping of fields, whose name may be usual."""
    if not isinstance(value, Mapping):
        return value
    names = [field.name for field in fields(Sensor)]
    for name in value:
        if name not in names:
            raise ValueError(
                f"sensors[{i}] has unknown field {name!r}; there are {', '.join(names)}"
            )
    if "name" not in value:
        raise ValueError(f"sensors[{i}] must have a name; got {dict(value)}")
    try:
        base = usual(value["name"]) or Sensor(value["name"])
        return replace(base, **value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"sensors[{i}]: {error}") from None

"""Everything that can be chosen about a training, in one frozen place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from equiseg_fast._files import as_json, read_yaml, to_yaml
from equiseg_fast.data import Augment, SensorDataset
from equiseg_fast.data.spec import DataConfig
from equiseg_fast.models import EQUISegConfig
from equiseg_fast.ops._checks import check_seed, check_sizes, check_strings, number, positive, rate

from .fields import unknown, values_of

FROM_DATA = (
    "modalities",
    "num_classes",
    "ignore_index",
    "in_channels",
    "class_names",
    "palette",
    "sensors",
)
"""Fields of the model that follow from the data."""

FREE = ("out", "device", "workers", "save_every", "data.root")
"""Fields that may differ when a training goes on: they do not change what comes out."""


@dataclass(frozen=True)
class TrainConfig:
    """A training; raises TypeError or ValueError naming the field on a value that it cannot have.

    The defaults of learning rate, schedule, epochs and batch size are the recipe of the paper
    (arXiv 2509.24505).

    out: folder of the run, which goes on there if it was interrupted.
    data: where images come from. model: fields of `EQUISegConfig` that do not follow from the data.
    seed: of the initial weights, the order of the images and everything else that is random.
    epochs: passes over the training images; steps: optimiser steps instead, if given.
    batch_size: images per step, of all processes together.
    crop: height and width of training images; None is the size of the first one.
    scale, flip, jitter, blur: augmentation, see `data.Augment`.
    lr, weight_decay: of AdamW; norms, biases and layer scales have no weight decay.
    warmup: fraction of all steps in which the learning rate grows, from warmup_ratio * lr.
    power: of the polynomial by which the learning rate falls to 0 afterwards.
    clip: largest norm of the gradient, 0 for no clipping.
    ema: decay of the exponential moving average of the weights, which is then what is validated
        and kept; 0 for none.
    backbone: file of encoder weights to start from, see `load_backbone`.
    precision: "fp32", or autocast to "bf16" or "fp16" (whose loss is scaled).
    distributed: how processes started by torchrun share the work.
    sync_bn: whether batch norms take their statistics over the images of all processes.
    validate_on: split whose mIoU chooses the weights to keep, the best of all validations; "none"
        keeps those of the last step.
    validate_every: epochs between validations, 0 for a single one at the end.
    log_every, save_every: steps between lines of the log, and between checkpoints.
    workers: processes that read images; None is 4, or one for each core where those are fewer. With
        0 the training reads them itself, and keeps up to 1 GiB of each split in memory.
    device: None is the GPU if there is one.
    deterministic: whether to use deterministic algorithms only; CPUs are deterministic anyway.
    """

    out: str
    data: DataConfig
    model: EQUISegConfig = field(default_factory=EQUISegConfig)
    seed: int = 0
    epochs: int = 200
    steps: int | None = None
    batch_size: int = 8
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.2
    blur: float = 0.2
    lr: float = 6e-5
    weight_decay: float = 0.01
    warmup: float = 0.05
    warmup_ratio: float = 0.1
    power: float = 0.9
    clip: float = 0.0
    ema: float = 0.0
    backbone: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    sync_bn: bool = False
    validate_on: Literal["val", "test", "none"] = "val"
    validate_every: int = 1
    log_every: int = 20
    save_every: int = 500
    workers: int | None = None
    device: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_strings(out=self.out)
        check_seed(self.seed)
        for name in ("epochs", "batch_size", "log_every", "save_every"):
            check_sizes(**{name: getattr(self, name)})
        if self.steps is not None:
            check_sizes(steps=self.steps)
        # Its fields have the same names.
        crop = (1, 1) if self.crop is None else self.crop
        Augment(crop, self.scale, self.flip, self.jitter, self.blur)
        positive("lr", self.lr)
        ratio = number("warmup_ratio", self.warmup_ratio)
        self._require("warmup_ratio", 0.0 <= ratio <= 1.0, "in [0, 1]")
        for name in ("warmup", "ema"):
            rate(name, getattr(self, name))
        for name in ("weight_decay", "power", "clip", "validate_every"):
            self._require(name, number(name, getattr(self, name)) >= 0, "at least 0")
        self._require("workers", self.workers is None or self.workers >= 0, "at least 0")
        if self.precision == "fp16" and self.distributed == "fsdp2":
            raise ValueError(
                'precision must be "fp32" or "bf16" with distributed="fsdp2"; got "fp16"'
            )

    @property
    def loaders(self) -> int:
        """Processes that read images, for each that trains."""
        return min(4, os.cpu_count() or 1) if self.workers is None else self.workers

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "TrainConfig":
        """A configuration from nested mappings, as of YAML; values may be strings.

        Raises ValueError naming the field for what is missing, unknown or not allowed.
        """
        sections: dict[str, Any] = {}
        for name, section in (("data", DataConfig), ("model", EQUISegConfig)):
            values = given.get(name, {})
            if not isinstance(values, Mapping):
                raise ValueError(f"{name} must be a mapping of fields; got {values!r}")
            closed = FROM_DATA if name == "model" else ()
            if found := [key for key in values if key in closed]:
                raise ValueError(f"model.{found[0]} follows from the data; leave it out")
            try:
                values = values_of(section, values, f"{name}.", closed)
                sections[name] = (
                    DataConfig.from_dict(values) if name == "data" else section(**values)
                )
            except (TypeError, ValueError) as error:
                message = str(error)
                raise ValueError(
                    message if message.startswith(name) else f"{name}.{message}"
                ) from None
        flat = {key: value for key, value in given.items() if key not in sections}
        values = values_of(cls, flat)
        if "out" not in values:
            raise ValueError("out must be given: the folder of the run")
        return cls(**values, **sections)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None
    ) -> "TrainConfig":
        """The configuration of a YAML file; overrides: "lr" or "model.variant" -> text.

        Raises ValueError naming file and field, OSError if there is no such file.
        """
        given = read_yaml(path)
        for name, text in (overrides or {}).items():
            section, _, key = name.rpartition(".")
            if section not in ("", "data", "model"):
                raise ValueError(unknown(name, field_names()))
            target = given.setdefault(section, {}) if section else given
            if not section and key in ("data", "model"):
                raise ValueError(f"{key} has fields of its own: write --{key}.FIELD VALUE")
            if not isinstance(target, dict):
                raise ValueError(f"{section} must be a mapping of fields; got {target!r}")
            target[key] = text
        return cls.from_dict(given)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, from which `from_dict` makes an equal configuration."""
        values = {f.name: as_json(getattr(self, f.name)) for f in fields(self)}
        model = self.model.to_dict()
        values["data"] = self.data.to_dict()
        values["model"] = {name: x for name, x in model.items() if name not in FROM_DATA}
        return values

    def to_yaml(self) -> str:
        """The file that `load` reads."""
        return to_yaml(self.to_dict())

    def model_for(self, dataset: SensorDataset) -> EQUISegConfig:
        """The configuration of the model for the sensors and classes of a dataset."""
        return replace(
            self.model,
            modalities=tuple(sensor.name for sensor in dataset.sensors),
            in_channels=tuple(sensor.channels for sensor in dataset.sensors),
            num_classes=len(dataset.classes),
            class_names=tuple(dataset.classes),
            palette=dataset.palette,
            sensors=tuple(dataset.sensors),
            ignore_index=dataset.ignore_index,
        )


def field_names() -> list[str]:
    """All fields that a file or a command line may set, as "lr" or "model.variant"."""
    flat = [f.name for f in fields(TrainConfig) if f.name not in ("data", "model")]
    data = [f"data.{f.name}" for f in fields(DataConfig)]
    model = [f"model.{f.name}" for f in fields(EQUISegConfig) if f.name not in FROM_DATA]
    return flat + data + model


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_dict` gives, with the names of `field_names`."""
    found = {name: x for name, x in values.items() if name not in ("data", "model")}
    for section in ("data", "model"):
        found |= {f"{section}.{name}": x for name, x in values[section].items()}
    return found


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Where two configurations, as `to_dict` gives them, would not give the same training."""
    a, b = flat(ours), flat(theirs)
    names = [name for name in (a | b) if name not in FREE and a.get(name) != b.get(name)]
    return [f"{name} {b.get(name)!r} there, {a.get(name)!r} now" for name in names]

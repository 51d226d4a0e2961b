"""Everything that can be chosen about EQUISeg, in one frozen place."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal

from equiseg_fast._files import as_json
from equiseg_fast.data.sensors import Palette, Sensor, check_palette
from equiseg_fast.ops._checks import (
    MAX_SIZE,
    check_choice,
    check_flags,
    check_ignore_index,
    check_integer,
    check_sequence,
    check_sizes,
    number,
    positive,
    rate,
)

VARIANTS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "nano": ((16, 32, 80, 128), (1, 1, 1, 1)),
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
"""Mix Transformer variants: channels and number of blocks of the four stages.

"nano" is ours, half as wide and as deep as B0, for CPUs and experiments; no weights are published.
"""

VERSION = "equiseg_fast_version"
"""Under which name the version of the package stands beside the fields of a configuration."""

HEADS = (1, 2, 5, 8)
SR_RATIOS = (8, 4, 2, 1)


def check_variant(variant: str) -> str:
    """The variant in lower case. Raises ValueError if there is none of that name."""
    name = variant.lower() if isinstance(variant, str) else variant
    check_choice("variant", name, tuple(VARIANTS))
    return name


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of every block, stage by stage: linear from 0 to `last` over all blocks."""
    step = last / max(sum(depths) - 1, 1)
    rates = iter(step * i for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


@dataclass(frozen=True)
class EQUISegConfig:
    """Configuration of EQUISeg; raises TypeError or ValueError naming the field on a value that it
    cannot have. Sequences may be lists, and are tuples afterwards.

    Fields marked with a star are choices of ours where the paper (arXiv 2509.24505) is silent.

    variant: Mix Transformer of the encoder, "b0" to "b5", or "nano", half of b0.
    modalities: unique names, 1 to 8 of them; their order is that of every modality axis.
    in_channels: channels of the images, one number for all modalities or one for each.
    num_classes: classes of the logits. ignore_index*: label that counts for nothing.
    class_names, palette, sensors: what the classes are called, their colours (red, green, blue) of
        0 to 255, and how images were normalised; kept with the model, which computes the same
        without. None is unknown.
    decoder_dim*: width of the head; None is 128 for nano, 256 for b0 and b1, 512 otherwise.
    share_encoder*: one encoder for all modalities; False gives each its own.
    cross_modal*: whether modalities attend to one another; False goes without query hub, pooling
        mixer and cross-attention, so that encoded modalities meet in the gate or the mean alone.
    aux_source: where the query hub reads: "embed" (before the blocks, as in the paper) or
        "encoded"* (after them).
    ppx_depth*, ppx_ratio*: pooling mixer blocks per stage and their hidden ratio per stage.
    cross_heads*, cross_sr*, cross_proj*: heads, key reduction and output projection of the
        cross-attention per stage.
    gate*: whether branches are reweighted, in the stages (1 to 4) of gate_stages*; gate_reduction*,
        gate_rho*, gate_tau*: of the gate.
    fuse*: how branches become the fused map, by "gate" weights, where there is one, or by "mean".
    sgm_weight*, sgm_tau*, sgm_stages*: weight, temperature and stages (1 to 4) of the SGM loss.
    sgm_source*: whose prototypes it compares: the features as "encoded", those behind the
        "cross_modal" block, or the branches as "gated".
    drop_path: stochastic depth of the last block, growing linearly from 0.
    ln_eps_embed, ln_eps_block: LayerNorm eps behind convolutions, and in blocks and stage ends.
    head_dropout: channel dropout before the classifier. fold_head: see `nn.SegmentationHead`.
    ohem_thresh: in (0, 1], hard pixels have a predicted probability below this.
    modality_dropout*: probability with which an image loses modalities in training, down to a
        random non-empty subset; those it loses are absent in the sense of `missing`.
    missing: what an absent modality is: "mask" (never used) or "zero" (an image of zeros).
    """

    variant: str = "b0"
    modalities: tuple[str, ...] = ("rgb", "depth", "event", "lidar")
    in_channels: int | Sequence[int] = 3
    num_classes: int = 25
    ignore_index: int = 255
    class_names: tuple[str, ...] | None = None
    palette: Palette | None = None
    sensors: tuple[Sensor, ...] | None = None
    decoder_dim: int | None = None
    share_encoder: bool = True
    cross_modal: bool = True
    aux_source: Literal["embed", "encoded"] = "embed"
    ppx_depth: int = 1
    ppx_ratio: tuple[int, int, int, int] = (8, 8, 4, 4)
    cross_heads: tuple[int, int, int, int] = HEADS
    cross_sr: tuple[int, int, int, int] = SR_RATIOS
    cross_proj: bool = True
    gate: bool = True
    gate_stages: tuple[int, ...] = (1, 2, 3, 4)
    gate_reduction: int = 4
    gate_rho: float = 0.5
    gate_tau: float = 1.0
    fuse: Literal["gate", "mean"] = "gate"
    sgm_weight: float = 1.0
    sgm_tau: float = 1.0
    sgm_stages: tuple[int, ...] = (1, 2, 3, 4)
    sgm_source: Literal["encoded", "cross_modal", "gated"] = "cross_modal"
    drop_path: float = 0.1
    ln_eps_embed: float = 1e-5
    ln_eps_block: float = 1e-6
    head_dropout: float = 0.1
    fold_head: bool = True
    ohem_thresh: float = 0.7
    modality_dropout: float = 0.0
    missing: Literal["mask", "zero"] = "mask"

    def __post_init__(self) -> None:
        self._set("variant", check_variant(self.variant))
        if isinstance(self.modalities, str):
            raise TypeError(
                f"modalities must be a sequence of names; got {self.modalities!r}. "
                f"Write modalities=({self.modalities!r},) for one"
            )
        for name, kind, of in (
            ("modalities", str, "names"),
            ("class_names", str, "names"),
            ("sensors", Sensor, "equiseg_fast.data.Sensor"),
            ("ppx_ratio", Integral, "four integers"),
            ("cross_heads", Integral, "four integers"),
            ("cross_sr", Integral, "four integers"),
            ("gate_stages", Integral, "integers"),
            ("sgm_stages", Integral, "integers"),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("class_names", "sensors"):
                check_sequence(name, value, kind, of)
                self._set(name, tuple(int(x) if kind is Integral else x for x in value))
        self._require("modalities", "" not in self.modalities, "names that are not empty")
        self._require("modalities", 1 <= len(self.modalities) <= 8, "1 to 8 names")
        self._require("modalities", _unique(self.modalities), "unique names")
        for name in ("num_classes", "ignore_index"):
            check_integer(name, getattr(self, name))
            self._set(name, int(getattr(self, name)))
        self._require("num_classes", 1 <= self.num_classes <= 256, "1 to 256")
        check_sizes(ppx_depth=self.ppx_depth, gate_reduction=self.gate_reduction)
        smallest = min(self.dims)
        self._require("gate_reduction", self.gate_reduction <= smallest, f"at most {smallest}")
        check_ignore_index(self.ignore_index)
        if self.decoder_dim is not None:
            check_sizes(decoder_dim=self.decoder_dim)
        for name in ("ppx_depth", "gate_reduction", "decoder_dim"):
            value = getattr(self, name)
            self._set(name, None if value is None else int(value))
        self._check_data()
        for name in ("ppx_ratio", "cross_heads", "cross_sr"):
            value = getattr(self, name)
            four = len(value) == 4 and 1 <= min(value) <= max(value) <= MAX_SIZE
            self._require(name, four, "four positive numbers, one per stage")
        pairs = zip(self.dims, self.cross_heads, strict=True)
        divides = not any(dim % heads for dim, heads in pairs)
        self._require("cross_heads", divides, f"divisors of the channels {self.dims}")
        check_choice("aux_source", self.aux_source, ("embed", "encoded"))
        check_choice("fuse", self.fuse, ("gate", "mean"))
        check_choice("sgm_source", self.sgm_source, ("encoded", "cross_modal", "gated"))
        check_choice("missing", self.missing, ("mask", "zero"))
        check_flags(
            share_encoder=self.share_encoder,
            cross_modal=self.cross_modal,
            cross_proj=self.cross_proj,
            gate=self.gate,
            fold_head=self.fold_head,
        )
        for name in ("drop_path", "head_dropout", "modality_dropout"):
            self._set(name, rate(name, getattr(self, name)))
        for name in ("gate_tau", "sgm_tau", "ln_eps_embed", "ln_eps_block"):
            self._set(name, positive(name, getattr(self, name)))
        for name in ("gate_rho", "sgm_weight", "ohem_thresh"):
            self._set(name, number(name, getattr(self, name)))
        self._require("sgm_weight", self.sgm_weight >= 0.0, "at least 0")
        self._require("ohem_thresh", 0.0 < self.ohem_thresh <= 1.0, "in (0, 1]")
        for name in ("gate_stages", "sgm_stages"):
            stages = getattr(self, name)
            once = _unique(stages) and {*stages} <= {1, 2, 3, 4}
            self._require(name, once, "stages 1 to 4, each once")

    def _check_data(self) -> None:
        """What the images and labels are like: channels, normalisation, names and colours."""
        channels = self.in_channels
        if not isinstance(channels, Sequence):
            check_sizes(in_channels=channels)
            channels = (channels,) * len(self.modalities)
        check_sequence("in_channels", channels, Integral, "integers")
        one_each = len(channels) == len(self.modalities)
        self._require("in_channels", one_each, "one number, or one for each of the modalities")
        for i, count in enumerate(channels):
            check_sizes(**{f"in_channels[{i}]": count})
        self._set("in_channels", tuple(map(int, channels)))
        if self.class_names is not None:
            each = _unique(self.class_names) and len(self.class_names) == self.num_classes
            each = each and "" not in self.class_names
            self._require("class_names", each, f"num_classes = {self.num_classes} unique names")
        self._set("palette", check_palette(self.palette, self.num_classes))
        if self.sensors is not None:
            for field, wanted, got in (
                ("modalities", self.modalities, tuple(x.name for x in self.sensors)),
                ("in_channels", self.in_channels, tuple(x.channels for x in self.sensors)),
            ):
                if wanted != got:
                    raise ValueError(f"sensors must be those of {field}, {wanted}; got {got}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON and YAML have them; `from_dict` makes an equal configuration of it."""
        found: dict[str, Any] = as_json(asdict(self))
        return found

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EQUISegConfig":
        """The configuration of `to_dict`; fields that are left out have their defaults.

        Raises TypeError or ValueError naming a field that does not exist, with the version of the
        package that wrote it if content has one, or a value that the field cannot have.
        """
        if not isinstance(content, Mapping):
            raise TypeError(f"content must be a mapping; got {type(content).__name__}")
        values = dict(content)
        version = values.pop(VERSION, None)
        if unknown := [str(name) for name in values if name not in _names(cls)]:
            wrote = f", which version {version} of the package wrote" if version else ""
            raise ValueError(
                f"EQUISegConfig has no field {', '.join(unknown)}{wrote}; it has "
                f"{', '.join(_names(cls))}"
            )
        sensors = values.get("sensors")
        if isinstance(sensors, Sequence) and not isinstance(sensors, str):
            values["sensors"] = tuple(_sensor(i, x) for i, x in enumerate(sensors))
        return cls(**values)

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return VARIANTS[self.variant][0]

    @property
    def depths(self) -> tuple[int, int, int, int]:
        """Encoder blocks of the four stages."""
        return VARIANTS[self.variant][1]

    @property
    def head_dim(self) -> int:
        """Width of the decode head."""
        if self.decoder_dim is not None:
            return self.decoder_dim
        return {"nano": 128, "b0": 256, "b1": 256}.get(self.variant, 512)

    @property
    def gated(self) -> tuple[int, ...]:
        """Stages, 1 to 4, that have a gate: where it can change a prediction."""
        if not self.gate or len(self.modalities) == 1:
            return ()
        # No prediction depends on the branches of the last stage.
        return tuple(s for s in sorted(self.gate_stages) if self.fuse == "gate" or s < 4)


def _unique(values: Sequence[Any]) -> bool:
    return len(set(values)) == len(values)


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _sensor(index: int, content: Any) -> Sensor:
    """A sensor from its fields, all of which must be there and no others."""
    if isinstance(content, Sensor):
        return content
    names = _names(Sensor)
    if not isinstance(content, Mapping) or set(content) != set(names):
        got = list(content) if isinstance(content, Mapping) else content
        raise ValueError(f"sensors[{index}] must have the fields {', '.join(names)}; got {got}")
    try:
        return Sensor(**content)
    except (TypeError, ValueError) as error:
        raise type(error)(f"sensors[{index}].{error}") from error

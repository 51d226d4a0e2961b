"""Everything that can be chosen about EQUISeg, in one frozen place."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

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
    num_classes: classes of the logits. ignore_index*: label that counts for nothing.
    decoder_dim*: width of the head; None is 128 for nano, 256 for b0 and b1, 512 otherwise.
    share_encoder*: one encoder for all modalities; False gives each its own.
    aux_source: where the query hub reads: "embed" (before the blocks, as in the paper) or
        "encoded"* (after them).
    ppx_depth*, ppx_ratio*: pooling mixer blocks per stage and their hidden ratio per stage.
    cross_heads*, cross_sr*, cross_proj*: heads, key reduction and output projection of the
        cross-attention per stage.
    gate*: whether branches are reweighted; gate_reduction*, gate_rho*, gate_tau*: of the gate.
    fuse*: how branches become the fused map, by "gate" weights or by "mean".
    sgm_weight*, sgm_tau*, sgm_stages*: weight, temperature and stages (1 to 4) of the SGM loss.
    drop_path: stochastic depth of the last block, growing linearly from 0.
    ln_eps_embed, ln_eps_block: LayerNorm eps behind convolutions, and in blocks and stage ends.
    head_dropout: channel dropout before the classifier. fold_head: see `nn.SegmentationHead`.
    ohem_thresh: in (0, 1], hard pixels have a predicted probability below this.
    modality_dropout*: probability that a training step sees only a random non-empty subset.
    missing: what an absent modality is: "mask" (never used) or "zero" (an image of zeros).
    """

    variant: str = "b0"
    modalities: tuple[str, ...] = ("rgb", "depth", "event", "lidar")
    num_classes: int = 25
    ignore_index: int = 255
    decoder_dim: int | None = None
    share_encoder: bool = True
    aux_source: Literal["embed", "encoded"] = "embed"
    ppx_depth: int = 1
    ppx_ratio: tuple[int, int, int, int] = (8, 8, 4, 4)
    cross_heads: tuple[int, int, int, int] = HEADS
    cross_sr: tuple[int, int, int, int] = SR_RATIOS
    cross_proj: bool = True
    gate: bool = True
    gate_reduction: int = 4
    gate_rho: float = 0.5
    gate_tau: float = 1.0
    fuse: Literal["gate", "mean"] = "gate"
    sgm_weight: float = 1.0
    sgm_tau: float = 1.0
    sgm_stages: tuple[int, ...] = (1, 2, 3, 4)
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
        for name, kind, of in (
            ("modalities", str, "names"),
            ("ppx_ratio", Integral, "four integers"),
            ("cross_heads", Integral, "four integers"),
            ("cross_sr", Integral, "four integers"),
            ("sgm_stages", Integral, "integers"),
        ):
            check_sequence(name, getattr(self, name), kind, of)
            self._set(name, tuple(getattr(self, name)))
        self._require("modalities", "" not in self.modalities, "names that are not empty")
        self._require("modalities", 1 <= len(self.modalities) <= 8, "1 to 8 names")
        unique = len(set(self.modalities)) == len(self.modalities)
        self._require("modalities", unique, "unique names")
        check_integer("num_classes", self.num_classes)
        self._require("num_classes", 1 <= self.num_classes <= 256, "1 to 256")
        check_sizes(ppx_depth=self.ppx_depth, gate_reduction=self.gate_reduction)
        smallest = min(self.dims)
        self._require("gate_reduction", self.gate_reduction <= smallest, f"at most {smallest}")
        check_ignore_index(self.ignore_index)
        if self.decoder_dim is not None:
            check_sizes(decoder_dim=self.decoder_dim)
        for name in ("ppx_ratio", "cross_heads", "cross_sr"):
            value = getattr(self, name)
            four = len(value) == 4 and 1 <= min(value) <= max(value) <= MAX_SIZE
            self._require(name, four, "four positive numbers, one per stage")
        pairs = zip(self.dims, self.cross_heads, strict=True)
        divides = not any(dim % heads for dim, heads in pairs)
        self._require("cross_heads", divides, f"divisors of the channels {self.dims}")
        check_choice("aux_source", self.aux_source, ("embed", "encoded"))
        check_choice("fuse", self.fuse, ("gate", "mean"))
        check_choice("missing", self.missing, ("mask", "zero"))
        check_flags(
            share_encoder=self.share_encoder,
            cross_proj=self.cross_proj,
            gate=self.gate,
            fold_head=self.fold_head,
        )
        for name in ("drop_path", "head_dropout", "modality_dropout"):
            rate(name, getattr(self, name))
        for name in ("gate_tau", "sgm_tau", "ln_eps_embed", "ln_eps_block"):
            positive(name, getattr(self, name))
        number("gate_rho", self.gate_rho)
        self._require("sgm_weight", number("sgm_weight", self.sgm_weight) >= 0.0, "at least 0")
        in_range = 0.0 < number("ohem_thresh", self.ohem_thresh) <= 1.0
        self._require("ohem_thresh", in_range, "in (0, 1]")
        once = sorted(self.sgm_stages) == [s for s in (1, 2, 3, 4) if s in self.sgm_stages]
        self._require("sgm_stages", once, "stages 1 to 4, each once")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

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

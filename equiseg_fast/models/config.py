"""Everything that can be chosen about EQUISeg, in one frozen place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

VARIANTS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
"""Mix Transformer variants: channels and number of blocks of the four stages."""

HEADS = (1, 2, 5, 8)
SR_RATIOS = (8, 4, 2, 1)


def check_variant(variant: str) -> str:
    """The variant in lower case. Raises ValueError if there is none of that name."""
    name = variant.lower()
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
    return name


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of every block, stage by stage: linear from 0 to `last` over all blocks."""
    step = last / max(sum(depths) - 1, 1)
    rates = iter(step * i for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


@dataclass(frozen=True)
class EQUISegConfig:
    """Configuration of EQUISeg; raises ValueError naming the field on a value it cannot have.

    Fields marked with a star are choices of ours where the paper (arXiv 2509.24505) is silent.

    variant: Mix Transformer of the encoder, "b0" to "b5".
    modalities: unique names, 1 to 8 of them; their order is that of every modality axis.
    num_classes: classes of the logits. ignore_index*: label that counts for nothing.
    decoder_dim*: width of the head; None is 256 for b0 and b1, 512 otherwise.
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
    ohem_thresh: hard pixels have a predicted probability below this.
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
        object.__setattr__(self, "variant", check_variant(self.variant))
        object.__setattr__(self, "modalities", tuple(self.modalities))
        self._require("modalities", 1 <= len(self.modalities) <= 8, "1 to 8 names")
        unique = len(set(self.modalities)) == len(self.modalities)
        self._require("modalities", unique, "unique names")
        self._require("num_classes", 1 <= self.num_classes <= 256, "1 to 256")
        self._require("decoder_dim", self.decoder_dim is None or self.decoder_dim > 0, "positive")
        for name in ("ppx_depth", "gate_reduction"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("ppx_ratio", "cross_heads", "cross_sr"):
            value = getattr(self, name)
            four = len(value) == 4 and min(value) >= 1
            self._require(name, four, "four positive numbers, one per stage")
        for name, allowed in (
            ("aux_source", ("embed", "encoded")),
            ("fuse", ("gate", "mean")),
            ("missing", ("mask", "zero")),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("drop_path", "head_dropout", "modality_dropout"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")
        for name in ("gate_tau", "sgm_tau", "ln_eps_embed", "ln_eps_block"):
            self._require(name, getattr(self, name) > 0.0, "positive")
        self._require("ohem_thresh", 0.0 < self.ohem_thresh <= 1.0, "in (0, 1]")
        self._require("sgm_stages", set(self.sgm_stages) <= {1, 2, 3, 4}, "stages 1 to 4")

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
        return 256 if self.variant in ("b0", "b1") else 512

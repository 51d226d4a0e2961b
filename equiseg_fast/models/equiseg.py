"""EQUISeg (arXiv 2509.24505): every modality encoded equally, fused across, balanced by SGM."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.nn import (
    CrossModalBlock,
    PrototypeLoss,
    SegmentationHead,
    SelfGuidedGate,
    init_module,
)
from equiseg_fast.nn._init import normal_
from equiseg_fast.nn._plain import is_plain
from equiseg_fast.ops import guided_gate, ohem, upsample_cross_entropy
from equiseg_fast.ops._layout import to_map
from equiseg_fast.ops._math import gate_weights, statistics_dtype

from .config import EQUISegConfig, drop_path_rates
from .inputs import (
    Images,
    Present,
    check_generator,
    check_labels,
    check_mask,
    check_teachers,
    holding,
    left_modalities,
    present_names,
    stack_images,
    teacher_order,
)
from .mix_transformer import MixTransformer
from .pretrained import Pretrained, accept_no_names

STRIDE = 32


class StageOutput(NamedTuple):
    """What one stage leaves behind, for M modalities and B images of L = height * width tokens."""

    features: Tensor
    """What the SGM loss compares, `[M, B, L, C]`: `config.sgm_source`, by default the output of the
    cross-modal block, before the gate."""
    fused: Tensor
    """What the head sees, `[B, L, C]`."""
    contributions: Tensor
    """Weight of each modality in the fused map, `[M, B, C]` fp32, summing to 1 over M."""
    size: tuple[int, int]
    """(height, width)."""


class EQUISeg(Pretrained):
    """Semantic segmentation from any number of sensors, any of which may be absent.

    All modalities run as one batch `[M * B, L, C]` through shared weights; only the score nets of
    the query hub belong to one modality. Stage by stage: patch embedding and transformer blocks
    (`encoder`), cross-modal block (`fusion`), gate (`gates`); then `head` on the fused maps. All
    children may have hooks, but the encoder itself is not called: its stages are, one by one.

    The state dict holds the names of the modalities, too ("_extra_state", uint8), because weights
    belong to them by their order alone: `load_state_dict` raises RuntimeError for those of other
    names or another order. State dicts without them load as they are.
    """

    hard_pixels: Callable[..., Tensor] = staticmethod(ohem)
    """The mean of hard pixels; training in several processes takes it over the pixels of all."""

    def __init__(self, config: EQUISegConfig) -> None:
        super().__init__()
        if not isinstance(config, EQUISegConfig):
            hint = ""
            if isinstance(config, str):
                hint = f"; EQUISeg.from_name({config!r}) takes the name of a variant"
            raise TypeError(f"config must be an EQUISegConfig; got {type(config).__name__}{hint}")
        self.config = config
        encoders = [
            MixTransformer(
                config.variant,
                in_channels=channels,
                drop_path=config.drop_path,
                ln_eps_embed=config.ln_eps_embed,
                ln_eps_block=config.ln_eps_block,
            )
            for channels in ([config.in_channels] if config.share_encoder else config.in_channels)
        ]
        self.encoder = encoders[0] if config.share_encoder else nn.ModuleList(encoders)
        self.fusion = nn.ModuleList()
        self.gates = nn.ModuleList()
        for s in range(4 if len(config.modalities) > 1 else 0):
            if config.cross_modal:
                self.fusion.append(self._fusion_block(s))
            # By their names weights know their stages, so there is something in every stage.
            gated = s + 1 in config.gated
            self.gates.append(self._gate(s) if gated else nn.Identity())
        self.head = SegmentationHead(
            config.dims, config.head_dim, config.num_classes, config.head_dropout, config.fold_head
        )
        self.head.apply(init_module)
        # A new model is not sure of anything. By fan-out its first losses would be far above the
        # log of the number of classes, and the first steps would do nothing but take that back.
        normal_(self.head.linear_pred.weight, 0.01)
        self.prototype_loss = PrototypeLoss(config.num_classes, config.sgm_tau, config.ignore_index)
        self.register_load_state_dict_pre_hook(accept_no_names)

    @classmethod
    def from_name(
        cls,
        variant: str,
        *,
        modalities: Sequence[str] = ("rgb", "depth", "event", "lidar"),
        num_classes: int = 25,
        **fields: Any,
    ) -> "EQUISeg":
        """A freshly initialised model, e.g. `EQUISeg.from_name("b2", modalities=("rgb", "depth"))`.

        fields: further fields of `EQUISegConfig`.
        """
        config = EQUISegConfig(
            variant=variant, modalities=modalities, num_classes=num_classes, **fields
        )
        return cls(config)

    def fold_(self) -> "EQUISeg":
        """For inference: multiply norms and scales that are affine then into the weights beside.

        The same function with fewer kernels and passes (`ParallelPoolingMixer.fold_`,
        `SegmentationHead.fold_`). Cannot be undone, so fold a copy if you go on training; the
        model is in evaluation mode afterwards, and training raises RuntimeError. Returns the model.
        """
        parts = [mixer for block in self.fusion for mixer in block.mixer] + [self.head]
        for part in parts:
            part.check_foldable()  # all or nothing
        for part in parts:
            part.fold_()
        return self.eval()

    @overload
    def forward(
        self,
        images: Images,
        *,
        present: Present = None,
        labels: None = None,
        generator: torch.Generator | None = None,
        order: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: Images,
        *,
        present: Present = None,
        labels: Tensor,
        generator: torch.Generator | None = None,
        order: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def forward(
        self,
        images: Images,
        *more: NoReturn,
        present: Present = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        order: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, num_classes, H, W]` at the size of the input; with labels what `loss` returns
        (distributed wrappers work on `forward` alone).

        images: mapping name -> `[B, C, H, W]` with the channels of `config.in_channels`, or, if all
            have as many, a tensor `[M, B, C, H, W]` in the order of `config.modalities`;
            normalised, floating, on the model's device. Sizes that are no multiple of 32 are padded
            with zeros and cropped again.
        present: what is there: None for everything, a set of names (the others may be missing
            from images and cost nothing), or a bool mask `[M, B]` per image. The values of what is
            absent never matter. A mask on the CPU is checked; one on a GPU is not read back, and
            an image without any modality gets NaN there. `torch.compile` makes a graph of its own
            for each set of names, and gives up after `torch._dynamo.config.recompile_limit` (8) of
            them: there, and under `DistributedDataParallel`, where every parameter has to take
            part (or `find_unused_parameters=True`), give the mask.

        Raises TypeError or ValueError naming what is wrong.
        """
        if more:
            raise TypeError(
                "forward takes images alone by position; write model(images, labels=labels) or "
                f"model(images, present=present); got {1 + len(more)} positional arguments"
            )
        if labels is not None:
            return self.loss(images, labels, present=present, generator=generator, order=order)
        x, mask, subset = self._inputs(images, present)
        stages, padded = self._stages(*self._masked(x, mask), subset)
        height, width = x.shape[-2:]
        logits = F.interpolate(
            self._head(stages), size=padded, mode="bilinear", align_corners=False
        )
        return logits[..., :height, :width]

    if TYPE_CHECKING:
        __call__ = forward

    def stages(self, images: Images, *, present: Present = None) -> list[StageOutput]:
        """Features, fused map and modality contributions of the four stages (of padded images).

        Arguments as for `forward`. With a set of names, M counts the present modalities only.
        """
        x, mask, subset = self._inputs(images, present)
        return self._stages(*self._masked(x, mask), subset)[0]

    def loss(
        self,
        images: Images,
        labels: Tensor,
        *,
        present: Present = None,
        generator: torch.Generator | None = None,
        order: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss: total and its named parts, all fp32 scalars.

        labels: `[B, H, W]` integer, 0..num_classes - 1 or `config.ignore_index`. generator: draws
        the teachers of the self-guided loss (and in training the modalities that
        `config.modality_dropout` leaves, for every image on its own and never none); None is
        PyTorch's own of the model's device, which waits for nothing; what a generator of another
        device draws is copied.
        order: int64 `[M]`, a permutation of the modalities, of those present if `present` names
        them: which are taken as teachers first; None draws one.

        parts: "seg", the OHEM cross-entropy at label resolution, and "sgm", the mean over stages
        of the prototype self-distillation; total = seg + sgm_weight * sgm.
        """
        config = self.config
        x, mask, subset = self._inputs(images, present)
        check_generator(generator)
        check_teachers(order, x)
        check_labels(labels, x, config.num_classes, config.ignore_index)
        if self.training and config.modality_dropout > 0.0:
            mask = left_modalities(config.modality_dropout, x, mask, generator)
        x, mask = self._masked(x, mask)
        stages, (height, width) = self._stages(x, mask, subset)
        padding = (0, width - labels.shape[-1], 0, height - labels.shape[-2])
        labels = holding(labels, config.ignore_index)
        labels = F.pad(labels, padding, value=config.ignore_index)

        per_pixel = upsample_cross_entropy(
            self._head(stages), labels, ignore_index=config.ignore_index
        )
        seg = self.hard_pixels(per_pixel, labels != config.ignore_index, thresh=config.ohem_thresh)
        sgm = torch.zeros_like(seg)
        if x.shape[0] > 1 and config.sgm_stages:
            order = teacher_order(order, x, generator)
            losses = [
                self.prototype_loss(
                    stages[s - 1].features, labels, order, *stages[s - 1].size, present=mask
                )
                for s in config.sgm_stages
            ]
            sgm = torch.stack(losses).mean()
        return seg + config.sgm_weight * sgm, {"seg": seg, "sgm": sgm}

    def _gate(self, s: int) -> SelfGuidedGate:
        config = self.config
        return SelfGuidedGate(
            config.dims[s], config.gate_reduction, config.gate_rho, config.gate_tau
        )

    def _fusion_block(self, s: int) -> CrossModalBlock:
        config = self.config
        block = CrossModalBlock(
            config.dims[s],
            len(config.modalities),
            config.cross_heads[s],
            config.cross_sr[s],
            ppx_depth=config.ppx_depth,
            ppx_ratio=config.ppx_ratio[s],
            drop_path=drop_path_rates(config.drop_path, config.depths)[s][-1],
            output_projection=config.cross_proj,
        )
        return block.apply(init_module)

    def _inputs(
        self, images: Images, present: Present
    ) -> tuple[Tensor, Tensor | None, list[int] | None]:
        """Images `[M, B, C, H, W]`, which are there `[M, B]` (None for all), and which modalities
        these M are. Of fewer channels than C an image has zeros in the rest."""
        names = self.config.modalities
        subset = present_names(present, names)
        zero = self.config.missing == "zero"
        needed = range(len(names)) if subset is None or zero else subset
        last = self.head.linear_pred
        like = last.weight if is_plain(last) else next(self.parameters())
        x = stack_images(images, names, self.config.in_channels, needed, like)
        if subset is not None and not zero:
            return x, None, None if len(subset) == len(names) else subset
        if present is None:
            return x, None, None
        if subset is not None:
            mask = torch.tensor([i in subset for i in needed], device="cpu")
            mask = mask[:, None].expand(*x.shape[:2])
        else:
            assert isinstance(present, Tensor)
            mask = present
            check_mask(mask, x)
        return x, mask.to(x.device, non_blocking=True), None

    def _masked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images without what is absent, and the mask, unless zeros are all that the layers see."""
        if mask is None:
            return x, None
        x = x.masked_fill(~mask[:, :, None, None, None], 0.0)
        return x, None if self.config.missing == "zero" else mask

    def _stages(
        self, x: Tensor, mask: Tensor | None, subset: list[int] | None
    ) -> tuple[list[StageOutput], tuple[int, int]]:
        """The four stages, and the padded size of the images."""
        config = self.config
        modalities, batch = x.shape[:2]
        height, width = x.shape[-2:]
        # Written without a modulus, which the compiler cannot check for sizes it does not know.
        more_rows = (height + STRIDE - 1) // STRIDE * STRIDE - height
        more_columns = (width + STRIDE - 1) // STRIDE * STRIDE - width
        maps = F.pad(x.flatten(0, 1), (0, more_columns, 0, more_rows))
        padded = (maps.shape[-2], maps.shape[-1])
        maps = maps.contiguous(memory_format=torch.channels_last)
        chosen = list(range(len(config.modalities))) if subset is None else subset
        outputs = []
        for s in range(4):
            embedded, encoded, size = self._encode(s, maps, chosen)
            crossed = encoded
            if modalities > 1 and config.cross_modal:
                source = embedded if config.aux_source == "embed" else encoded
                crossed = self.fusion[s](source, encoded, *size, present=mask, subset=subset)
            if modalities == 1:
                ones = encoded.new_ones((1, batch, encoded.shape[-1]), dtype=torch.float32)
                branches, fused, weights = encoded, encoded[0], ones
            else:
                branches, fused, weights = self._balance(s, crossed, mask)
            features = {"encoded": encoded, "cross_modal": crossed, "gated": branches}
            outputs.append(StageOutput(features[config.sgm_source], fused, weights, size))
            maps = to_map(branches.flatten(0, 1), *size)
        return outputs, padded

    def _encode(
        self, s: int, maps: Tensor, chosen: Sequence[int]
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Stage s of the chosen modalities: maps `[M * B, C, H, W]` -> embedded and encoded
        `[M, B, L, C]`, (h, w)."""
        channels = [self.config.in_channels[i] if s == 0 else maps.shape[1] for i in chosen]
        if self.config.share_encoder:
            tokens, h, w = _embed(self.encoder, s, maps, channels)
            encoded = self.encoder.encode(s, tokens, h, w)
        else:
            pairs = []
            for i, c, rows in zip(chosen, channels, maps.chunk(len(chosen)), strict=True):
                tokens, h, w = self.encoder[i].embed(s, rows[:, :c])
                pairs.append((tokens, self.encoder[i].encode(s, tokens, h, w)))
            tokens, encoded = (torch.cat(x) for x in zip(*pairs, strict=True))
        shape = (len(chosen), -1)
        return tokens.unflatten(0, shape), encoded.unflatten(0, shape), (h, w)

    def _balance(self, s: int, f: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gate of stage s: f `[M, B, L, C]` -> branches, fused map, contributions `[M, B, C]`."""
        config = self.config
        gated = s + 1 in config.gated
        if gated:
            branches, fused, weights = self.gates[s](f, present=mask, return_weights=True)
            if config.fuse == "gate":
                return branches, fused, weights
        logits = _equal_logits(f)
        unchanged, fused = guided_gate(f, logits, present=mask, rho=0.0)
        weights = gate_weights(logits, present=mask)
        return branches if gated else unchanged, fused, weights

    def _head(self, stages: Sequence[StageOutput]) -> Tensor:
        return self.head([s.fused for s in stages], [s.size for s in stages])


def _embed(
    encoder: MixTransformer, s: int, maps: Tensor, channels: Sequence[int]
) -> tuple[Tensor, int, int]:
    """Embedding of maps `[M * B, C, H, W]` whose M modalities have so many channels each: all that
    have as many in one go."""
    if len(set(channels)) == 1:
        return encoder.embed(s, maps)
    rows = maps.chunk(len(channels))
    parts: dict[int, Tensor] = {}
    for count in dict.fromkeys(channels):
        members = [m for m, c in enumerate(channels) if c == count]
        x = torch.cat([rows[m][:, :count] for m in members])
        tokens, h, w = encoder.embed(s, x.contiguous(memory_format=torch.channels_last))
        parts.update(zip(members, tokens.chunk(len(members)), strict=True))
    return torch.cat([parts[m] for m in range(len(channels))]), h, w


def _equal_logits(f: Tensor) -> Tensor:
    """Logits `[M, B, C]` that weigh all modalities of f `[M, B, L, C]` alike."""
    return f.new_zeros((*f.shape[:2], f.shape[-1]), dtype=statistics_dtype(f))

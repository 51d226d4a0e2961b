"""How checkpoints name a Mix Transformer encoder: families of names against ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names an encoder, against our names.

    patch_embed, block, norm: their modules, with {s} for the stage, counted from `first`, and {j}
    for the block; stem: the first patch embedding, if named otherwise. inside: our name in such a
    module -> theirs, where they differ; several of theirs, separated by spaces, are rows of ours
    below one another, and [i] is third i of the rows. "weight" or "bias" follows, or replaces
    {kind}.
    """

    name: str
    first: int
    patch_embed: str
    block: str
    norm: str
    inside: Mapping[str, str] = field(default_factory=dict)
    stem: str | None = None

    def sources(self, name: str) -> list[str]:
        """Our parameter -> where the file has it, one after another along the first axis.

        With [i] behind it third i of what is there. Nowhere, if the published encoder has no such
        parameter.
        """
        match = _OURS.fullmatch(name)
        if match is None:
            return []
        module, stage, block, inner, kind = match.groups(default="")
        theirs = getattr(self, module).format(s=int(stage) - 1 + self.first, j=block)
        if self.stem is not None and module == "patch_embed" and stage == "1":
            theirs = self.stem
        if not inner:
            return [f"{theirs}.{kind}"]
        parts = self.inside.get(inner, inner).split()
        paths = [x.format(kind=kind) if "{kind}" in x else f"{x}.{kind}" for x in parts]
        return [f"{theirs}.{x}" for x in paths]

    def pattern(self, module: str) -> str:
        """Regular expression of a module's name, capturing the numbers of stage and block."""
        return getattr(self, module).replace(".", r"\.").format(s=r"(\d)", j=r"(\d+)")


class Source(NamedTuple):
    """Where a file has a parameter of ours, or rows of it."""

    name: str
    third: int | None
    """Which third of the rows of that tensor; None for all."""


class Found(NamedTuple):
    """An encoder in a file."""

    layout: Layout
    prefix: str

    def sources(self, name: str) -> list[Source]:
        """As those of the layout, with whole names."""
        parts = (x.partition("[") for x in self.layout.sources(name))
        return [Source(self.prefix + x, int(i[0]) if i else None) for x, _, i in parts]


_OURS = re.compile(
    r"(patch_embed|block|norm)([1-4])(?:\.(\d+))?"
    r"(?:\.(proj|norm[12]?|attn\.(?:q|kv|proj|sr|norm)|mlp\.(?:fc1|dwconv\.dwconv|fc2)))?"
    r"\.(weight|bias)"
)
FIRST = re.compile(r"patch_embed1\.(?:proj|others\.\d+)\.(weight|bias)")
"""First convolutions: the one of published encoders, and those for other numbers of channels."""

HUGGING_FACE_V5 = Layout(
    "Hugging Face v5",
    0,
    "stages.{s}.patch_embeddings",
    "stages.{s}.blocks.{j}",
    "stages.{s}.layer_norm",
    {
        "norm": "layer_norm",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q": "attention.q_proj",
        "attn.kv": "attention.k_proj attention.v_proj",
        "attn.proj": "attention.o_proj",
        "attn.sr": "attention.sequence_reduction.sequence_reduction",
        "attn.norm": "attention.sequence_reduction.layer_norm",
    },
)

LAYOUTS = (
    Layout("NVlabs", 1, "patch_embed{s}", "block{s}.{j}", "norm{s}"),
    Layout(
        "MMSegmentation",
        0,
        "layers.{s}.0",
        "layers.{s}.1.{j}",
        "layers.{s}.2",
        {
            "proj": "projection",
            "attn.q": "attn.attn.in_proj_{kind}[0]",
            "attn.kv": "attn.attn.in_proj_{kind}[1] attn.attn.in_proj_{kind}[2]",
            "attn.proj": "attn.attn.out_proj",
            "mlp.fc1": "ffn.layers.0",
            "mlp.dwconv.dwconv": "ffn.layers.1",
            "mlp.fc2": "ffn.layers.4",
        },
    ),
    Layout(
        "timm PVTv2",
        0,
        "stages.{s}.downsample",
        "stages.{s}.blocks.{j}",
        "stages.{s}.norm",
        {"mlp.dwconv.dwconv": "mlp.dwconv"},
        stem="patch_embed",
    ),
    Layout(
        "Hugging Face v4",
        0,
        "encoder.patch_embeddings.{s}",
        "encoder.block.{s}.{j}",
        "encoder.layer_norm.{s}",
        {
            "norm": "layer_norm",
            "norm1": "layer_norm_1",
            "norm2": "layer_norm_2",
            "attn.q": "attention.self.query",
            "attn.kv": "attention.self.key attention.self.value",
            "attn.proj": "attention.output.dense",
            "attn.sr": "attention.self.sr",
            "attn.norm": "attention.self.layer_norm",
            "mlp.fc1": "mlp.dense1",
            "mlp.fc2": "mlp.dense2",
        },
    ),
    HUGGING_FACE_V5,
)

# Models around an encoder with NVlabs' names, told apart by what else they have.
BUILT_ON = (
    (r"\bextra_downsample_layers\.", "CMNeXt"),
    (r"\badap2?_t", "StitchFusion"),
    (r"\bextra_patch_embed1\.", "CMX"),
)

# What a file without a known encoder may be; the first that fits is the answer.
OTHERS = (
    (
        r"\bpatch_embed\d\.norm\.ln_\d",
        "a Mix Transformer with a LayerNorm per modality, as in GeminiFusion and TokenFusion",
    ),
    (r"\blayer1\.0\.conv1\.|\bresnet\.", "a ResNet"),
    (r"\brelative_position_bias_table$", "a Swin Transformer"),
    (r"\bcls_token$|\bblocks\.\d+\.attn\.qkv\.", "a plain Vision Transformer"),
    (r"\bstages\.\d\.(blocks\.|layers\.)?\d+\.(dwconv|conv_dw)\.", "a ConvNeXt"),
    (r"\b(decode_head|linear_c\d?|linear_fuse|linear_projections)\.", "a decode head only"),
    (r"^(param_groups$|optimizer)", "an optimizer state"),
)

"""Encoder weights from the checkpoints of SegFormer and of what was built on it."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.ops._checks import check_dense, check_flags

from .config import VARIANTS
from .mix_transformer import MixTransformer


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` did; `str` of it is a summary of a few lines."""

    layout: str
    """Whose names the file uses: "NVlabs" (ours are the same), "CMNeXt", "StitchFusion",
    "Hugging Face v4" or "Hugging Face v5"."""
    loaded: tuple[str, ...]
    """Parameters of the model that were overwritten."""
    ignored: tuple[str, ...]
    """Tensors of the file that no encoder has: heads, auxiliary branches, adapters."""
    missing: tuple[str, ...]
    """Encoder parameters of the model that the file lacks; never any with `strict=True`."""

    def __str__(self) -> str:
        lines = [f"{self.layout}: {len(self.loaded)} parameters loaded"]
        for label, names in (("missing", self.missing), ("ignored", self.ignored)):
            count = len(names) or "none"
            lines.append(f"  {count} {label}" + (f": {_summary(names)}" if names else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Layout:
    """How one family of checkpoints names an encoder, against our names.

    patch_embed, block, norm: their modules, with {s} for the stage, counted from `first`, and {j}
    for the block. inside: our name in such a module -> theirs, where they differ; several of
    theirs, separated by spaces, are rows of ours below one another.
    """

    name: str
    first: int
    patch_embed: str
    block: str
    norm: str
    inside: Mapping[str, str] = field(default_factory=dict)

    def sources(self, name: str) -> list[str]:
        """Our parameter -> where the file has it, one after another along the first axis."""
        match = _OURS.fullmatch(name)
        assert match is not None, name
        module, stage, block, inner, kind = match.groups(default="")
        theirs = getattr(self, module).format(s=int(stage) - 1 + self.first, j=block)
        if not inner:
            return [f"{theirs}.{kind}"]
        return [f"{theirs}.{part}.{kind}" for part in self.inside.get(inner, inner).split()]

    def pattern(self, module: str) -> str:
        """Regular expression of a module's name, capturing the numbers of stage and block."""
        return getattr(self, module).replace(".", r"\.").format(s=r"(\d)", j=r"(\d+)")


_OURS = re.compile(r"(patch_embed|block|norm)([1-4])(?:\.(\d+))?(?:\.(.+))?\.(weight|bias)")

HUGGING_FACE_V5 = _Layout(
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

_LAYOUTS = (
    _Layout("NVlabs", 1, "patch_embed{s}", "block{s}.{j}", "norm{s}"),
    _Layout(
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
_BUILT_ON = ((r"\bextra_downsample_layers\.", "CMNeXt"), (r"\badap2?_t", "StitchFusion"))

# What a file without a known encoder may be; the first that fits is the answer.
_OTHERS = (
    (r"^(param_groups$|optimizer)", "an optimizer state"),
    (
        r"\bpatch_embed\d\.norm\.ln_\d",
        "a Mix Transformer with a LayerNorm per modality, as in GeminiFusion and TokenFusion",
    ),
    (r"\blayers\.0\.0\.projection\.", "a Mix Transformer as in MMSegmentation 0.13 and later"),
    (r"\blayer1\.0\.conv1\.|\bresnet\.", "a ResNet"),
    (r"\brelative_position_bias_table$", "a Swin Transformer"),
    (r"\bcls_token$|\bblocks\.\d+\.attn\.qkv\.", "a plain Vision Transformer"),
    (r"\bstages\.\d\.(blocks\.|layers\.)?\d+\.(dwconv|conv_dw)\.", "a ConvNeXt"),
    (r"\b(decode_head|linear_c\d?|linear_fuse|linear_projections)\.", "a decode head only"),
)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def load_backbone(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
) -> LoadReport:
    """Overwrite the encoder weights of `model` with those of a checkpoint.

    model: an `EQUISeg`, a `MixTransformer`, or any module around one. With `share_encoder=False`
    every encoder gets the weights of a file with one encoder; a file with as many encoders as the
    model (of such an `EQUISeg`) gives each its own.

    path_or_state_dict: a file of safetensors (by its suffix), any other file of PyTorch's (read
    with `weights_only=True`), or a mapping from names to floating tensors of any dtype. Layouts are
    recognised by their names, below any prefix ("backbone.", "module.", ..) and any of the keys
    "state_dict", "model_state_dict", "model", "module":

    - NVlabs/SegFormer, `mit_b*.pth` and whole models, and so the checkpoints of this package
    - CMNeXt, of which the RGB branch is a Mix Transformer, and StitchFusion
    - Hugging Face transformers, SegFormer as in versions 4 and 5

    Heads, auxiliary branches and adapters are ignored. strict: whether a parameter that the file
    lacks is an error; otherwise the model keeps its own.

    The model keeps its dtypes and devices. LayerNorm eps is no weight and so is not loaded: the
    original has 1e-6 in blocks and at stage ends (as we do), but transformers, CMNeXt and
    StitchFusion compute with 1e-5 everywhere. To reproduce their outputs, build the model with
    `ln_eps_block=1e-5`.

    Raises, leaving the model as it was, TypeError for what is no model, file or floating tensor;
    ValueError for a file that cannot be read, holds no such encoder (with what it seems to be),
    holds another variant, several encoders, or a parameter of another shape, or, if strict, lacks
    one; ImportError for a .safetensors file without safetensors; OSError if there is no such file.

    Sources: the key names of NVlabs/SegFormer, jamycheung/DELIVER, LiBingyu01/StitchFusion, and
    transformers 4 and 5. `mit_b*.pth` and their conversions are under NVIDIA's non-commercial
    licence.
    """
    encoders = _encoders(model)
    check_flags(strict=strict)
    origin, content = _read(path_or_state_dict)
    state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    found = _find(state)
    if not found:
        raise ValueError(f"{origin} has no Mix Transformer encoder: {_describe(content)}")
    found = _distribute(origin, found, len(encoders))

    plan: list[tuple[Tensor, list[Tensor]]] = []
    loaded: list[str] = []
    missing: list[str] = []
    used: set[str] = set()
    for (path, encoder), (layout, prefix) in zip(encoders, found, strict=True):
        _check_variant(origin, state, layout, prefix, encoder)
        for name, target in encoder.named_parameters():
            sources = [prefix + source for source in layout.sources(name)]
            if not state.keys() >= set(sources):
                missing.append(path + name)
                continue
            for source in sources:
                _check_source(source, state[source], path + name, target, len(sources))
            plan.append((target, [state[source] for source in sources]))
            loaded.append(path + name)
            used.update(sources)
    if missing and strict:
        raise ValueError(
            f"{origin} lacks {len(missing)} of {len(missing) + len(loaded)} encoder parameters: "
            f"{_summary(missing)}; strict=False keeps those of the model"
        )
    with torch.no_grad():
        for parameter, parts in plan:
            for rows, part in zip(parameter.chunk(len(parts)), parts, strict=True):
                rows.copy_(part)

    ignored = tuple(name for name in state if name not in used)
    built_on = [x for pattern, x in _BUILT_ON if any(re.search(pattern, k) for k in ignored)]
    layout_name = built_on[0] if built_on else found[0][0].name
    return LoadReport(layout_name, tuple(loaded), ignored, tuple(missing))


def _encoders(model: nn.Module) -> list[tuple[str, MixTransformer]]:
    """The encoders of a model, with the prefix of their parameters' names."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    encoders = [(f"{n}." if n else "", m) for n, m in modules if isinstance(m, MixTransformer)]
    if not encoders:
        raise TypeError(f"model must be an EQUISeg or a MixTransformer; got {type(model).__name__}")
    return encoders


def _read(source: object) -> tuple[str, Mapping[str, Any]]:
    """What to call the source in messages, and the innermost mapping it holds."""
    origin = "path_or_state_dict"
    content = source
    if isinstance(source, str | os.PathLike):
        origin = os.fspath(source)
        content = _read_safetensors(origin) if origin.endswith(".safetensors") else _load(origin)
    if not isinstance(content, Mapping):
        raise TypeError(
            f"{origin} must hold or be a mapping from names to tensors; "
            f"got {type(content).__name__}"
        )
    return origin, _unwrap(content)


def _read_safetensors(path: str) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs safetensors, which `pip install safetensors` installs"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _load(path: str) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{path} cannot be read by torch.load with weights_only=True: it is no file of "
            "PyTorch's, or damaged, or holds more than tensors. In the last case, and if you trust "
            "it, pass the state dict instead of the path"
        ) from error


def _unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        if isinstance(inner := content.get(key), Mapping):
            return _unwrap(inner)
    return content


def _find(state: Mapping[str, Tensor]) -> list[tuple[_Layout, str]]:
    """Encoders of the file, by layout and by the prefix of their names, in alphabetical order."""
    found = []
    for layout in _LAYOUTS:
        pattern = re.compile(rf"((?:.+\.)?){layout.pattern('patch_embed')}\.proj\.(?:weight|bias)")
        prefixes = {match[1] for name in state if (match := pattern.fullmatch(name))}
        found += [(layout, prefix) for prefix in sorted(prefixes)]
    return found


def _distribute(
    origin: str, found: list[tuple[_Layout, str]], count: int
) -> list[tuple[_Layout, str]]:
    """Which encoder of the file serves each of the `count` encoders of the model."""
    if len(found) == 1:
        return found * count
    prefixes = [prefix for _, prefix in found]
    stem = prefixes[0].removesuffix("0.")
    # Only numbers say which is which: "student." and "teacher." are not two modalities.
    if len(found) == count and prefixes == [f"{stem}{i}." for i in range(count)]:
        return found
    raise ValueError(
        f"{origin} must have one encoder, or numbered ones, as many as the model, which has "
        f"{count}; got {', '.join(map(repr, prefixes))}. Pass a state dict of one of them"
    )


def _check_variant(
    origin: str, state: Mapping[str, Tensor], layout: _Layout, prefix: str, encoder: MixTransformer
) -> None:
    """The encoder below `prefix` has the channels and the number of blocks of `encoder`."""
    channels = []
    for s, dim in enumerate(encoder.dims):
        weight = state.get(prefix + layout.sources(f"patch_embed{s + 1}.proj.weight")[0])
        # What is missing is reported as such, later.
        known = weight is not None and weight.dim() and not weight.is_nested
        channels.append(dim if weight is None else weight.shape[0] if known else 0)
    pattern = re.compile(rf"{re.escape(prefix)}{layout.pattern('block')}\.")
    blocks = {match.groups() for name in state if (match := pattern.match(name))}
    per_stage = Counter(int(stage) - layout.first for stage, _ in blocks)
    theirs = (tuple(channels), tuple(per_stage[s] for s in range(4)))
    ours = (encoder.dims, tuple(len(getattr(encoder, f"block{s}")) for s in (1, 2, 3, 4)))
    if theirs != ours:
        raise ValueError(
            f"{origin} has a different Mix Transformer: {_variant(*theirs)}; "
            f"the model is {_variant(*ours)}"
        )


def _variant(channels: tuple[int, ...], blocks: tuple[int, ...]) -> str:
    names = [name for name, sizes in VARIANTS.items() if sizes == (channels, blocks)]
    return f"{names[0] if names else 'no known variant'} (channels {channels}, blocks {blocks})"


def _check_source(source: str, value: Tensor, name: str, target: Tensor, parts: int) -> None:
    """A tensor of the file can become one of `parts` equal groups of rows of a parameter."""
    check_dense(source, value)
    expected = [target.shape[0] // parts, *target.shape[1:]]
    label = f"{source} (for {name})"
    if list(value.shape) != expected:
        raise ValueError(f"{label} must have shape {expected}; got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{label} must be floating; got {str(value.dtype).removeprefix('torch.')}")
    if value.is_meta or target.is_meta:
        whose = "file" if value.is_meta else "model"
        raise ValueError(f"{label} must have values; in the {whose} it is on the meta device")


def _describe(content: Mapping[str, Any]) -> str:
    """What a file without a known encoder seems to be."""
    names = [str(name) for name in content]
    if not names:
        return "it is empty"
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return f"it looks like {what}; it has {_summary(names)}"
    return f"it has {_summary(names)}"


def _summary(names: Sequence[str], limit: int = 6) -> str:
    """A few names as they are; of more, how many there are of the most frequent kinds."""
    if len(names) <= limit:
        return ", ".join(names)
    kinds = Counter(re.sub(r"\d+", "*", name.rpartition(".")[0] or name) for name in names)
    shown = [f"{kind} ({count})" for kind, count in kinds.most_common(limit)]
    return ", ".join(shown) + (", .." if len(kinds) > limit else "")

"""Encoder weights from the checkpoints of SegFormer and of what was built on it."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.ops._checks import check_flags

from .checkpoint import main_path, read, tensors
from .config import VARIANTS
from .equiseg import EQUISeg
from .layouts import BUILT_ON, FIRST, LAYOUTS, OTHERS, Found, Source
from .mix_transformer import MixTransformer
from .pretrained import sensors_of
from .report import LoadReport, quoted, summary


def load_backbone(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    prefix: str | Sequence[str] | None = None,
    adapt_channels: bool = True,
) -> LoadReport:
    """Overwrite the encoder weights of `model` with those of a checkpoint.

    model: an `EQUISeg`, a `MixTransformer`, or any module around one. With `share_encoder=False`
    every encoder gets the weights of a file with one encoder; a file with as many encoders as the
    model (of such an `EQUISeg`, in the same order of modalities; or of CMX, the RGB encoder, then
    the other) gives each its own.

    path_or_state_dict: a file of safetensors (by its suffix), any other file of PyTorch's (read as
    with `weights_only=True`; values of NumPy and `argparse.Namespace` beside the weights are
    skipped, further types are refused by name), or a mapping from names to floating tensors of any
    dtype. Layouts are recognised by their names, below any prefix ("backbone.", "module.",
    ..) and in nested mappings, of which "state_dict", "model_state_dict", "model" and "module" come
    before others ("teacher", "state_dict_ema", ..):

    - NVlabs/SegFormer, `mit_b*.pth` and whole models, and so the checkpoints of this package
    - CMX, which has two encoders (the one beside RGB has "extra_" in front of its names) of which
      a model with one gets RGB's; CMNeXt, whose RGB branch is one; and StitchFusion
    - MMSegmentation's MixVisionTransformer
    - PVTv2 b5 of timm, the only one of PVTv2 that is a Mix Transformer; b0 to b4 are refused,
      because their Mix-FFN is twice as wide in the first two stages
    - Hugging Face transformers, SegFormer as in versions 4 and 5

    Heads, auxiliary branches and adapters are ignored. strict: whether a parameter that the file
    lacks is an error; otherwise the model keeps its own.

    prefix: which encoder of the file to take where it has several: what its names begin with
    ("backbone.extra_"; in a mapping beside the state dict "teacher.backbone.", with its key in
    front); a sequence gives one for each encoder of the model. None finds it, and raises ValueError
    naming the candidates where nothing above tells which it is.

    adapt_channels: whether a first convolution may have other input channels in the file, where
    there is none for as many. Fewer or more are taken in turn: with one in the model the weights
    are summed, with four the fourth is the first again, each with half of its weights. So the model
    computes of images what the original computes of them with channels repeated likewise. The
    report names it.

    The model keeps its dtypes and devices; parameters that get NaN, infinity, or values beyond
    their dtype are in the report. LayerNorm eps is no weight and so is not loaded: the original has
    1e-5 behind convolutions and 1e-6 in blocks and at stage ends (as we do), but transformers,
    CMNeXt (and CMX beside it) and StitchFusion compute with 1e-5 everywhere, and MMSegmentation
    with 1e-6. To reproduce their outputs, build the model with `ln_eps_block=1e-5` or
    `ln_eps_embed=1e-6`.

    Raises, leaving the model as it was, TypeError for what is no model, file or floating plain
    tensor; ValueError for a file that cannot be read, holds no such encoder (with what it seems to
    be), holds another variant, several encoders, or a parameter of another shape or without dense
    values, or, if strict, lacks one; ImportError for a .safetensors file without safetensors;
    OSError if there is no such file.

    Sources: the key names of NVlabs/SegFormer, huaaaliu/RGBX_Semantic_Segmentation,
    jamycheung/DELIVER, LiBingyu01/StitchFusion, open-mmlab/mmsegmentation,
    huggingface/pytorch-image-models, and transformers 4 and 5. `mit_b*.pth` and their conversions
    are under NVIDIA's non-commercial licence.
    """
    check_flags(strict=strict, adapt_channels=adapt_channels)
    encoders = _encoders(model)
    origin, content = read(path_or_state_dict)
    main = main_path(content)
    others = dict(tensors(content))
    own = {x.removeprefix(main): others.pop(x) for x in [*others] if x.startswith(main)}
    state = others | own
    everything = _find(state)
    if not everything:
        names = [*own] or [*others] or [*map(str, content)]
        without = ", none of which is a tensor" if content and not state else ""
        raise ValueError(f"{origin} has no Mix Transformer encoder: {_describe(names)}{without}")
    if prefix is None:
        found = _distribute(origin, _find(own) or everything, len(encoders))
        _check_order(origin, state, found, model)
    else:
        found = _choose(everything, prefix, len(encoders))

    plan: list[tuple[Tensor, Tensor]] = []
    loaded: list[str] = []
    missing: list[str] = []
    adapted: list[str] = []
    not_finite: list[str] = []
    overflowed: list[str] = []
    used: set[str] = set()
    for (path, encoder), theirs in zip(encoders, found, strict=True):
        parameters: dict[str, Tensor] = dict(encoder.named_parameters())
        _check_whole(path, encoder, parameters)
        sources = {name: _sources(theirs, name, parameters, state) for name in parameters}
        for source in {x.name for parts in sources.values() for x in parts} & state.keys():
            _check_plain(source, state[source])
        _check_variant(origin, state, theirs, encoder)
        for name, target in parameters.items():
            parts = sources[name]
            if not parts or not state.keys() >= {x.name for x in parts}:
                missing.append(path + name)
                continue
            _check_target(path + name, target)
            shape = [target.shape[0] // len(parts), *target.shape[1:]]
            values = []
            for source, third in parts:
                value, hint = state[source], ""
                if _differs_in_channels(name, value, target):
                    hint = "; adapt_channels=True sums or repeats input channels"
                    if adapt_channels:
                        value = _adapt_channels(value, target.shape[1])
                values.append(_rows(f"{source} (for {path}{name})", value, third, shape, hint))
            new = _joined(f"{parts[0].name} (for {path}{name})", values, target)
            plan.append((target, new))
            loaded.append(path + name)
            used.update(x.name for x in parts)
            if _differs_in_channels(name, state[parts[0].name], target):
                adapted.append(path + name)
            if not new.isfinite().all():
                finite = all(bool(value.double().isfinite().all()) for value in values)
                (overflowed if finite else not_finite).append(path + name)
    if missing and strict:
        raise ValueError(
            f"{origin} lacks {len(missing)} of {len(missing) + len(loaded)} encoder parameters: "
            f"{summary(missing)}; strict=False keeps those of the model"
        )
    # Nothing above writes into the model, and nothing here can fail.
    with torch.no_grad():
        for target, new in plan:
            target.copy_(new)

    prefixes = tuple(x.prefix for x in found)
    built_on = [x for pattern, x in BUILT_ON if any(re.search(pattern, name) for name in state)]
    return LoadReport(
        built_on[0] if built_on else found[0].layout.name,
        tuple(loaded),
        tuple(name for name in state if name not in used),
        tuple(missing),
        prefixes,
        tuple(x.prefix for x in everything if x.prefix not in prefixes),
        tuple(adapted),
        tuple(not_finite),
        tuple(overflowed),
    )


def _encoders(model: nn.Module) -> list[tuple[str, MixTransformer]]:
    """The encoders of a model, with the prefix of their parameters' names."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    encoders = [(f"{n}." if n else "", m) for n, m in modules if isinstance(m, MixTransformer)]
    if not encoders:
        raise TypeError(f"model must be an EQUISeg or a MixTransformer; got {type(model).__name__}")
    return encoders


def _find(state: Mapping[str, Tensor]) -> list[Found]:
    """Encoders of the file, by layout and by the prefix of their names, in alphabetical order."""
    found = []
    for layout in LAYOUTS:
        embedding, projection = layout.pattern("patch_embed"), layout.inside.get("proj", "proj")
        pattern = re.compile(rf"(.*?){embedding}\.{projection}\.(?:weight|bias)")
        prefixes = {match[1] for name in state if (match := pattern.fullmatch(name))}
        found += [Found(layout, prefix) for prefix in sorted(prefixes)]
    return found


def _choose(found: list[Found], prefix: str | Sequence[str], count: int) -> list[Found]:
    """The encoders below the prefixes asked for, one for each of the `count` of the model."""
    if not isinstance(prefix, str | Sequence):
        raise TypeError(
            f"prefix must be a string or a sequence of strings; got {type(prefix).__name__}"
        )
    wanted = [prefix] * count if isinstance(prefix, str) else list(prefix)
    if len(wanted) != count:
        raise ValueError(
            f"prefix must be one, or as many as the encoders of the model, which has {count}; "
            f"got {len(wanted)}"
        )
    by_prefix = {x.prefix: x for x in reversed(found)}
    for x in wanted:
        if x not in by_prefix:
            raise ValueError(f"prefix must be one of {quoted([*by_prefix][::-1])}; got {x!r}")
    return [by_prefix[x] for x in wanted]


def _distribute(origin: str, found: list[Found], count: int) -> list[Found]:
    """Which encoder of the file serves each of the `count` encoders of the model."""
    if len(found) == 1:
        return found * count
    prefixes = [x.prefix for x in found]
    if prefixes == [prefixes[0], f"{prefixes[0]}extra_"] and count <= 2:  # CMX
        return found[:count]
    stem = prefixes[0].removesuffix("0.")
    # Only numbers say which is which: "student." and "teacher." are not two modalities.
    if len(found) == count and prefixes == [f"{stem}{i}." for i in range(count)]:
        return found
    raise ValueError(
        f"{origin} must have one encoder, or numbered ones, as many as the model, which has "
        f"{count}; got {quoted(prefixes)}. Choose with prefix={prefixes[-1]!r}, say, or a "
        "sequence of them"
    )


def _check_order(
    origin: str, state: Mapping[str, Tensor], found: list[Found], model: nn.Module
) -> None:
    """Numbered encoders of an `EQUISeg` go by their numbers into the same modalities."""
    owners = [m for m in model.modules() if isinstance(m, EQUISeg)]
    numbered = re.fullmatch(r"(.*)encoder\.0\.", found[0].prefix)
    if numbered is None or len(owners) != 1 or len({x.prefix for x in found}) == 1:
        return
    sensors = sensors_of(state.get(f"{numbered[1]}_extra_state"))
    names, ours = None if sensors is None else sensors[0], owners[0].config.modalities
    if names is not None and names != ours:
        raise ValueError(
            f"{origin} must have encoders of the modalities {ours}, in this order; got {names}. "
            "Say which goes where with a sequence as prefix"
        )


def _sources(
    theirs: Found, name: str, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[Source]:
    """Where the file has a parameter of ours; a first convolution where it has one for as many
    channels, if it does, or else where it has that of all files."""
    match = FIRST.fullmatch(name)
    if match is None:
        return theirs.sources(name)
    channels = parameters[f"{name.removesuffix(match[1])}weight"].shape[1]
    same = f"{theirs.prefix}patch_embed1.others.{channels}."
    if f"{same}weight" in state:
        return [Source(same + match[1], None)]
    return theirs.sources(f"patch_embed1.proj.{match[1]}")


def _differs_in_channels(name: str, value: Tensor, target: Tensor) -> bool:
    """Whether the weight of a first convolution has other input channels and is else the same."""
    if FIRST.fullmatch(name) is None or value.dim() != 4 or target.dim() != 4:
        return False
    sizes = [[*x.shape[:1], *x.shape[2:]] for x in (value, target)]
    return sizes[0] == sizes[1] and value.shape[1] not in (0, target.shape[1])


def _check_plain(name: str, value: Tensor) -> None:
    """A tensor of the file is one that can be copied."""
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{name} must be a plain tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating; got {str(value.dtype).removeprefix('torch.')}")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be dense; got a {kind} tensor")
    if value.is_meta:
        raise ValueError(f"{name} must have values; in the file it is on the meta device")


def _check_whole(path: str, encoder: MixTransformer, parameters: Mapping[str, Tensor]) -> None:
    """The encoder still has the parameters that it was built with."""
    gone = [name for name in _names(encoder) if name not in parameters]
    if gone:
        raise TypeError(
            f"{path}{gone[0]} of the model must be an nn.Parameter; it has none of that name. Load "
            "the weights before the model is quantised, pruned or given adapters"
        )


def _names(encoder: MixTransformer) -> Iterator[str]:
    """The parameters of a Mix Transformer with so many blocks."""
    with torch.device("meta"):
        built = MixTransformer("b0", in_channels=encoder.in_channels)
    for name, _ in built.named_parameters():
        match = re.fullmatch(r"(block\d)\.(\d+)\.(.+)", name)
        if match is None:
            yield name
        elif match[2] == "0":
            for j in range(len(getattr(encoder, match[1]))):
                yield f"{match[1]}.{j}.{match[3]}"


def _check_target(name: str, target: Tensor) -> None:
    """A parameter of the model can be written into."""
    if type(target) is not nn.Parameter:
        raise TypeError(
            f"{name} of the model must be a plain nn.Parameter; got {type(target).__name__}. "
            "Load the weights before the model is sharded or quantised"
        )
    if target.is_meta:
        raise ValueError(f"{name} must have values; in the model it is on the meta device")
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in torch.inference_mode; load the weights there, too")
    if any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True)):
        raise ValueError(f"{name} of the model must have memory of its own; got an expanded tensor")


def _check_variant(
    origin: str, state: Mapping[str, Tensor], theirs: Found, encoder: MixTransformer
) -> None:
    """The encoder of the file has the channels and the number of blocks of `encoder`."""

    def rows(name: str, default: int) -> int:
        # What is missing is reported as such, later.
        weight = state.get(theirs.sources(name)[0].name)
        return default if weight is None else weight.shape[0] if weight.dim() else 0

    dims = encoder.dims
    channels = tuple(rows(f"patch_embed{s}.proj.weight", dims[s - 1]) for s in (1, 2, 3, 4))
    hidden = [rows(f"block{s}.0.mlp.fc1.weight", 4 * channels[s - 1]) for s in (1, 2, 3, 4)]
    if hidden == [x * c for x, c in zip((8, 8, 4, 4), channels, strict=True)]:
        raise ValueError(
            f"{origin} has the encoder of a PVTv2 of b0 to b4, whose Mix-FFN is 8, 8, 4 and 4 "
            "times as wide as the stages; that of a Mix Transformer is 4 times as wide in all of "
            "them, as in PVTv2 b5"
        )
    pattern = re.compile(rf"{re.escape(theirs.prefix)}{theirs.layout.pattern('block')}\.")
    blocks = {match.groups() for name in state if (match := pattern.match(name))}
    per_stage = Counter(int(stage) - theirs.layout.first for stage, _ in blocks)
    found = (channels, tuple(per_stage[s] for s in range(4)))
    ours = (dims, tuple(len(getattr(encoder, f"block{s}")) for s in (1, 2, 3, 4)))
    if found != ours:
        raise ValueError(
            f"{origin} has a different Mix Transformer: {_variant(*found)}; "
            f"the model is {_variant(*ours)}"
        )


def _variant(channels: tuple[int, ...], blocks: tuple[int, ...]) -> str:
    names = [name for name, sizes in VARIANTS.items() if sizes == (channels, blocks)]
    return f"{names[0] if names else 'no known variant'} (channels {channels}, blocks {blocks})"


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Weight `[N, K, h, w]` of a convolution -> `[N, channels, h, w]` fp64, in turn."""
    weight = weight.detach().double()
    theirs = weight.shape[1]
    turn = torch.arange(max(theirs, channels), device=weight.device) % min(theirs, channels)
    if channels < theirs:
        shape = (len(weight), channels, *weight.shape[2:])
        return weight.new_zeros(shape).index_add_(1, turn, weight)
    return weight[:, turn] / turn.bincount()[turn][:, None, None]


def _rows(label: str, value: Tensor, third: int | None, shape: list[int], hint: str) -> Tensor:
    """A tensor of the file, or a third of it, in the shape that our parameter has there."""
    whole = shape if third is None else [3 * shape[0], *shape[1:]]
    as_convolution = [*whole, 1, 1] if len(whole) == 2 else whole
    if list(value.shape) not in (whole, as_convolution):
        raise ValueError(f"{label} must have shape {whole}; got {list(value.shape)}{hint}")
    return (value if third is None else value.chunk(3)[third]).reshape(shape)


def _joined(label: str, values: list[Tensor], target: Tensor) -> Tensor:
    """The values below one another as a new tensor like `target`."""
    new = torch.empty_like(target, requires_grad=False)
    try:
        with torch.no_grad():
            for rows, value in zip(new.chunk(len(values)), values, strict=True):
                rows.copy_(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{label} cannot be copied into {target.dtype} on {target.device}: {error}"
        ) from error
    return new


def _describe(names: Sequence[str]) -> str:
    """What a file without a known encoder seems to be."""
    if not names:
        return "it is empty"
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in names):
            return f"it looks like {what}; it has {summary(names)}"
    return f"it has {summary(names)}"

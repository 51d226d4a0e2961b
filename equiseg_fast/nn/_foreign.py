"""What the layers of SegFormer look like in the code of others: names, and checks of structure.

`from_torch` of our layers and the rules of `equiseg_fast.integrations` both go by it. The
spellings: that of SegFormer's authors, which CMNeXt and most code for research share, and those of
`transformers` up to 4 and from 5.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ._plain import keeps_size, reduces


def find(module: Any, *names: str) -> Any:
    """What the module has under the first of these names that it knows, else None."""
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    return None


def drops(*dropouts: Any) -> bool:
    """Whether one of these (modules, probabilities, None) drops anything in training."""
    rates = (d if isinstance(d, float | int) else getattr(d, "p", 0) for d in dropouts)
    return any(rate > 0 for rate in rates)


def is_reduction(conv: Any, ratio: int) -> bool | str:
    """Whether a spatial reduction by this ratio is a convolution of that kernel and stride."""
    if ratio == 1:
        return True
    if is_convolution(conv) and reduces(conv) and conv.stride == (ratio, ratio):
        return True
    return f"its reduction {conv} is not a convolution of kernel and stride {ratio}"


def is_convolution(module: Any) -> bool:
    """Whether it is `nn.Conv2d`, or of a class that adds nothing to it (MMCV has one): no attribute
    that could make it compute something else later, as adapters have."""
    if type(module) is nn.Conv2d:
        return True
    return isinstance(module, nn.Conv2d) and vars(module).keys() <= vars(nn.Conv2d(1, 1, 1)).keys()


def is_depthwise(conv: Any, channels: int) -> bool | str:
    """Whether it is the 3x3 convolution of Mix-FFN on so many channels."""
    if is_convolution(conv) and keeps_size(conv, 3, channels) and conv.bias is not None:
        return True
    return f"{conv} is not a depthwise 3x3 convolution with padding 1 and bias"


def is_attention_v5(module: Any) -> bool | str:
    ratio = getattr(module, "sequence_reduction_ratio", None)
    if not isinstance(ratio, int) or find(module, "q_proj") is None:
        return False
    reduction = find(module, "sequence_reduction")
    return is_reduction(find(reduction, "sequence_reduction"), ratio)


def is_attention_v4(module: Any) -> bool | str:
    ratio = getattr(module, "sr_ratio", None)
    if not isinstance(ratio, int) or find(module, "query") is None:
        return False
    return is_reduction(find(module, "sr"), ratio)


def is_attention_mit(module: Any) -> bool | str:
    ratio = getattr(module, "sr_ratio", None)
    parts = find(module, "q"), find(module, "kv"), find(module, "head", "num_heads")
    if not isinstance(ratio, int) or None in parts:
        return False
    return is_reduction(find(module, "sr"), ratio)


def is_attention_mmseg(module: Any) -> bool | str:
    ratio, inner = getattr(module, "sr_ratio", None), find(module, "attn")
    if not isinstance(ratio, int) or not isinstance(inner, nn.MultiheadAttention):
        return False
    if type(inner) is not nn.MultiheadAttention or not module.batch_first or inner.batch_first:
        return f"its attention {type(inner).__name__} or the order of its axes is another"
    if inner.in_proj_weight is None or inner.bias_k is not None or inner.add_zero_attn:
        return "its keys or values have channels, a bias or a token of their own"
    return is_reduction(find(module, "sr"), ratio)


def is_attention_pvt(module: Any) -> bool | str:
    parts = find(module, "q"), find(module, "kv"), find(module, "proj"), find(module, "num_heads")
    if None in parts or not hasattr(module, "sr") or hasattr(module, "sr_ratio"):
        return False
    if find(module, "pool") is not None:
        return "it is linear: its keys are pooled to one size, and activated"
    return module.sr is None or is_reduction(module.sr, getattr(module.sr, "stride", (0,))[0])


def is_mix_ffn(module: Any) -> bool | str:
    return _is_mix_ffn(module, find(find(module, "dwconv"), "dwconv"))


def is_mix_ffn_pvt(module: Any) -> bool | str:
    verdict = _is_mix_ffn(module, find(module, "dwconv"))
    relu = find(module, "relu")
    if verdict is True and not isinstance(relu, nn.Identity | None):
        return f"it applies {relu} before the convolution"
    return verdict


def _is_mix_ffn(module: Any, conv: Any) -> bool | str:
    first, last = find(module, "fc1", "dense1"), find(module, "fc2", "dense2")
    if None in (first, last) or not isinstance(conv, nn.Conv2d):
        return False
    hidden = conv.out_channels
    if getattr(first, "out_features", 0) != hidden or getattr(last, "in_features", 0) != hidden:
        return f"{first} and {last} are not linear layers around {hidden} channels"
    verdict = is_depthwise(conv, hidden)
    return has_gelu(module) if verdict is True else verdict


def is_mix_ffn_mmseg(module: Any) -> bool | str:
    layers = find(module, "layers")
    if not isinstance(layers, nn.Sequential) or find(module, "dropout_layer") is None:
        return False
    if len(layers) != 6 or not all(isinstance(layers[i], nn.Conv2d) for i in (0, 1, 4)):
        return False
    first, conv, activation, *_, last = list(layers)[:5]
    for pointwise in (first, last):
        shape = (pointwise.kernel_size, pointwise.stride, pointwise.padding, pointwise.groups)
        same = shape == ((1, 1), (1, 1), (0, 0), 1) and pointwise.bias is not None
        if not same or not is_convolution(pointwise):
            return f"{pointwise} is not a 1x1 convolution with bias"
    verdict = is_depthwise(conv, first.out_channels)
    return _has_gelu(activation) if verdict is True else verdict


def has_gelu(module: Any) -> bool | str:
    """Whether the activation of a feed-forward module is the exact GELU, as far as can be seen."""
    return _has_gelu(activation(module))


def _has_gelu(activation: Any) -> bool | str:
    return _is_gelu(activation) or f"its activation {activation} is not the exact GELU"


def activation(module: Any) -> Any:
    """None if it is written out in the module's `forward`."""
    return find(module, "activation_fn", "intermediate_act_fn", "act")


def _is_gelu(activation: Any) -> bool:
    if activation is None:
        return True
    if isinstance(activation, nn.Module):
        if any(True for _ in activation.parameters()):
            return False
        activation = activation.forward  # not its hooks
    x = torch.linspace(-4, 4, 99, dtype=torch.float64, device="cpu")
    return torch.allclose(activation(x), F.gelu(x))


# ---- for from_torch: which child is which -------------------------------------------------------


class Spelling(NamedTuple):
    """Where the children of one of our layers are in somebody else's: our path -> theirs."""

    origin: str
    children: Mapping[str, str | tuple[str, ...]]
    """Several paths: ours is all of them, joined."""
    optional: tuple[str, ...] = ()
    """Our paths that may be missing."""


_REDUCTION = ("sr", "norm")
ATTENTION = (
    Spelling(
        "SegFormer's authors",
        {"q": "q", "kv": "kv", "proj": "proj", "sr": "sr", "norm": "norm"},
        _REDUCTION,
    ),
    Spelling(
        "transformers 5",
        {
            "q": "q_proj",
            "kv": ("k_proj", "v_proj"),
            "proj": "o_proj",
            "sr": "sequence_reduction.sequence_reduction",
            "norm": "sequence_reduction.layer_norm",
        },
        _REDUCTION,
    ),
    Spelling(
        "transformers 4",
        {
            "q": "self.query",
            "kv": ("self.key", "self.value"),
            "proj": "output.dense",
            "sr": "self.sr",
            "norm": "self.layer_norm",
        },
        _REDUCTION,
    ),
    Spelling(
        "transformers 4, without the output projection",
        {"q": "query", "kv": ("key", "value"), "sr": "sr", "norm": "layer_norm"},
        _REDUCTION,
    ),
)
MIX_FFN = (
    Spelling("SegFormer's authors", {"fc1": "fc1", "dwconv.dwconv": "dwconv.dwconv", "fc2": "fc2"}),
    Spelling(
        "transformers 4", {"fc1": "dense1", "dwconv.dwconv": "dwconv.dwconv", "fc2": "dense2"}
    ),
)
_STAGES = (1, 2, 3, 4)
HEAD = (
    Spelling(
        "SegFormer's authors",
        {f"linear_c{s}.proj": f"linear_c{s}.proj" for s in _STAGES}
        | {n: n for n in ("linear_fuse.conv", "linear_fuse.bn", "linear_pred")},
    ),
    *(
        Spelling(
            f"transformers {version}",
            {f"linear_c{s}.proj": f"{stages}.{s - 1}.proj" for s in _STAGES}
            | {
                "linear_fuse.conv": "linear_fuse",
                "linear_fuse.bn": "batch_norm",
                "linear_pred": "classifier",
            },
        )
        for version, stages in ((4, "linear_c"), (5, "linear_projections"))
    ),
)
MIXER_CHILDREN = (
    "norm1", "attn.conv0", "attn.conv4", "c_nets.0", "norm2", "mlp.fc1", "mlp.dwconv.dwconv",
    "mlp.fc2",
)  # fmt: skip
MIXER = (Spelling("CMNeXt", {name: name for name in MIXER_CHILDREN}),)


UNUSED = ("conv_seg",)
"""What modules of others own and never use: the head of SegFormer's authors."""


def child(module: Any, path: str) -> Any:
    """The submodule at a dotted path, None if there is none."""
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


def spelling_of(module: object, layer: str, spellings: tuple[Spelling, ...]) -> Spelling:
    """Which spelling the module is in; raises TypeError that says what is missing or too much."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")

    def missing(spelling: Spelling) -> list[str]:
        needed = (p for name, p in spelling.children.items() if name not in spelling.optional)
        paths = (q for p in needed for q in ((p,) if isinstance(p, str) else p))
        return [path for path in paths if child(module, path) is None]

    best = min(spellings, key=lambda s: len(missing(s)))
    if lacking := missing(best):
        raise TypeError(
            f"module must have the children of {layer} as {best.origin} name them; "
            f"{type(module).__name__} lacks {', '.join(lacking)}"
        )
    return best


def demand(layer: str, verdict: bool | str) -> None:
    """TypeError unless the verdict on the structure of a module is True."""
    if verdict is not True:
        raise TypeError(f"module cannot become a {layer}: {verdict or 'its structure is another'}")


def demand_no_dropout(module: Any, *names: str) -> None:
    """TypeError if something under these names drops anything, which our layers never do."""
    for name in names:
        dropout = find(module, name)
        if drops(dropout):
            raise TypeError(f"module must not drop anything; its {name} is {dropout}")

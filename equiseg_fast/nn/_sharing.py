"""How a layer takes over the parameters of a layer that somebody else wrote, for `from_torch`.

The parameters stay the same objects: an optimiser of the original moves ours, and the other way
round. Where ours is one parameter and theirs are several, `JoinedParameter` stands between.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.ops._layout import linear

from ._foreign import UNUSED, Spelling, child

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")


def adopt(
    layer: nn.Module, module: nn.Module, spelling: Spelling, without_bias: Sequence[str] = ()
) -> None:
    """Share everything that the spelling names, and put `layer` into the mode of the module.

    without_bias: our children that may lack a bias. Raises TypeError for what does not fit, and for
    parameters of the module that the layer has no place for.
    """
    for path, names in spelling.children.items():
        if path in spelling.optional and not _has(layer, path):
            continue
        if isinstance(names, str):
            share(layer, path, child(module, names), names, without_bias=path in without_bias)
        else:
            layer.set_submodule(path, _joined(layer.get_submodule(path), module, names))
    used = {id(p) for p in layer.parameters()}
    extra = [
        name
        for name, p in module.named_parameters()
        if id(p) not in used and not name.startswith(UNUSED)
    ]
    if extra:
        raise TypeError(
            f"{type(layer).__name__} has no place for {', '.join(extra)} of {type(module).__name__}"
        )
    layer.train(module.training)


def _has(layer: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


def _joined(ours: Any, module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Their linear layers as one, which has to be as wide as ours."""
    parts = []
    for name in names:
        one = nn.Linear(ours.in_features, ours.out_features // len(names), device="meta")
        share(one, "", child(module, name), name, without_bias=True)
        parts.append(one)
    return JoinedLinear(parts)


def share(
    layer: nn.Module, path: str, theirs: Any, label: str, *, without_bias: bool = False
) -> None:
    """Give the module of `layer` at `path` the parameters and buffers of theirs, and its eps.

    label: what theirs is called where it comes from; without_bias: it may lack one. Where theirs is
    an `nn.SyncBatchNorm`, ours becomes one of the same processes. Raises TypeError if it is no
    module of the same kind, sizes and settings.
    """
    ours = layer.get_submodule(path)
    kind = next(c for c in _KINDS if isinstance(ours, c))
    kinds = (kind, nn.SyncBatchNorm) if kind is nn.BatchNorm2d else (kind,)
    if not isinstance(theirs, kinds):
        raise TypeError(f"{label} must be an nn.{kind.__name__}; got {type(theirs).__name__}")
    for tensors in ("_parameters", "_buffers"):
        for name, expected in getattr(ours, tensors).items():
            if expected is None:
                continue
            tensor = getattr(theirs, tensors).get(name)
            if tensor is None and not (name == "bias" and without_bias):
                raise TypeError(f"{label}.{name} is missing, which {type(layer).__name__} needs")
            if tensor is not None and tensor.shape != expected.shape:
                raise TypeError(
                    f"{label}.{name} must have shape {list(expected.shape)}; "
                    f"got {list(tensor.shape)}"
                )
            getattr(ours, tensors)[name] = tensor
    _check_settings(ours, theirs, label)
    for constant in ("eps", "momentum"):
        if hasattr(ours, constant):
            setattr(ours, constant, getattr(theirs, constant))
    if isinstance(theirs, nn.SyncBatchNorm):
        group = theirs.process_group
        layer.set_submodule(path, nn.SyncBatchNorm.convert_sync_batchnorm(ours, group))


def _check_settings(ours: nn.Module, theirs: Any, label: str) -> None:
    """What else than tensors decides the function: how a convolution slides, a norm's momentum."""
    for setting in _CONV_SETTINGS:
        if hasattr(ours, setting):
            needed, found = getattr(ours, setting), getattr(theirs, setting)
            if found != needed:
                raise TypeError(f"{label} must have {setting} {needed!r}; got {found!r}")
    if hasattr(ours, "momentum") and theirs.momentum is None:
        raise TypeError(
            f"{label} must have a number as momentum; got None, a mean over all batches so far"
        )


class JoinedParameter(nn.Module):
    """Several parameters that a layer of ours has as one, of the given shape; a call returns it.

    They are concatenated along their first dimension. The state dict has the one, under the name of
    this module, and it is a copy: writing into it does not reach the parts, `load_state_dict` does.
    `replace_by_joined` puts this module in the place of a parameter.
    """

    def __init__(self, parts: Sequence[nn.Parameter], shape: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(parts)
        self.shape = torch.Size(shape)
        self.register_state_dict_post_hook(_join_state)

    def forward(self) -> Tensor:
        return torch.cat(list(self.parts)).view(self.shape)

    def split(self, one: Tensor) -> list[Tensor]:
        """What the parts are if the one is this."""
        sizes = [len(p) for p in self.parts]
        return list(one.reshape(sum(sizes), *self.parts[0].shape[1:]).split(sizes))


def replace_by_joined(owner: nn.Module, name: str, parts: Sequence[Any]) -> None:
    """Put the parts in the place of the parameter `name` of the owner, now a module to call."""
    shape = owner.get_parameter(name).shape
    delattr(owner, name)
    owner.add_module(name, JoinedParameter(parts, shape))
    if not owner._load_state_dict_pre_hooks:
        owner.register_load_state_dict_pre_hook(_split_state)


def _join_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    parts = [state.pop(f"{prefix}parts.{i}") for i in range(len(module.parts))]
    state[prefix.removesuffix(".")] = torch.cat(parts).view(module.shape)


def _split_state(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, module in owner.named_children():
        key = prefix + name
        if isinstance(module, JoinedParameter) and key in state:
            one = state[key]
            if one.shape == module.shape:
                del state[key]
                parts = enumerate(module.split(one))
                state.update({f"{key}.parts.{i}": part for i, part in parts})


class JoinedLinear(nn.Module):
    """Linear layers of the same input as one, the first one's channels first.

    Its state dict is that of one linear layer: "weight", and "bias" if all have one.
    """

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        width = parts[0].in_features
        out = sum(p.out_features for p in parts)
        one = nn.Linear(width, out, device="meta")
        self.weight: Any = one.weight
        replace_by_joined(self, "weight", [p.weight for p in parts])
        self.bias: Any = None
        if all(p.bias is not None for p in parts):
            self.bias = one.bias
            replace_by_joined(self, "bias", [p.bias for p in parts])

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight(), None if self.bias is None else self.bias())

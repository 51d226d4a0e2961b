"""Whether a layer may read the parameters of its children instead of calling them.

The fused path goes around children. That is right only where a call of each child would do exactly
what its class says: no hooks, no `forward` of the instance, and no other class in its place, which
adapters, parametrisations, quantisation, sharding and offloading all come with. Everywhere else the
children are called. The answer is found anew in every call, because all of that can come and go.
"""

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

_PLAIN: set[type[nn.Module]] = {
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.LayerNorm,
    nn.Linear,
    nn.SyncBatchNorm,
}
"""Classes whose `forward` is known; their subclasses are others."""

_EVERYWHERE = (
    _module._global_forward_pre_hooks,
    _module._global_forward_hooks,
    _module._global_backward_pre_hooks,
    _module._global_backward_hooks,
)
"""Hooks of all modules; PyTorch changes these dictionaries in place."""

Kind = TypeVar("Kind", bound=type[nn.Module])


def plain(kind: Kind) -> Kind:
    """Decorate a class of ours whose `forward` the layers above it may write out."""
    _PLAIN.add(kind)
    return kind


def is_plain(*modules: nn.Module) -> bool:
    """Whether a call of each module does what its class does and nothing else, of a known class."""
    for module in modules:
        if type(module) not in _PLAIN:
            return False
    return not hooked(*modules)


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules, of whatever class, does more than its class says.

    True with forward or backward hooks, of its own or of all modules, and with a `forward` set on
    the instance.
    """
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    for hooks in _EVERYWHERE:
        if hooks and not all(map(_only_tracks, hooks.values())):
            return True
    return False


def _only_tracks(hook: object) -> bool:
    """Whether a hook is one by which counters of PyTorch (of FLOPs, of memory) know where they are:
    they should count what runs without them."""
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


def plain_parameters(*modules: nn.Module) -> Any:
    """Weight and bias of each module in turn, a list of tensors to be given to an operation; None
    if one of the modules is not plain or lacks either."""
    if not is_plain(*modules):
        return None
    found = []
    for module in modules:
        for parameter in (module.weight, module.bias):
            if parameter is None:
                return None
            found.append(parameter)
    return found


def keeps_size(conv: Any, side: int, groups: int = 1) -> bool:
    """Whether a plain convolution has a kernel side x side in so many groups, and returns a map of
    the size that it takes: every pixel, with zeros around the map."""
    return (
        conv.kernel_size == (side, side)
        and conv.stride == (1, 1)
        and conv.padding == (side // 2, side // 2)
        and conv.dilation == (1, 1)
        and conv.groups == groups
        and conv.padding_mode == "zeros"
    )


def reduces(conv: Any) -> bool:
    """Whether a plain convolution has its kernel as stride, so that its windows are tiles."""
    side, _ = conv.stride
    return (
        conv.kernel_size == conv.stride == (side, side)
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def demand_plain(layer: nn.Module, *paths: str) -> None:
    """RuntimeError unless the modules of the layer at these paths are plain; outer ones first."""
    for path in paths:
        module = layer.get_submodule(path)
        if not is_plain(module):
            raise RuntimeError(
                f"folding multiplies weights, so {path} of {type(layer).__name__} must be a plain "
                "module without hooks, parametrisations or adapters (remove or merge them); got "
                f"{type(module).__name__}{' with hooks' if type(module) in _PLAIN else ''}"
            )

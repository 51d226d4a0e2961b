"""Initialisation of SegFormer (arXiv 2105.15203), as its authors' code means it."""

from math import prod, sqrt

from torch import Tensor, nn


def normal_(x: Tensor, std: float) -> None:
    """Fill with normal values; but on the meta device, which has none, PyTorch loads its compiler
    for that, which takes seconds."""
    if not x.is_meta:
        nn.init.normal_(x, std=std)


def init_module(module: nn.Module) -> None:
    """For `Module.apply`: linear truncated normal 0.02, convolutions by fan-out, biases 0.

    Other modules stay as they are. Raises TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        fan_out = prod(module.kernel_size) * module.out_channels // module.groups
        normal_(module.weight, sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)

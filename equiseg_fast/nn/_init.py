"""Initialisation of SegFormer (arXiv 2105.15203), as its authors' code means it."""

from math import prod, sqrt

from torch import nn


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
        nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)

"""What all layers have in common."""

from torch import nn

from equiseg_fast.ops import _checks


class Layer(nn.Module):
    """An `nn.Module` that refuses TorchScript at once, in the words of the operations."""

    # What a module calls instead of `forward` while `torch.jit.trace` is at work, ..
    _slow_forward = _checks.refuse_torchscript
    # .. and what `torch.jit.script` asks for first.
    __prepare_scriptable__ = _checks.refuse_torchscript

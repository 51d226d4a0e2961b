"""Layers: parameters under the names of the field, and one call of an operation each.

Features are tokens `[B, L, C]`, and then come with height and width, or a map `[B, C, H, W]`, and
then do not; modality-major ones are `[M, B, L, C]` or `[M, B, C, H, W]`. A layer returns the form
it was given. A map in channels-last memory costs nothing, any other one a copy. `from_torch` of a
layer takes over the parameters of the same layer in somebody else's code.

The fused path reads the parameters of children. A child that is not exactly the plain module it was
(hooks, a `forward` of its own, pruned, parametrised, quantised, sharded, wrapped in an adapter) is
called instead, on tokens if it is a linear layer or a LayerNorm, on a map if it is a convolution or
a batch norm.
"""

from ._init import init_module
from .attention import CrossModalAttention, EfficientSelfAttention
from .block import CrossModalBlock
from .common import DepthwiseConv, DropPath, MixFFN, PatchEmbed
from .head import SegmentationHead
from .pooling_mixer import ParallelPoolingMixer
from .query_hub import SelfQueryHub
from .self_guided import PrototypeLoss, SelfGuidedGate

__all__ = [
    "CrossModalAttention",
    "CrossModalBlock",
    "DepthwiseConv",
    "DropPath",
    "EfficientSelfAttention",
    "MixFFN",
    "ParallelPoolingMixer",
    "PatchEmbed",
    "PrototypeLoss",
    "SegmentationHead",
    "SelfGuidedGate",
    "SelfQueryHub",
    "init_module",
]

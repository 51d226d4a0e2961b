"""Layers: parameters under the names of the field, and one call of an operation each."""

from ._init import init_module
from .attention import CrossModalAttention, EfficientSelfAttention
from .block import CrossModalBlock
from .common import DepthwiseConv, DropPath, MixFFN, PatchEmbed, TokenBatchNorm
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
    "TokenBatchNorm",
    "init_module",
]

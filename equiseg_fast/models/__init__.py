"""Models: layers put together."""

from .config import EQUISegConfig
from .equiseg import EQUISeg, StageOutput
from .mix_transformer import MixTransformer
from .report import LoadReport
from .weights import load_backbone

__all__ = [
    "EQUISeg",
    "EQUISegConfig",
    "LoadReport",
    "MixTransformer",
    "StageOutput",
    "load_backbone",
]

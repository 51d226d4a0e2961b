"""Models: layers put together."""

from .config import EQUISegConfig
from .equiseg import EQUISeg, StageOutput
from .mix_transformer import MixTransformer
from .weights import LoadReport, load_backbone

__all__ = [
    "EQUISeg",
    "EQUISegConfig",
    "LoadReport",
    "MixTransformer",
    "StageOutput",
    "load_backbone",
]

"""Models: layers put together."""

from .config import EQUISegConfig
from .equiseg import EQUISeg, StageOutput
from .mix_transformer import MixTransformer

__all__ = ["EQUISeg", "EQUISegConfig", "MixTransformer", "StageOutput"]

"""Training of EQUISeg: what `python -m equiseg_fast.train` does, for programs."""

try:
    import rich as _rich  # noqa: F401
    import yaml as _yaml  # noqa: F401
except ImportError as error:
    raise ImportError('training needs more packages; pip install "equiseg-fast[train]"') from error

from .config import TrainConfig
from .loop import Outcome, train

__all__ = ["Outcome", "TrainConfig", "train"]

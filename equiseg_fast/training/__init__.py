"""Training of EQUISeg: what `python -m equiseg_fast.train` does, for programs."""

from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from .loop import Outcome, train

__all__ = ["Outcome", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    # Configurations need fewer packages, and less time, than what is done with them.
    if name in ("Outcome", "train"):
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

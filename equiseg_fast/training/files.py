"""Files of a run: written so that a kill leaves the old one or the new one, and read without
running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from equiseg_fast._files import replace_file

CHECKPOINT, CONFIG, FAILED, METRICS = "checkpoint.pt", "config.yaml", "failed.pt", "metrics.jsonl"
MODEL, TENSORBOARD = "model", "tensorboard"
FORMAT = 1


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, for `load`."""
    replace_file(path, lambda file: _save(content, file))


def _save(content: Mapping[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(dict(content), file)
    except RuntimeError as error:
        # PyTorch covers the error of the file with one of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises ValueError naming a file that is something else, or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is damaged, or no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of equiseg_fast")
    return content

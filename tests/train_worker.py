"""What `test_train.py` runs in processes of its own, which can be killed."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from equiseg_fast.train import main


def run(arguments: list[str], output: Path, environment: Mapping[str, str]) -> None:
    """The command line, with what it prints in a file."""
    os.environ.update(environment)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(main(arguments))

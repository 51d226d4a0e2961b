"""What a training will do, found out before it starts."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from equiseg_fast.data import Augment, SensorDataset, batches
from equiseg_fast.models import EQUISegConfig

from .config import TrainConfig, flat
from .distributed import Place

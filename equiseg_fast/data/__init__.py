"""Data: sensors, samples and datasets of them. Importing this reads no file and needs no library
for images."""

from .augment import Augment
from .degradations import DEGRADATIONS, Degraded, degradations_for, degrade
from .deliver import DeLiVER
from .folder import FolderDataset
from .loading import batches
from .muses import MUSES
from .pictures import colour_labels, contact_sheet, palette_of, show
from .samples import Batch, Sample, SensorDataset, collate, normalise
from .sensors import Sensor, camera, sensor
from .spec import DataConfig
from .synthetic import SyntheticScenes

__all__ = [
    "DEGRADATIONS",
    "MUSES",
    "Augment",
    "Batch",
    "DataConfig",
    "DeLiVER",
    "Degraded",
    "FolderDataset",
    "Sample",
    "Sensor",
    "SensorDataset",
    "SyntheticScenes",
    "batches",
    "camera",
    "collate",
    "colour_labels",
    "contact_sheet",
    "degradations_for",
    "degrade",
    "normalise",
    "palette_of",
    "sensor",
    "show",
]

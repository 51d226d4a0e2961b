"""Data: sensors, samples and datasets of them. Importing this reads no file and needs no library
for images."""

from .augment import Augment
from .loading import batches
from .pictures import colour_labels, contact_sheet, palette_of, show
from .samples import Batch, Sample, SensorDataset, collate, normalise
from .sensors import Sensor, camera

__all__ = [
    "Augment",
    "Batch",
    "Sample",
    "Sensor",
    "SensorDataset",
    "batches",
    "camera",
    "collate",
    "colour_labels",
    "contact_sheet",
    "normalise",
    "palette_of",
    "show",
]

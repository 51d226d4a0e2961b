"""DeLiVER: synthetic street scenes of four sensors in five weathers with failing sensors.

Delivering Arbitrary-Modal Semantic Segmentation, arXiv 2303.01480; layout, classes, colours and
encoding of the labels as in github.com/jamycheung/DELIVER.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from equiseg_fast.ops._checks import check_choice

from .files import read_labels
from .folder import SPLITS, Missing, SceneFiles, check_cases, choose, join
from .sensors import Sensor, camera, named

CASES = (
    ("cloud", "fog", "night", "rain", "sun"),
    ("motionblur", "overexposure", "underexposure", "lidarjitter", "eventlowres"),
)
"""Weathers, and the sensors that fail."""

SENSORS = (
    camera("rgb"),
    Sensor("depth", "depth"),
    Sensor("event", "event"),
    Sensor("lidar", "lidar"),
)
"""As published recipes have them: the statistics of ImageNet for the camera, [0, 1] elsewhere."""

_FILES = {
    "rgb": ("img", "_rgb_front"),
    "depth": ("hha", "_depth_front"),
    "event": ("event", "_event_front"),
    "lidar": ("lidar", "_lidar_front"),
}
"""Folder of a sensor, and how the names of its files end."""

CLASSES = {
    "Building": (70, 70, 70),
    "Fence": (100, 40, 40),
    "Other": (55, 90, 80),
    "Pedestrian": (220, 20, 60),
    "Pole": (153, 153, 153),
    "RoadLine": (157, 234, 50),
    "Road": (128, 64, 128),
    "SideWalk": (244, 35, 232),
    "Vegetation": (107, 142, 35),
    "Cars": (0, 0, 142),
    "Wall": (102, 102, 156),
    "TrafficSign": (220, 220, 0),
    "Sky": (70, 130, 180),
    "Ground": (81, 0, 81),
    "Bridge": (150, 100, 100),
    "RailTrack": (230, 150, 140),
    "GroundRail": (180, 165, 180),
    "TrafficLight": (250, 170, 30),
    "Static": (110, 190, 160),
    "Dynamic": (170, 120, 50),
    "Water": (45, 60, 150),
    "Terrain": (145, 170, 100),
    "TwoWheeler": (0, 0, 230),
    "Bus": (0, 60, 100),
    "Truck": (0, 0, 70),
}
"""The 25 classes in the order of their numbers, and their colours."""


class DeLiVER(SceneFiles):
    """One split of DeLiVER, as it is unpacked:

        root/{img,hha,event,lidar,semantic}/<weather>/<split>/<scene>/<frame>_<kind>_front.png

    is the scene "<weather>/<scene>/<frame>". Complete splits have 3983, 2005 and 1897 scenes of
    1042 x 1042 pixels.

    split: "train", "val" or "test". modalities: of "rgb", "depth", "event" and "lidar", by name
    with the statistics of `SENSORS`, or as Sensor with others. Depth is read from `hha`, which has
    three channels, as all published numbers have it. Events of low resolution are brought to the
    size of the others, each pixel as its nearest.
    cases: weathers (cloud, fog, night, rain, sun) and failing sensors (motionblur, overexposure,
    underexposure, lidarjitter, eventlowres) to choose; scenes of any of the weathers named and any
    of the failures named. None is all.
    missing: as in `FolderDataset`.

    In the files 1 to 25 are the classes; 0 and 255 are ignored, and become 255.
    """

    nearest = ("event",)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        modalities: Sequence[Sensor | str] = ("rgb", "depth", "event", "lidar"),
        *,
        cases: Sequence[str] | None = None,
        missing: Missing = "error",
    ) -> None:
        check_choice("split", split, SPLITS)
        sensors = named("modalities", modalities, SENSORS)
        wanted = check_cases(cases, *CASES)
        files = {
            sensor.name: choose(root, *_FILES[sensor.name], split, 1, wanted) for sensor in sensors
        }
        labels = choose(root, "semantic", "_semantic_front", split, 1, wanted)
        scenes = join(files, labels, missing)
        super().__init__(scenes, sensors, tuple(CLASSES), 255, tuple(CLASSES.values()))

    def read_labels(self, path: Path) -> Tensor:
        """Labels are in the first channel, 0 and 255 for ignored pixels, and classes from 1."""
        labels = read_labels(path, first_channel=True)
        return (labels - 1).where((labels != 0) & (labels != 255), 255)

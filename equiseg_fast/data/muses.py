"""MUSES: street scenes in adverse weather with a camera, an event camera and a lidar.

MUSES: The Multi-Sensor Semantic Perception Dataset for Driving under Uncertainty, arXiv
2401.12761; layout and projections as in github.com/timbroed/MUSES, statistics of the sensors as in
github.com/timbroed/CAFuser.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from equiseg_fast.ops._checks import check_choice

from .files import read_sensor
from .folder import SPLITS, Missing, SceneFiles, check_cases, choose, join
from .sensors import Sensor, camera, named

CASES = (
    ("clear", "fog", "rain", "snow"),
    ("day", "night"),
)
"""Weathers, and times."""

SENSORS = (
    camera("rgb"),
    Sensor("event", "event", 1.0, (0.1258, 0.1273, 0.0), (0.5442, 0.4763, 1.0)),
    Sensor("lidar", "lidar", 1.0, (4.917, 6.149, 0.270), (13.347, 17.638, 1.232)),
)
"""Events are counts (positive, negative, 0); lidar is (range, intensity, height), 0 where there is
no point."""

_FILES = {
    "rgb": ("frame_camera", "_frame_camera"),
    "event": ("projected_to_rgb/event_camera", "_event_camera"),
    "lidar": ("projected_to_rgb/lidar", "_lidar"),
}
"""Folder of a sensor, and how the names of its files end."""

CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""The 19 classes of Cityscapes in the order of their numbers, and their colours."""


class MUSES(SceneFiles):
    """One split of MUSES, as it is unpacked, with the projections that its SDK writes:

        root/frame_camera/<split>/<weather>/<time>/<scene>_frame_camera.png
        root/projected_to_rgb/event_camera/<split>/<weather>/<time>/<scene>_event_camera.npz
        root/projected_to_rgb/lidar/<split>/<weather>/<time>/<scene>_lidar.npz
        root/gt_semantic/<split>/<weather>/<time>/<scene>_gt_labelTrainIds.png

    is the scene "<weather>/<time>/<scene>". Complete splits have 1500, 250 and 750 scenes of
    1080 x 1920 pixels. Projections may be NPZ, NPY or PNG, which the SDK writes in steps of 1/150.

    split: "train", "val" or "test", whose labels are not published: it has them if they are there.
    modalities: of "rgb", "event" and "lidar", by name with the statistics of `SENSORS`, or as
    Sensor with others.
    cases: weathers (clear, fog, rain, snow) and times (day, night) to choose; scenes of any of the
    weathers named at any of the times named. None is all.
    missing: as in `FolderDataset`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        modalities: Sequence[Sensor | str] = ("rgb", "event", "lidar"),
        *,
        cases: Sequence[str] | None = None,
        missing: Missing = "error",
    ) -> None:
        check_choice("split", split, SPLITS)
        sensors = named("modalities", modalities, SENSORS)
        wanted = check_cases(cases, *CASES)
        files = {}
        for sensor in sensors:
            folder, ending = _FILES[sensor.name]
            _check_projection(root, folder)
            files[sensor.name] = choose(root, folder, ending, split, 0, wanted)
        labels = None
        if split != "test" or (Path(root) / "gt_semantic" / split).is_dir():
            labels = choose(root, "gt_semantic", "_gt_labelTrainIds", split, 0, wanted)
        scenes = join(files, labels, missing)
        super().__init__(scenes, sensors, tuple(CLASSES), 255, tuple(CLASSES.values()))

    def read_sensor(self, path: Path, sensor: Sensor) -> Tensor:
        """Values as the SDK computed them. Its PNGs have the channels in reverse order, as OpenCV
        writes them, and lidar there is (value + 100) * 150."""
        if sensor.name == "rgb" or path.suffix.lower() != ".png":
            return super().read_sensor(path, sensor)
        values = read_sensor(path, sensor.channels).flip(0)
        if sensor.name != "lidar":
            return values
        if values.max() < 256:
            raise ValueError(f"{path}: must have 16 bits, as the SDK of MUSES writes it; got 8")
        return values / 150 - 100


def _check_projection(root: str | os.PathLike[str], folder: str) -> None:
    above, _, name = folder.rpartition("/")
    if above and not (Path(root) / folder).is_dir():
        raw = "" if (Path(root) / name).is_dir() else f", for which {name} must be downloaded"
        raise ValueError(
            f"{Path(root) / folder}: must hold {name} as images of the camera; there is no such "
            f"folder. The SDK of MUSES writes it{raw}: python scripts/project_sensors_to_rgb.py "
            f"--muses_root {root} --event_camera --lidar --motion_compensation "
            "--enlarge_event_camera_points --enlarge_lidar_points"
        )

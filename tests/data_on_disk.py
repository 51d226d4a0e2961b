"""Files of sensors as tests write them."""

from pathlib import Path

import numpy as np

H, W = 4, 6


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, array)
    else:
        from PIL import Image

        Image.fromarray(array).save(path)


def picture(value: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.full(shape or (H, W, 3), value, dtype)

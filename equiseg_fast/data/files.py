"""Reading files of sensors and labels: PNG, JPEG, NPY and NPZ to tensors. No file can run code."""

import io
import os
import struct
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".npz")
"""Of files that can be read, in lower case; upper case is read too."""

_INSTALL = 'reading {} needs {}: pip install "equiseg-fast[train]"'
_PNG = b"\x89PNG\r\n\x1a\n"
_GRAY, _WITH_ALPHA = 0, (4, 6)  # colour types of PNG
_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}  # of Pillow


def read_sensor(path: str | os.PathLike[str], channels: int) -> Tensor:
    """The values of a sensor file, as they are in the file: fp32 `[channels, H, W]`.

    PNG of 1 to 16 bits and JPEG: colours in the order red, green, blue, palettes resolved; JPEG is
    turned upright where its EXIF says how, as viewers and labelling tools show it. NPY, and NPZ
    with a single array: `[H, W]` or `[H, W, C]`, integers or floats. NaN, the usual mark of no
    measurement, becomes 0, which is what marks it in PNG.

    A file with another number of channels is taken where nothing is lost: alpha is dropped, one
    channel becomes three equal ones, and three equal channels become one.

    Raises ValueError naming the file where it cannot be read, is truncated, holds infinity, or has
    other channels; FileNotFoundError where there is none.
    """
    values, alpha = _read(path, as_labels=False)
    if values.ndim == 2:
        values = values[:, :, None]
    found = values.shape[2]
    if alpha and found != channels:
        values = values[:, :, :-1]
    if values.shape[2] == 1 and channels == 3:
        values = values.repeat(3, axis=2)
    elif values.shape[2] == 3 and channels == 1 and (values == values[:, :, :1]).all():
        values = values[:, :, :1]
    if values.shape[2] != channels:
        raise ValueError(
            f"{path}: must have {channels} channels, as its sensor is declared; got {found} in "
            f"[H, W, C] = {[*values.shape[:2], found]}"
        )
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        x = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32))
    if values.dtype.kind == "f":
        x = torch.where(x.isnan(), 0.0, x)
        if not x.isfinite().all():
            raise ValueError(
                f"{path}: must hold finite numbers, or NaN where nothing was measured; got "
                f"infinity in {int((~x.isfinite()).sum())} values"
            )
    return x


def read_labels(path: str | os.PathLike[str], *, first_channel: bool = False) -> Tensor:
    """The labels in a file, as they are in the file: int64 `[H, W]`.

    PNG in gray of 1 to 16 bits, or with a palette, whose indices are the labels; NPY, and NPZ with
    a single array, of integers `[H, W]`. Colour images are labels only where their channels are
    equal, or with `first_channel`, which takes the first and leaves the others.

    Raises ValueError naming the file where it cannot be read or holds something else;
    FileNotFoundError where there is none.
    """
    values, alpha = _read(path, as_labels=True)
    if values.dtype.kind == "f":
        raise ValueError(f"{path}: labels must be integers; got {values.dtype}")
    if values.ndim == 3:
        colours = values[:, :, :-1] if alpha and values.shape[2] > 1 else values
        if not first_channel and (colours != colours[:, :, :1]).any():
            raise ValueError(
                f"{path}: labels must be one number per pixel, gray or with a palette; got a "
                f"colour image"
            )
        values = values[:, :, 0]
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 and (values >> 63).any():
        raise ValueError(f"{path}: labels must be integers of 64 bits; got {values.max()}")
    return torch.from_numpy(values.astype("int64"))


def check_labels(
    labels: Tensor, classes: int, ignore_index: int, path: str | os.PathLike[str]
) -> None:
    """Every label `[H, W]` is one of the classes or ignored. Raises ValueError naming the file."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{path}: labels must be 0..{classes - 1} or {ignore_index} (ignore_index); got "
            f"{int(labels[row, column])} at row {row}, column {column}"
        )


def _read(path: str | os.PathLike[str], *, as_labels: bool) -> tuple[np.ndarray, bool]:
    """Numbers `[H, W]` or `[H, W, C]` of a file, and whether the last channel is alpha."""
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{path}: is empty")
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".npz"):
        return _read_array(path, data), False
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    return _read_image(path, data, as_labels=as_labels)


def _read_array(path: str | os.PathLike[str], data: bytes) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            if len(array.files) != 1:
                raise ValueError(f"has {len(array.files)} arrays instead of one")
            array = array[array.files[0]]
    except Exception as error:  # of a broken header the parser of Python raises anything
        raise ValueError(f"{path}: cannot be read as an array: {_line(error)}") from None
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path}: must hold integers or floats; got {array.dtype}")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{path}: must be an array [H, W] or [H, W, C]; got {list(array.shape)}")
    return array


def _read_image(
    path: str | os.PathLike[str], data: bytes, *, as_labels: bool
) -> tuple[np.ndarray, bool]:
    PIL = _pillow()
    depth, colour = _png_format(data)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if as_labels and image.format == "JPEG":
                raise ValueError("JPEG changes numbers, so it cannot hold labels")
            if depth == 16 and colour != _GRAY:
                image.verify()  # Pillow raises where OpenCV prints a warning and goes on
                return _read_deep(data), colour in _WITH_ALPHA
            if image.format == "JPEG":
                image = PIL.ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                return np.asarray(image), False
            if as_labels and image.mode == "P":
                return np.asarray(image), False
            if image.mode not in _MODES:
                raise ValueError(f"colours of mode {image.mode} are neither gray nor RGB")
            image = image.convert(_MODES[image.mode])
            values = np.asarray(image)
            if as_labels and colour == _GRAY:
                values = values // (255 // (2**depth - 1))  # Pillow spreads 1 to 4 bits over 8
            return values, image.mode.endswith("A")
    except PIL.UnidentifiedImageError:
        reason = "it is neither, or broken from the start"
    except PIL.Image.DecompressionBombError as error:
        reason = _line(error)
    except (ValueError, OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        reason = _line(error)
    raise ValueError(f"{path}: cannot be read as PNG or JPEG: {reason}")


def _read_deep(data: bytes) -> np.ndarray:
    """A PNG with 16 bits per colour, of which Pillow keeps 8: uint16 `[H, W, 3 or 4]`."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(_INSTALL.format("colour images of 16 bits", "OpenCV")) from error
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("OpenCV finds it broken")
    return np.concatenate((values[:, :, 2::-1], values[:, :, 3:]), axis=2)


def _png_format(data: bytes) -> tuple[int, int]:
    """Bits per channel and colour type in the header of a PNG; of anything else 8 and colours."""
    return (data[24], data[25]) if data.startswith(_PNG) and len(data) > 25 else (8, 2)


def _pillow() -> ModuleType:
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(_INSTALL.format("images", "Pillow")) from error
    return PIL


def _line(error: Exception) -> str:
    """The first line of a message, or the name of the error where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Files of sensors and labels: every format gives its numbers, and broken ones are named."""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from equiseg_fast.data.files import check_labels, read_labels, read_sensor

Image = pytest.importorskip("PIL.Image", reason="needs Pillow (extra train)")
cv2 = pytest.importorskip("cv2", reason="needs OpenCV (extra train)")

RNG = np.random.default_rng(0)
H, W = 5, 7


def values(*shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, high, shape, dtype=dtype)


def chw(array: np.ndarray) -> torch.Tensor:
    """What read_sensor must give of an array [H, W, C]."""
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)


def png(array: np.ndarray, bits: int, colour: int) -> bytes:
    """A PNG written by hand: no library of images is asked what its numbers are."""
    rows = array.reshape(H, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        spread = np.unpackbits(rows[..., None].astype(np.uint8), axis=-1)[..., -bits:]
        lines = [np.packbits(row.reshape(-1)).tobytes() for row in spread]
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, colour, 0, 0, 0))]
    if colour == 3:
        chunks.append((b"PLTE", bytes(range(3 * 2 ** min(bits, 4)))))
    chunks += [(b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
        for kind, x in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", ["gray", "gray with alpha", "colours", "colours with alpha"])
def test_png_of_8_and_16_bits_gives_its_numbers(tmp_path: Path, bits: int, colour: str) -> None:
    code, channels = {
        "gray": (0, 1),
        "gray with alpha": (4, 2),
        "colours": (2, 3),
        "colours with alpha": (6, 4),
    }[colour]
    array = values(H, W, channels, high=2**bits, dtype=np.uint16)
    path = tmp_path / "x.PNG"
    path.write_bytes(png(array, bits, code))
    without = array[..., : 1 if channels < 3 else 3]
    expected = chw(without.repeat(3, axis=2) if channels < 3 else without)
    assert torch.equal(read_sensor(path, 3), expected)
    if channels < 3:
        assert torch.equal(read_sensor(path, 1), chw(without))
    else:
        with pytest.raises(ValueError, match=r"x\.PNG: must have 1 channels.*got [34] in \[H, W"):
            read_sensor(path, 1)
    if channels == 4:  # alpha may be the fourth channel of a sensor
        assert torch.equal(read_sensor(path, 4), chw(array))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_few_bits_and_with_a_palette_are_their_indices(tmp_path: Path, bits: int) -> None:
    array = values(H, W, high=2 ** min(bits, 4))
    for colour in (0, 3):
        path = tmp_path / f"{colour}.png"
        path.write_bytes(png(array, bits, colour))
        labels = read_labels(path)
        assert labels.dtype == torch.int64
        assert labels.tolist() == array.tolist(), f"colour type {colour}"
    # of a sensor the palette is what was meant
    expected = np.stack([3 * array, 3 * array + 1, 3 * array + 2], axis=2)
    assert torch.equal(read_sensor(tmp_path / "3.png", 3), chw(expected))


def test_labels_of_16_bits_and_arrays(tmp_path: Path) -> None:
    array = values(H, W, high=40000, dtype=np.uint16)
    (tmp_path / "x.png").write_bytes(png(array, 16, 0))
    assert read_labels(tmp_path / "x.png").tolist() == array.tolist()
    for dtype in ("u1", "i1", ">i2", "<u2", "i4", ">u8", "i8", "?"):
        np.save(tmp_path / "x.npy", array.astype(dtype))
        assert read_labels(tmp_path / "x.npy").tolist() == array.astype(dtype).tolist(), dtype
    np.save(tmp_path / "x.npy", np.full((H, W), -1))
    assert read_labels(tmp_path / "x.npy").unique().tolist() == [-1]


def test_labels_in_colours(tmp_path: Path) -> None:
    array = values(H, W, 3)
    path = tmp_path / "x.png"
    path.write_bytes(png(array, 8, 2))
    with pytest.raises(ValueError, match=r"x\.png: labels must be one number per pixel"):
        read_labels(path)
    assert read_labels(path, first_channel=True).tolist() == array[..., 0].tolist()
    path.write_bytes(png(array[..., :1].repeat(3, axis=2), 8, 2))
    assert read_labels(path).tolist() == array[..., 0].tolist()


def test_jpeg_is_turned_upright(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(48, 0).repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of the pixels is the bottom of the picture
    path = tmp_path / "x.jpeg"
    Image.fromarray(ramp).save(path, quality=95, exif=exif)
    x = read_sensor(path, 3)
    assert x.shape == (3, 64, 48)
    assert (x[:, -1] - x[:, 0]).min() > 200
    with pytest.raises(ValueError, match=r"x\.jpeg: .*JPEG changes numbers"):
        read_labels(path)
    Image.fromarray(ramp).convert("CMYK").save(path)
    with pytest.raises(ValueError, match=r"x\.jpeg: .*CMYK"):
        read_sensor(path, 3)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i4", "f2", "<f4", ">f8", "?"])
def test_arrays_give_their_numbers(tmp_path: Path, dtype: str) -> None:
    array = values(H, W, 2, high=100).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    assert torch.equal(read_sensor(tmp_path / "x.npy", 2), chw(array))
    np.savez_compressed(tmp_path / "x.npz", array[..., 0])
    assert torch.equal(read_sensor(tmp_path / "x.npz", 1), chw(array[..., :1]))
    with pytest.raises(ValueError, match=r"must have 3 channels.*got 2 in \[H, W, C\] = \[5, 7, 2"):
        read_sensor(tmp_path / "x.npy", 3)


def test_nan_is_no_measurement_and_infinity_an_error(tmp_path: Path) -> None:
    array = values(H, W).astype(np.float32)
    array[1, 2] = np.nan
    np.save(tmp_path / "x.npy", array)
    x = read_sensor(tmp_path / "x.npy", 1)
    assert x[0, 1, 2] == 0
    array[1, 2] = 0
    assert torch.equal(x[0], torch.from_numpy(array))
    for wrong in (np.inf, -np.inf, 1e300):
        np.save(tmp_path / "x.npy", np.full((H, W), wrong))
        with pytest.raises(ValueError, match=r"x\.npy: must hold finite.*infinity in 35"):
            read_sensor(tmp_path / "x.npy", 1)


def broken_files() -> dict[str, tuple[str, bytes]]:
    """Name -> suffix and content of files that no one can read."""

    def saved(save, *args) -> bytes:
        file = io.BytesIO()
        save(file, *args)
        return file.getvalue()

    noise = values(64, 64, 3)
    pictures = {}
    for kind in ("PNG", "JPEG"):
        pictures[kind] = saved(lambda file, kind=kind: Image.fromarray(noise).save(file, kind))
    deep = png(values(H, W, 3, high=65536, dtype=np.uint16), 16, 2)
    flipped = bytearray(deep)
    flipped[60] ^= 255
    array = saved(np.save, noise)
    return {
        "empty": (".png", b""),
        "text": (".png", b"not a picture"),
        "half a PNG": (".png", pictures["PNG"][: len(pictures["PNG"]) // 2]),
        "half a JPEG": (".jpg", pictures["JPEG"][: len(pictures["JPEG"]) // 2]),
        "half a PNG of 16 bits": (".png", deep[: len(deep) // 2]),
        "PNG of 16 bits with a flipped byte": (".png", bytes(flipped)),
        "half an array": (".npy", array[: len(array) // 2]),
        "half the header of an array": (".npy", array[:60]),
        "a bracket lost in the header": (".npy", array.replace(b"}", b"{", 1)),
        "an array of objects": (".npy", saved(np.save, np.array([[None]], dtype=object))),
        "a pickle": (".npy", pickle.dumps({"a": 1})),
        "an array of text": (".npy", saved(np.save, np.array([["a"]]))),
        "an array of no pixel": (".npy", saved(np.save, np.zeros((0, 3)))),
        "a list": (".npy", saved(np.save, np.zeros(3))),
        "two arrays": (".npz", saved(np.savez, noise, noise)),
        "half an archive": (".npz", saved(np.savez, noise)[:5000]),
        "TIFF": (".png", saved(lambda file: Image.fromarray(noise).save(file, "TIFF"))),
        "another suffix": (".tif", b"II*\0"),
    }


BROKEN = broken_files()


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    suffix, data = BROKEN[kind]
    path = tmp_path / f"scene{suffix}"
    path.write_bytes(data)
    for read in (lambda: read_sensor(path, 3), lambda: read_labels(path)):
        with pytest.raises(ValueError, match=f"^{path}: .*[a-z0-9]{{3}}"):
            read()
    assert capfd.readouterr() == ("", "")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = np.empty((1, 1), dtype=object)
    bomb[0, 0] = Bomb(mark)
    np.save(tmp_path / "x.npy", bomb)
    np.savez(tmp_path / "x.npz", bomb)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("x.npy", "x.npz", "raw.npy"):
        with pytest.raises(ValueError, match=r"(?i)pickle"):
            read_sensor(tmp_path / name, 1)
    assert not mark.exists()
    pickle.loads((tmp_path / "raw.npy").read_bytes())
    assert mark.exists()  # the bomb is one


def test_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.png"):
        read_sensor(tmp_path / "x.png", 3)


def test_float_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((H, W)))
    with pytest.raises(ValueError, match=r"x\.npy: labels must be integers; got float64"):
        read_labels(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.full((H, W), 2**63, dtype=np.uint64))
    with pytest.raises(ValueError, match="64 bits; got 9223372036854775808"):
        read_labels(tmp_path / "x.npy")


def test_check_labels_says_what_and_where() -> None:
    labels = torch.tensor([[0, 255, 18], [4, 18, 255]])
    check_labels(labels, 19, 255, "x.png")
    labels[1, 2] = 19
    with pytest.raises(
        ValueError, match=r"^x.png: labels must be 0..18 or 255 .*; got 19 at row 1, column 2$"
    ):
        check_labels(labels, 19, 255, "x.png")
    labels[1, 2] = -1
    with pytest.raises(ValueError, match="got -1"):
        check_labels(labels, 19, 255, "x.png")
    check_labels(labels, 256, -1, "x.png")

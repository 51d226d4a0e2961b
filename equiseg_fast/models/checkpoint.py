"""Files of weights, read without running any code that they hold."""

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Where the weights themselves are, if a file has copies (averages, teachers) under other names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# Types of values beside the weights in training checkpoints. NumPy renamed its core.
_BESIDE = {
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{x}.multiarray.{y}" for x in ("core", "_core") for y in ("scalar", "_reconstruct")),
}
# What tensors and the mappings around them are made of.
_NEEDED = {
    "_codecs.encode",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}


class _Beside:
    """Stands for a value beside the weights: not even NumPy's code runs on what a file says."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Pickle:
    """A `pickle_module` that makes tensors and nothing else.

    PyTorch's own, of `weights_only=True`, has one list of what is allowed for the whole process.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            path = f"{module}.{name}"
            if path in _BESIDE:
                return _Beside
            dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if dtype or path in _NEEDED:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"GLOBAL {path} is not allowed")

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


def read(source: object) -> tuple[str, Mapping[str, Any]]:
    """What to call the source in messages, and the mapping it holds."""
    origin = "path_or_state_dict"
    content = source
    if isinstance(source, str | os.PathLike):
        origin = os.fspath(source)
        content = _read_safetensors(origin) if origin.endswith(".safetensors") else _load(origin)
    if not isinstance(content, Mapping):
        raise TypeError(
            f"{origin} must hold or be a mapping from names to tensors; "
            f"got {type(content).__name__}"
        )
    return origin, content


def _read_safetensors(path: str) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs safetensors, which `pip install safetensors` installs"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _load(path: str) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        cause, refused = error, _refused(path, error)
    if refused and refused <= _BESIDE:
        try:
            return torch.load(path, "cpu", _Pickle, weights_only=False)
        except Exception as error:
            cause, refused = error, _refused(path, error)
    names = ", ".join(sorted(refused - _BESIDE))
    reason = "it is no file that torch.save wrote, or damaged"
    if names:
        reason = (
            f"it holds more than tensors and plain values: {names}. If you trust it, pass the "
            "state dict instead of the path"
        )
    raise ValueError(
        f"{path} cannot be read by torch.load with weights_only=True: {reason}"
    ) from cause


def _refused(path: str, error: Exception) -> set[str]:
    """What PyTorch does not allow in a file; of a file in the format before 1.6 the first alone."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of the old format, or damaged
        return set(re.findall(r"GLOBAL (\S+)", str(error))[:1])


def tensors(
    content: Mapping[str, Any], path: str = "", levels: int = 5
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, named by their keys joined by dots."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield path + key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and levels:
            yield from tensors(value, f"{path}{key}.", levels - 1)


def main_path(content: Mapping[str, Any], levels: int = 5) -> str:
    """What the names of the weights themselves begin with, by the keys around them."""
    for key in _WRAPPERS:
        if levels and isinstance(inner := content.get(key), Mapping):
            return f"{key}.{main_path(inner, levels - 1)}"
    return ""

"""Models kept in folders, in the convention of transformers; weights that know their sensors."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from equiseg_fast._files import replace_file
from equiseg_fast._version import __version__
from equiseg_fast.nn._layer import Layer
from equiseg_fast.ops._checks import check_memory

from .config import VERSION, EQUISegConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE, FORMAT, DIGEST = "EQUISeg", 1, "weights_sha256"

Model = TypeVar("Model", bound="Pretrained")
Content = dict[str, Any]


class Pretrained(Layer):
    """A model that is made of an `EQUISegConfig` alone, and whose weights know their sensors."""

    config: EQUISegConfig

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `config.json` and `model.safetensors`, which `from_pretrained` reads.

        state_dict: weights to write instead of the model's own, of the same names and shapes: an
        average of them, say, or what all processes of a sharded model have gathered. Every tensor
        keeps its dtype and is written in full, also where it shares memory with others.

        The weights hold a copy of the configuration and are replaced at once, before
        `config.json` is: whoever is killed leaves the old model or the new one. Call this in one
        process alone. Raises RuntimeError for a model folded for inference; TypeError or ValueError
        naming a tensor that does not fit the configuration, or has no values here; ImportError
        without safetensors; OSError where the folder cannot be written.
        """
        _, to_bytes = _safetensors()
        folder = _path(folder)
        if not isinstance(state_dict, Mapping | None):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}")
        if state_dict is None and self.head.linear_fuse is None:
            raise RuntimeError(
                "this model was folded for inference; save a copy of before, which fold_ folds "
                "again when it is loaded"
            )
        state = self.state_dict() if state_dict is None else state_dict
        # What the compiler wraps has one more step in its name.
        state = {name.replace("_orig_mod.", ""): x for name, x in state.items()}
        state.setdefault("_extra_state", self.get_extra_state())
        with torch.device("meta"):
            expected = type(self)(self.config).state_dict()
        _check_fits("the state dict", state, expected)
        self.set_extra_state(state["_extra_state"])
        state = {name: _in_full(name, x) for name, x in state.items()}
        content = {
            "architectures": [ARCHITECTURE],
            "format": FORMAT,
            VERSION: __version__,
            DIGEST: _digest(state),
            **self.config.to_dict(),
        }
        text = json.dumps(content, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        weights = to_bytes(state, {"config": text})
        replace_file(folder / WEIGHTS, lambda file: file.write(weights))
        replace_file(folder / CONFIG, lambda file: file.write(text.encode()))

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Model:
        """The model that `save_pretrained` wrote into a folder, in evaluation mode.

        Weights have the dtypes that they were saved with. Fields of `config.json` may be edited as
        far as the weights fit. If it is of other weights than those beside it, as a save that was
        killed leaves it, the copy in `model.safetensors` counts, with a warning. Nothing is
        downloaded, and no code in the files is run.

        Raises FileNotFoundError or NotADirectoryError for what is no such folder; ValueError for
        one of another architecture or format, a damaged file, and weights that do not fit;
        ImportError without safetensors.
        """
        folder, device = _existing(folder), _device(device)
        content, state = _read(folder)
        try:
            fields = {k: v for k, v in content.items() if k not in _BESIDE_FIELDS}
            config = EQUISegConfig.from_dict(fields)
            # Every block has tensors of its own: one for each is none to wait for in vain.
            if config.ppx_depth > len(state):
                raise ValueError(
                    f"ppx_depth must be that of the weights, {len(state)} tensors; "
                    f"got {config.ppx_depth}"
                )
            with torch.device("meta"):
                model = cls(config)
        except (TypeError, ValueError, RuntimeError) as error:
            # RuntimeError: of sizes beyond what PyTorch can count.
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        _check_fits(str(folder / WEIGHTS), state, model.state_dict())
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:  # of other modalities
            raise ValueError(f"{folder / WEIGHTS}: {error}") from error
        return model.to(device).eval()

    def get_extra_state(self) -> Tensor:
        """The names of the modalities in their order, as bytes of JSON (uint8, on the CPU), with
        their channels if some have other than 3.

        A tensor, so that every format for weights can hold it; of one size for all names that are
        not very long, because sharded checkpoints compare sizes before `set_extra_state` can speak.
        """
        names, channels = self.config.modalities, self.config.in_channels
        usual = set(channels) == {3}
        content = names if usual else {"modalities": names, "in_channels": channels}
        text = json.dumps(content).ljust(256)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Raises RuntimeError if the weights are those of other modalities or another order, or of
        images with other channels.

        `load_state_dict` calls this before it writes anything into the model.
        """
        found, config = sensors_of(state), self.config
        if found is None:
            return
        names, channels = found
        if names != config.modalities:
            raise RuntimeError(
                f"the state dict must be of the modalities {config.modalities}, in this order; "
                f"got {names}. Build the model with modalities={names} and name the images; or, to "
                "put the weights of each modality into the one at its place, delete "
                '"_extra_state" first'
            )
        if channels != config.in_channels:
            raise RuntimeError(
                f"the state dict must be of images with in_channels={config.in_channels}; "
                f"got {channels}"
            )


_BESIDE_FIELDS = ("architectures", "format", DIGEST)


def sensors_of(state: Any) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Names and channels of the modalities in an extra state; None where it has no values.

    Raises RuntimeError for a tensor of anything else.
    """
    # Sharded checkpoints without the names have a placeholder there.
    if not isinstance(state, Tensor) or state.is_meta:
        return None
    try:
        content = json.loads(bytes(state.tolist()))
        if isinstance(content, dict):
            return tuple(content["modalities"]), tuple(content["in_channels"])
        return tuple(content), (3,) * len(content)
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            '"_extra_state" must hold the names of the modalities, as the state dict of an '
            f"EQUISeg does; got {list(state.shape)} of {state.dtype}"
        ) from error


def accept_no_names(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """State dicts of before the names were kept, and of other sources, are complete without."""
    state.setdefault(f"{prefix}_extra_state", model.get_extra_state())


def _safetensors() -> tuple[Any, Any]:
    """What makes tensors of bytes, and bytes of tensors."""
    try:
        from safetensors.torch import load, save
    except ImportError as error:
        raise ImportError(
            'models in folders need safetensors: pip install "equiseg-fast[train]"'
        ) from error
    return load, save


def _check_fits(origin: str, state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """The state has every tensor of the model, no others, in these shapes and kinds of dtype."""
    for label, names in (
        ("lacks", [name for name in expected if name not in state]),
        ("has no place in the model for", sorted(set(state) - set(expected))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{origin} {label} {', '.join(names[:3])}{more}")
    for name, wanted in expected.items():
        x = state[name]
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} of {origin} must be a tensor; got {type(x).__name__}")
        floating = wanted.is_floating_point()
        if x.is_floating_point() != floating or not (floating or x.dtype == wanted.dtype):
            kind = "floating" if floating else str(wanted.dtype)
            raise ValueError(f"{name} of {origin} must be {kind}; got {x.dtype}")
        # Names of modalities may be longer than those that the model was built with.
        if x.shape != wanted.shape and name != "_extra_state":
            raise ValueError(
                f"{name} of {origin} must have shape {list(wanted.shape)}; got {list(x.shape)}"
            )


def _in_full(name: str, x: Tensor) -> Tensor:
    """A copy on the CPU, in memory of its own."""
    if type(x) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} must be a plain tensor; got {type(x).__name__}. Of a sharded model give what "
            "all processes gather as state_dict"
        )
    check_memory(name, x)
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(state: Mapping[str, Tensor]) -> str:
    """Tells weights apart, to the bit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        x = state[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path; got {type(folder).__name__}")
    return Path(folder)


def _existing(folder: Any) -> Path:
    """A folder that has at least one of our files."""
    path = _path(folder)
    if path.is_file():
        raise NotADirectoryError(f"folder must be a folder with {CONFIG}; {path} is a file")
    if not path.is_dir():
        raise FileNotFoundError(
            f"folder must be one that save_pretrained wrote; there is no {path} (models are not "
            "downloaded)"
        )
    if not (path / CONFIG).exists() and not (path / WEIGHTS).exists():
        inner = path / "model"
        hint = f"; {inner} has one" if (inner / CONFIG).exists() else ""
        raise FileNotFoundError(f"{path} has no {CONFIG}, so no model was saved there{hint}")
    return path


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that PyTorch knows; got {device!r}") from error


def _read(folder: Path) -> tuple[Content, dict[str, Tensor]]:
    """What belongs together: configuration and weights."""
    outside = None
    if (folder / CONFIG).exists():
        outside = _content(folder / CONFIG, (folder / CONFIG).read_bytes())
    path = folder / WEIGHTS
    if not path.exists():
        others = [x.name for x in folder.iterdir() if x.suffix in (".bin", ".pt", ".pth", ".pkl")]
        pickles = f"; {others[0]} may run code when it is read, and so is not" if others else ""
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}{pickles}")
    load, _ = _safetensors()
    data = path.read_bytes()
    try:
        state = load(data)
        length = int.from_bytes(data[:8], "little")
        inside = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("config")
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is cut off or no safetensors file: {error}") from error
    if inside is None:
        raise ValueError(
            f"{path} was not written by save_pretrained: it has no configuration inside. Build the "
            "model and give load_state_dict its tensors"
        )
    inside = _content(path, inside)
    if inside.get(DIGEST) != _digest(state):
        raise ValueError(f"{path} is damaged: its values are not those that were written")
    if outside is None or outside.get(DIGEST) != inside[DIGEST]:
        warnings.warn(
            f"{folder / CONFIG} is of other weights than {WEIGHTS}, as if a save had been cut off; "
            "the configuration inside the weights counts",
            stacklevel=3,
        )
        outside = inside
    return outside, state


def _content(path: Path, text: str | bytes) -> Content:
    """A configuration that this version can read."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON: {error}") from error
    names = content.get("architectures") if isinstance(content, dict) else None
    if names != [ARCHITECTURE]:
        segformer = ""
        if "segformer" in str(names).lower():
            segformer = ". load_backbone takes the encoder of a SegFormer"
        raise ValueError(
            f"{path} must be of the architecture {ARCHITECTURE}; got {names}{segformer}"
        )
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, which version {__version__} of equiseg_fast reads; "
            f"got {content.get('format')} of version {content.get(VERSION)}"
        )
    return content

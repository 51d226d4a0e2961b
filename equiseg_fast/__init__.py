"""Fused kernels for multimodal vision: the fusion core of EQUISeg (arXiv 2509.24505).

`equiseg_fast.ops` has the operations (re-exported here), `equiseg_fast.nn` the layers,
`equiseg_fast.models` EQUISeg itself, `equiseg_fast.reference` the whole mathematics in plain
PyTorch. Importing this package imports torch but neither triton nor any kernel.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

# A checkout on a file system without symbolic links has a text file where `equiseg_fast/kernels`
# should be; the sources are then one folder up. In a wheel this folder does not exist.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "kernels").is_dir() and (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))

from .ops import (  # noqa: E402  (the line above must come first)
    add_layer_norm,
    attention,
    class_prototypes,
    depthwise_conv_gelu,
    explain,
    guided_gate,
    mix_ffn,
    ohem,
    pooling_mixer,
    query_hub,
    upsample_cross_entropy,
    use_backend,
)

if TYPE_CHECKING:
    from .models import EQUISeg, EQUISegConfig, MixTransformer, load_backbone

_LAZY = {
    "EQUISeg": "equiseg_fast.models",
    "EQUISegConfig": "equiseg_fast.models",
    "MixTransformer": "equiseg_fast.models",
    "load_backbone": "equiseg_fast.models",
}

__all__ = [
    "EQUISeg",
    "EQUISegConfig",
    "MixTransformer",
    "add_layer_norm",
    "attention",
    "class_prototypes",
    "depthwise_conv_gelu",
    "explain",
    "guided_gate",
    "load_backbone",
    "mix_ffn",
    "ohem",
    "pooling_mixer",
    "query_hub",
    "upsample_cross_entropy",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

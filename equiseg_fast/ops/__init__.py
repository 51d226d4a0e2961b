"""The operations of EQUISeg: public functions, argument checks, registration, autograd.

Features are tokens, channels last: `[B, L, C]` with `L = height * width`, or modality-major
`[M, B, L, C]`; every change of layout is a view. One file per operation, named as in
`equiseg_fast.reference`, which has the formulas.
"""

from . import _checks, _flops
from ._backend import explain, use_backend
from .add_layer_norm import add_layer_norm
from .attention import attention
from .class_prototypes import class_prototypes
from .depthwise_conv_gelu import depthwise_conv_gelu
from .guided_gate import guided_gate
from .mix_ffn import mix_ffn
from .ohem import ohem
from .pooling_mixer import pooling_mixer
from .query_hub import query_hub
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "class_prototypes",
    "depthwise_conv_gelu",
    "explain",
    "guided_gate",
    "mix_ffn",
    "ohem",
    "pooling_mixer",
    "query_hub",
    "upsample_cross_entropy",
    "use_backend",
]

for _name in set(__all__) - {"explain", "use_backend"}:
    # `torch.jit.script` asks for this first.
    vars(globals()[_name])["__prepare_scriptable__"] = _checks.refuse_torchscript

_flops.install()

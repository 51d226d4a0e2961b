"""Fast operations inside models that somebody else wrote, and the way back.

`accelerate_segformer(model)` and `accelerate_module(model, rules)` give single modules of a model
a faster `forward` and print what they replaced or skipped, and why; `revert(model)` undoes it.
`register_attention()` makes the attention a choice of `set_attn_implementation` in transformers.
Importing this package does not import transformers.
"""

from equiseg_fast.nn._plain import hooked

from .attention_interface import attention_forward, register_attention
from .modules import Change, Report, Rule, accelerate_module, revert
from .segformer import (
    MIT_RULES,
    MMSEG_RULES,
    PVT_RULES,
    SEGFORMER_RULES,
    accelerate_segformer,
)

__all__ = [
    "MIT_RULES",
    "MMSEG_RULES",
    "PVT_RULES",
    "SEGFORMER_RULES",
    "Change",
    "Report",
    "Rule",
    "accelerate_module",
    "accelerate_segformer",
    "attention_forward",
    "hooked",
    "register_attention",
    "revert",
]

"""What is timed, one file per operation or part of the model, declared in its `OPS`."""

from __future__ import annotations

import importlib
from functools import cache

from benchmarks.cases.common.op import Op

STEMS = (
    "attention",
    "depthwise_conv_gelu",
    "mix_ffn",
    "add_layer_norm",
    "query_hub",
    "pooling_mixer",
    "guided_gate",
    "class_prototypes",
    "upsample_cross_entropy",
    "block",
    "stage",
    "encoder",
    "model",
)


@cache
def operations() -> dict[str, Op]:
    """Every declaration in `benchmarks/cases`, by name."""
    found = [op for stem in STEMS for op in importlib.import_module(f"benchmarks.cases.{stem}").OPS]
    return {op.name: op for op in found}

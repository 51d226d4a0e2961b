"""The Mix Transformer alone, beside `SegformerModel` of transformers with the same parameters; and
that model accelerated, beside itself as it was.

The images of all modalities are one batch. What is compared are the features of the last stage and
the gradients of all parameters.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.common import data
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Outputs, Problem, Shape, Unsupported
from benchmarks.cases.networks import alive, network_problem
from benchmarks.providers import baselines
from equiseg_fast.integrations import accelerate_segformer
from equiseg_fast.models import MixTransformer
from equiseg_fast.models.config import VARIANTS
from equiseg_fast.models.layouts import HUGGING_FACE_V5


def _segformer(variant: str) -> Any:
    """`SegformerModel` of transformers, without anything random."""
    from transformers import SegformerConfig, SegformerModel

    dims, depths = VARIANTS[variant]
    config = SegformerConfig(
        hidden_sizes=dims, depths=depths, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return SegformerModel(config).eval()


def _transformers(encoder: MixTransformer, variant: str, images: Tensor) -> Callable[[], Outputs]:
    """`SegformerModel` on the parameters of `encoder`; keys and values, one matrix here and two
    there, are views of it."""
    theirs = _segformer(variant).to(images.device)

    def run() -> Outputs:
        parameters = {}
        for name, parameter in encoder.named_parameters():
            sources = HUGGING_FACE_V5.sources(name)
            parameters |= zip(sources, parameter.chunk(len(sources)), strict=True)
        output = torch.func.functional_call(theirs, parameters, (images,), strict=True)
        return (output.last_hidden_state,)

    return run


def encoder(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    of_transformers = {"drop_path": 0.0, "ln_eps_block": 1e-5}
    encoder = alive(lambda: MixTransformer(shape.variant, **of_transformers), seed, device)
    images = data.images(shape, seed, device).flatten(0, 1)
    others = {}
    if find_spec("transformers"):
        others["transformers"] = _transformers(encoder, shape.variant, images)
    return network_problem(
        encoder, lambda network: (network(images)[-1],),
        lambda: (baselines.encode(encoder, images),), dict(encoder.named_parameters()),
        device, dtype, others=others, output_names=("features",), ignored=(images,),
    )  # fmt: skip


def accelerated(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """The model of transformers is the baseline, ours the same one accelerated, on the same
    parameters."""
    if not find_spec("transformers"):
        raise Unsupported("transformers is not installed")
    original = alive(lambda: _segformer(shape.variant), seed, device)
    fast = copy.deepcopy(original, {id(p): p for p in original.parameters()})
    report = accelerate_segformer(fast, verbose=False)
    if report.paths("skipped"):
        raise RuntimeError(str(report))
    images = data.images(shape, seed, device).flatten(0, 1)
    return network_problem(
        fast, lambda network: (network(images).last_hidden_state,),
        lambda: (original(images).last_hidden_state,), dict(original.named_parameters()),
        device, dtype, output_names=("features",), ignored=(images,),
    )  # fmt: skip


OPS = [
    Op(
        "encoder", encoder, None, "Mix Transformer, features of the last stage",
        rivals=("baseline_cl", "transformers"), stages=(0,), scope="encoder",
    ),
    Op(
        "accelerate_segformer", accelerated, None,
        "SegformerModel of transformers, accelerated, features of the last stage",
        stages=(0,), scope="accelerated",
    ),
]  # fmt: skip

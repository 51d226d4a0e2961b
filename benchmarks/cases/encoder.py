"""The Mix Transformer alone, beside `SegformerModel` of transformers with the same parameters; and
encoders that others wrote, accelerated, beside the same as they were ("accelerate_..").

The images of all modalities are one batch. What is compared are the features of the last stage and
the gradients of all parameters.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.common import data
from benchmarks.cases.common.network import alive, network_problem
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Outputs, Problem, Shape, Unsupported
from benchmarks.providers import baseline_model
from equiseg_fast import use_backend
from equiseg_fast.integrations import MIT_RULES, accelerate_module, accelerate_segformer
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


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    of_transformers = {"drop_path": 0.0, "ln_eps_block": 1e-5}
    encoder = alive(lambda: MixTransformer(shape.variant, **of_transformers), seed, device)
    images = data.images(shape, seed, device).flatten(0, 1)
    others = {}
    if find_spec("transformers"):
        others["transformers"] = _transformers(encoder, shape.variant, images)
    return network_problem(
        encoder, lambda network: (network(images)[-1],),
        lambda: (baseline_model.encode(encoder, images),), dict(encoder.named_parameters()),
        device, dtype, others=others, output_names=("features",), ignored=(images,),
    )  # fmt: skip


class _Attention(nn.Module):
    """Attention as SegFormer's authors spell and write it, on the children of ours."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.heads = self.num_heads = ours.heads
        self.sr_ratio = ours.sr_ratio
        for name, child in ours.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        layer: Any = self
        return baseline_model._attention_layer(layer, x, x, height, width)


class _MixFFN(nn.Module):
    """Mix-FFN as SegFormer's authors spell and write it, on the children of ours."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        for name, child in ours.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        layer: Any = self
        return baseline_model._mix_ffn(layer, x, height, width)


def _mit(variant: str) -> MixTransformer:
    """The encoder with the authors' attention and Mix-FFN in its blocks."""
    encoder = MixTransformer(variant, drop_path=0.0)
    for stage in range(1, 5):
        for block in getattr(encoder, f"block{stage}"):
            block.attn, block.mlp = _Attention(block.attn), _MixFFN(block.mlp)
    return encoder


def build_accelerated(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, segformer: bool
) -> Problem:
    """A model of others is the baseline, ours the same one accelerated, on the same parameters.

    segformer: that of transformers, else the authors'.
    """
    if segformer and not find_spec("transformers"):
        raise Unsupported("transformers is not installed")
    make = _segformer if segformer else _mit

    def features(out: Any) -> Tensor:
        return out.last_hidden_state if segformer else out[-1]

    original = alive(lambda: make(shape.variant), seed, device)
    accelerated = copy.deepcopy(original, {id(p): p for p in original.parameters()})
    if segformer:
        report = accelerate_segformer(accelerated, verbose=False)
    else:
        report = accelerate_module(accelerated, MIT_RULES, verbose=False)
    if report.paths("skipped"):
        raise RuntimeError(str(report))
    images = data.images(shape, seed, device).flatten(0, 1)

    def theirs() -> Outputs:
        with use_backend("torch"):  # for what the frame around the authors' layers has of ours
            return (features(original(images)),)

    return network_problem(
        accelerated, lambda network: (features(network(images)),), theirs,
        dict(original.named_parameters()), device, dtype, output_names=("features",),
        ignored=(images,),
    )  # fmt: skip


OPS = (
    Op(
        "encoder", build, None, "Mix Transformer, features of the last stage",
        rivals=("baseline_cl", "transformers"), stages=(0,), scope="encoder",
    ),
    *(
        Op(
            name, partial(build_accelerated, segformer=segformer), None,
            f"{whose}, accelerated, features of the last stage", stages=(0,), scope="accelerated",
        )
        for name, segformer, whose in (
            ("accelerate_segformer", True, "SegformerModel of transformers"),
            ("accelerate_mit", False, "SegFormer's encoder as its authors spell it"),
        )
    ),
)  # fmt: skip

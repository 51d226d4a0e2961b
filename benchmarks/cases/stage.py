"""One stage of the encoder for all modalities: patch embedding, transformer blocks and norm.

From the tokens of the stage before (images for the first) to embedded and encoded tokens. Public
models take one modality after the other and make NCHW maps of tokens at both ends.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases.common import data
from benchmarks.cases.common.network import alive, network_problem
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Outputs, Problem, Shape
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers.baseline_model import encode_stage
from benchmarks.providers.baselines import in_memory_format, to_nchw, to_tokens
from equiseg_fast.models import MixTransformer
from equiseg_fast.ops._layout import to_map


def _inputs(shape: Shape, device: torch.device, seed: int) -> Tensor:
    if shape.stage == 1:
        return data.images(shape, seed, device)
    before = replace(shape, stage=shape.stage - 1)
    size = (shape.modalities, shape.batch, before.tokens, before.channels)
    return random_normal(size, seed=seed, device=device).requires_grad_()


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    s = shape.stage - 1
    encoder = alive(lambda: MixTransformer(shape.variant, drop_path=0.0), seed, device)
    x = _inputs(shape, device, seed)
    before = replace(shape, stage=s)
    own = tuple(f"{name}{shape.stage}." for name in ("patch_embed", "block", "norm"))
    leaves = {name: p for name, p in encoder.named_parameters() if name.startswith(own)}
    if x.requires_grad:
        leaves["x"] = x

    def ours(x: Tensor) -> Outputs:
        x = x.flatten(0, 1)
        if s:
            maps = to_map(x, before.h, before.w)
        else:
            maps = x.contiguous(memory_format=torch.channels_last)
        embedded, h, w = encoder.embed(s, maps)
        encoded = encoder.encode(s, embedded, h, w)
        return (*embedded.chunk(shape.modalities), *encoded.chunk(shape.modalities))

    def theirs() -> Outputs:
        maps = [to_nchw(m, before.h, before.w) if s else in_memory_format(m) for m in x]
        pairs = [encode_stage(encoder, s, m) for m in maps]
        return (*(to_tokens(embedded) for embedded, _ in pairs), *(tokens for _, tokens in pairs))

    return network_problem(
        ours, lambda network: network(x), theirs, leaves, device, dtype,
        output_names=("embedded", "encoded"), ignored=(x, *encoder.parameters()),
    )  # fmt: skip


OPS = (
    Op(
        "stage", build, None, "one stage of the Mix Transformer",
        rivals=("baseline_cl",), scope="stage",
    ),
)  # fmt: skip

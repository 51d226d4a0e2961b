"""The cost of whole EQUISeg and of its encoder, part by part, from the formulas of the operations.

Every part is one perfect kernel that reads its inputs from memory and writes its outputs there;
fusing two parts would need less, and no implementation that we know needs as little. What is left
out: random layers (dropout, stochastic depth), padding, changes of layout, and the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from benchmarks.cases import (
    add_layer_norm,
    attention,
    class_prototypes,
    guided_gate,
    mix_ffn,
    pooling_mixer,
    query_hub,
    upsample_cross_entropy,
)
from benchmarks.cases.common.cost import Cost, Work
from benchmarks.cases.common.data import NUM_CLASSES
from benchmarks.cases.common.problem import Shape
from equiseg_fast.models import EQUISegConfig
from equiseg_fast.models.config import SR_RATIOS, VARIANTS


@dataclass(frozen=True)
class Part:
    """count times the same kernel, in one stage (0 is none) of one group of the model."""

    group: str
    stage: int
    name: str
    cost: Cost
    count: int = 1

    @property
    def whole(self) -> Cost:
        return Cost(self.count * self.cost.forward, self.count * self.cost.backward)


def combined(parts: Iterable[Part]) -> Cost:
    """The cost of all parts one after the other."""
    return reduce(add, (part.whole for part in parts))


def encoder_parts(shape: Shape, itemsize: int) -> list[Part]:
    """Mix Transformer on all modalities in one batch; shape of any stage."""
    return [p for s in (1, 2, 3, 4) for p in stage_parts(replace(shape, stage=s), itemsize)]


def model_parts(
    shape: Shape, itemsize: int, *, training: bool, fold_head: bool = True
) -> list[Part]:
    """EQUISeg with its default configuration, which pads its images to multiples of 32.

    training: batch statistics and the two losses; otherwise upsampled logits, and norms multiplied
    into the weights beside them (`EQUISeg.fold_`). fold_head: see `nn.SegmentationHead`; False is
    the head as it was published, its norm apart.
    """
    shape = replace(
        shape, **{side: -(-getattr(shape, side) // 32) * 32 for side in ("height", "width")}
    )
    parts = []
    for stage in (1, 2, 3, 4):
        here = replace(shape, stage=stage)
        parts += stage_parts(here, itemsize)
        if shape.modalities > 1:
            parts += _fusion_stage(here, itemsize, training, folded=not training)
            parts += _gate_stage(here, itemsize, training)
    parts += _head(shape, itemsize, training, fold_head)
    return parts + _end(replace(shape, stage=1), itemsize, training)


def block_parts(shape: Shape, itemsize: int, *, training: bool) -> list[Part]:
    """The cross-modal block of one stage and the gate behind it."""
    gate = [
        part
        for part in _gate_stage(shape, itemsize, training)
        if part.name not in ("prototypes", "divergence")
    ]
    return _fusion_stage(shape, itemsize, training) + gate


def _linear(tokens: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """A linear layer or 1x1 convolution. Forward: read x and the weight, write out. Backward: read
    x, its weight and the gradient, write both gradients; two products."""
    return _convolution(tokens * inputs, tokens, inputs, outputs, itemsize)


def _convolution(
    read: int, tokens: int, taps: int, outputs: int, itemsize: int, input_gradient: bool = True
) -> Cost:
    """A convolution of `read` input elements to outputs channels at so many tokens, each of so many
    taps (kernel area times input channels); images need no gradient."""
    written, weight = tokens * outputs, taps * outputs
    product = 2 * tokens * taps * outputs
    moved = read + written + 2 * weight + (read + weight if input_gradient else -weight)
    return Cost.of_op(
        Work((read + written + weight) * itemsize, matrix=product),
        Work(moved * itemsize, matrix=(2 if input_gradient else 1) * product),
    )


def _layer_norm(elements: int, itemsize: int) -> Cost:
    """As `cases.add_layer_norm` without the addition."""
    return Cost.of_op(
        Work(2 * elements * itemsize, vector=7 * elements),
        Work(3 * elements * itemsize, vector=14 * elements),
    )


def _batch_norm(elements: int, itemsize: int, training: bool) -> Cost:
    """Statistics need a pass of their own, forward and backward; without them it is affine."""
    if not training:
        return Cost.of_op(
            Work(2 * elements * itemsize, vector=2 * elements),
            Work(2 * elements * itemsize, vector=elements),
        )
    return Cost.of_op(
        Work(3 * elements * itemsize, vector=7 * elements),
        Work(5 * elements * itemsize, vector=14 * elements),
    )


def _elements(shape: Shape) -> int:
    return shape.rows * shape.tokens * shape.channels


def _attention_layer(shape: Shape, itemsize: int) -> list[tuple[str, Cost]]:
    """Queries, spatially reduced keys and values, attention, output projection."""
    c, tokens, keys = shape.channels, shape.rows * shape.tokens, shape.rows * shape.keys
    ratio = SR_RATIOS[shape.stage - 1]
    costs = [("query projection", _linear(tokens, c, c, itemsize))]
    if ratio > 1:
        reduced = _convolution(tokens * c, keys, ratio**2 * c, c, itemsize)
        costs += [
            ("key reduction", reduced),
            ("norm of reduced keys", _layer_norm(keys * c, itemsize)),
        ]
    return [
        *costs,
        ("key and value projection", _linear(keys, c, 2 * c, itemsize)),
        ("attention", attention.cost(shape, itemsize)),
        ("output projection", _linear(tokens, c, c, itemsize)),
    ]


def stage_parts(shape: Shape, itemsize: int) -> list[Part]:
    """One stage of the encoder, on all modalities in one batch."""
    dims, depths = VARIANTS[shape.variant]
    s, n, depth = shape.stage, _elements(shape), depths[shape.stage - 1]
    kernel, inputs, pixels = 7, 3, shape.height * shape.width
    if s > 1:
        kernel, inputs, pixels = 3, dims[s - 2], replace(shape, stage=s - 1).tokens
    embed = _convolution(
        shape.rows * pixels * inputs, shape.rows * shape.tokens, kernel**2 * inputs,
        shape.channels, itemsize, s > 1,
    )  # fmt: skip
    layer = _attention_layer(shape, itemsize)
    return [
        Part("encoder", s, "patch embedding", embed),
        # behind the patch embedding, and in front of the first block
        Part("encoder", s, "LayerNorm", _layer_norm(n, itemsize), 2),
        *(Part("encoder", s, name, cost, depth) for name, cost in layer),
        Part("encoder", s, "add_layer_norm", add_layer_norm.cost(shape, itemsize), 2 * depth),
        Part("encoder", s, "mix_ffn", mix_ffn.cost(shape, itemsize), depth),
    ]


def _fusion_stage(shape: Shape, itemsize: int, training: bool, folded: bool = False) -> list[Part]:
    n, c = _elements(shape), shape.channels
    rows = shape.rows
    ratio = EQUISegConfig().ppx_ratio[shape.stage - 1]
    batch_norm = _batch_norm(n, itemsize, training)
    # x + scale * (u + sigmoid(a) * u): reads a, u, x
    gate = Cost.of_op(
        Work(4 * n * itemsize, vector=6 * n, exps=n), Work(5 * n * itemsize, vector=12 * n, exps=n)
    )
    # mean over tokens, three taps over channels, sigmoid; the gradient joins the pass behind it
    channel_gate = Cost.of_op(
        Work(n * itemsize, vector=n + 6 * rows * c, exps=rows * c), Work(vector=12 * rows * c)
    )
    # scale * y + gate * x; folded, the scale is in the weights of y
    end = Cost.of_op(
        Work(3 * n * itemsize, vector=(2 if folded else 3) * n),
        Work(5 * n * itemsize, vector=6 * n),
    )
    parts = [
        ("query_hub", query_hub.cost(shape, itemsize), 1),
        ("BatchNorm", batch_norm, 1 if folded else 2),
        ("pooling_mixer", pooling_mixer.cost(shape, itemsize), 1),
        ("1x1 convolution", _linear(rows * shape.tokens, c, c, itemsize), 1),
        ("gate of the mixer", gate, 1),
        ("channel gate", channel_gate, 1),
        ("mix_ffn", mix_ffn.cost(shape, itemsize, ratio), 1),
        ("end of the mixer", end, 1),
        ("LayerNorm", _layer_norm(n, itemsize), 1),
        *((name, cost, 1) for name, cost in _attention_layer(shape, itemsize)),
        ("residual", Cost.of_op(Work(3 * n * itemsize, vector=n), Work()), 1),
    ]
    return [Part("fusion", shape.stage, name, cost, count) for name, cost, count in parts]


def _gate_stage(shape: Shape, itemsize: int, training: bool) -> list[Part]:
    n, c, rows = _elements(shape), shape.channels, shape.rows
    means = Cost.of_op(Work(n * itemsize, vector=n), Work())
    hidden = c // EQUISegConfig().gate_reduction
    costs = [
        ("means", means),
        ("perceptron", _linear(rows, 2 * c, hidden, 4) + _linear(rows, hidden, c, 4)),
        ("guided_gate", guided_gate.cost(shape, itemsize)),
    ]
    if training:
        values = rows * NUM_CLASSES * c
        divergence = Cost.of_op(
            Work(4 * values, vector=4 * values, exps=values), Work(8 * values, vector=2 * values)
        )
        costs += [
            ("prototypes", class_prototypes.cost(shape, itemsize)),
            ("divergence", divergence),
        ]
    return [Part("gate", shape.stage, name, cost) for name, cost in costs]


def _head(shape: Shape, itemsize: int, training: bool, fold: bool) -> list[Part]:
    dim = EQUISegConfig(variant=shape.variant).head_dim
    stages = [replace(shape, stage=s) for s in (1, 2, 3, 4)]
    tokens = [shape.batch * stage.tokens for stage in stages]
    projections = [
        Part("head", stage.stage, "projection", _linear(number, stage.channels, dim, itemsize))
        for stage, number in zip(stages, tokens, strict=True)
    ]
    compose = [_linear(stage.channels, dim, dim, itemsize) for stage in stages]
    weights = Part("head", 0, "folded weights", reduce(add, compose))
    norm = Part("head", 0, "BatchNorm", _batch_norm(tokens[0] * dim, itemsize, training))
    if fold:
        upsample = Part("head", 0, "upsample and add", _upsample(tokens, dim, 1, itemsize))
        fuse = [weights, upsample, norm] if training else [upsample]
    else:
        fuse = [
            Part("head", 0, "upsample and concatenate", _upsample(tokens, dim, 4, itemsize)),
            Part("head", 0, "fusing convolution", _linear(tokens[0], 4 * dim, dim, itemsize)),
            norm,
        ]
    return [
        *projections,
        *fuse,
        Part("head", 0, "classifier", _linear(tokens[0], dim, NUM_CLASSES, itemsize)),
    ]


def _upsample(tokens: Sequence[int], dim: int, maps: int, itemsize: int) -> Cost:
    """Bilinear, the three smaller maps to the largest; read all, write so many of the largest."""
    read, written = sum(tokens) * dim, maps * tokens[0] * dim
    corners = 3 * tokens[0] * dim
    return Cost.of_op(
        Work((read + written) * itemsize, vector=10 * corners),
        Work((read + written) * itemsize, vector=8 * corners),
    )


def _end(first: Shape, itemsize: int, training: bool) -> list[Part]:
    """Behind the head; first: the shape of stage 1."""
    pixels = first.batch * first.height * first.width
    if not training:
        logits = first.batch * NUM_CLASSES * first.tokens
        full = NUM_CLASSES * pixels
        upsample = Work((logits + full) * itemsize, vector=9 * full)
        back = Work((logits + full) * itemsize, vector=8 * full)
        return [Part("head", 0, "upsample logits", Cost.of_op(upsample, back))]
    hard = Cost.of_op(Work(5 * pixels, vector=2 * pixels), Work(9 * pixels, vector=2 * pixels))
    return [
        Part("loss", 0, "upsample_cross_entropy", upsample_cross_entropy.cost(first, itemsize)),
        Part("loss", 0, "hard pixels", hard),
    ]

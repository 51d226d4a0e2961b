"""The cross-modal block and the gate behind it, of one stage: all that happens between modalities.

As in inference ("block") and, with the batch statistics of its norms and all gradients, as in
training ("block_training").
"""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases.common.network import alive, network_problem
from benchmarks.cases.common.op import TRAINING_MODES, Op
from benchmarks.cases.common.problem import Outputs, Problem, Shape, Unsupported
from benchmarks.cases.common.random_data import random_normal
from benchmarks.providers import baseline_model
from benchmarks.providers.baselines import to_nchw
from equiseg_fast.models import EQUISegConfig
from equiseg_fast.nn import CrossModalBlock, SelfGuidedGate


def modules(shape: Shape, device: torch.device, seed: int) -> nn.ModuleDict:
    """Block and gate as in an `EQUISeg` of that shape."""
    config, s = EQUISegConfig(variant=shape.variant), shape.stage - 1

    def make() -> nn.ModuleDict:
        block = CrossModalBlock(
            config.dims[s], shape.modalities, config.cross_heads[s], config.cross_sr[s],
            ppx_depth=config.ppx_depth, ppx_ratio=config.ppx_ratio[s],
        )  # fmt: skip
        gate = SelfGuidedGate(config.dims[s], config.gate_reduction, config.gate_rho)
        return nn.ModuleDict({"block": block, "gate": gate})

    return alive(make, seed, device)


def refuses(shape: Shape) -> str:
    return "there is no block between modalities with only one" if shape.modalities < 2 else ""


def build(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, training: bool
) -> Problem:
    if reason := refuses(shape):
        raise Unsupported(reason)
    parts = modules(shape, device, seed).train(training)
    block, gate = parts["block"], parts["gate"]
    size = (shape.modalities, shape.batch, shape.tokens, shape.channels)
    embedded, encoded = (random_normal(size, seed=seed + i, device=device) for i in range(2))

    def ours(embedded: Tensor, encoded: Tensor) -> Outputs:
        return gate(block(embedded, encoded, shape.h, shape.w))

    def theirs() -> Outputs:
        # Public models keep the embedded features as maps.
        maps = [to_nchw(x, shape.h, shape.w) for x in embedded]
        tokens = baseline_model.cross_modal_block(block, maps, list(encoded), shape.h, shape.w)
        return baseline_model.balance(gate, tokens)

    leaves = {}
    if training:
        inputs = {"embedded": embedded, "encoded": encoded}
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        leaves |= dict(parts.named_parameters())
    return network_problem(
        ours, lambda network: network(embedded, encoded), theirs, leaves, device, dtype,
        output_names=("branches", "fused"),
        ignored=(embedded, encoded, *parts.parameters(), *parts.buffers()),
    )  # fmt: skip


OPS = tuple(
    Op(
        name, partial(build, training=training), None,
        f"cross-modal block and gate, {what}",
        modes=modes, rivals=("baseline_cl",), scope="block", refuses=refuses,
    )
    for name, training, modes, what in (
        ("block", False, ("fwd",), "inference"),
        ("block_training", True, TRAINING_MODES, "gradients of all inputs and parameters"),
    )
)  # fmt: skip

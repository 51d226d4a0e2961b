"""Whole EQUISeg: inference, and a training step (loss and all gradients, without an optimiser).

The weights are random, `drop_path` and `head_dropout` are 0 and the teachers are drawn from a fixed
seed, so that every provider computes the same. The gate's last layer, which starts at zero and
would hide everything before it, gets small random values. Half precision means autocast.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks import data, model_cost
from benchmarks.baselines import EagerBaseline
from benchmarks.cost import Cost
from benchmarks.registry import (
    NUM_CLASSES,
    Op,
    Outputs,
    Problem,
    Shape,
    Unsupported,
    lazily_compiled,
)
from equiseg_fast import use_backend
from equiseg_fast.models import EQUISeg

# Relative RMS error of outputs and of all gradients, against the fp32 reference. The maxima and
# the selection of hard pixels are not continuous: one pixel that decides otherwise in the last bit
# sends its whole gradient elsewhere, which costs more than rounding does.
AGREEMENT = {torch.float32: (1e-4, 1e-3)}
HALF_AGREEMENT = (5e-2, 0.3)


def _model(shape: Shape, device: torch.device, seed: int) -> EQUISeg:
    names = data.NAMES if shape.modalities == 3 else [f"m{i}" for i in range(shape.modalities)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EQUISeg.from_name(
            shape.variant,
            modalities=names,
            num_classes=NUM_CLASSES,
            drop_path=0.0,
            head_dropout=0.0,
        )
        for gate in model.gates:
            nn.init.normal_(gate.fc2.weight, std=0.1)
    return model.to(device)


def on_backend(backend: str, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
    def run() -> Outputs:
        with use_backend(backend):
            return call()

    return run


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def cast_to(
    device: torch.device, dtype: torch.dtype, call: Callable[[], Outputs]
) -> Callable[[], Outputs]:
    """`call` under autocast, or as it is in fp32."""

    def run() -> Outputs:
        with _autocast(device, dtype):
            return call()

    return run


def _build(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, training: bool
) -> Problem:
    if shape.modalities < 2:
        raise Unsupported("the eager baseline needs two modalities or more")
    model = _model(shape, device, seed).train(training)
    baseline = EagerBaseline(model)
    size = (shape.batch, shape.height, shape.width)
    images = data.images(shape.modalities, *size, seed).to(device)
    labels = data.labels(*size, seed).to(device)

    def teachers() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def ours(network: Callable[..., Tensor], loss: Callable[..., tuple]) -> Outputs:
        if training:
            return (loss(images, labels, generator=teachers())[0],)
        return (network(images),)

    def theirs() -> Outputs:
        if training:
            return (baseline.loss(images, labels, generator=teachers()),)
        return (baseline.forward(images),)

    compiled = lazily_compiled(model), lazily_compiled(model.loss)
    plain = {
        "baseline": theirs,
        "reference": on_backend("reference", lambda: ours(model, model.loss)),
        "torch": on_backend("torch", lambda: ours(model, model.loss)),
        "triton": on_backend("auto", lambda: ours(model, model.loss)),
        "compile": on_backend("torch", lambda: ours(*compiled)),
    }
    leaves = dict(model.named_parameters()) if training else {}
    return Problem(
        calls={name: cast_to(device, dtype, call) for name, call in plain.items()},
        leaves=leaves,
        cast=lambda wanted: (cast_to(device, wanted, plain["reference"]), list(leaves.values())),
        synchronising=frozenset({"baseline"}) if training else frozenset(),
        output_names=("loss",) if training else ("logits",),
        agreement=AGREEMENT.get(dtype, HALF_AGREEMENT),
        ignored=(images, labels, *model.parameters(), *model.buffers()),
    )


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    return _build(shape, dtype, device, seed, training=False)


def build_training(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    return _build(shape, dtype, device, seed, training=True)


def cost_of_model(shape: Shape, itemsize: int) -> Cost:
    """The parts of the model one after the other, see `model_cost`."""
    return model_cost.combined(model_cost.model_parts(shape, itemsize, training=False))


def cost_of_training(shape: Shape, itemsize: int) -> Cost:
    """As `cost_of_model`, with batch statistics and losses."""
    return model_cost.combined(model_cost.model_parts(shape, itemsize, training=True))


OPS = (
    Op("model", "", build_model, cost_of_model, "EQUISeg inference", modes=("fwd",), stages=(0,)),
    Op(
        "training",
        "",
        build_training,
        cost_of_training,
        "EQUISeg loss and gradients of all parameters",
        modes=("fwd_train", "bwd", "step"),
        stages=(0,),
    ),
)

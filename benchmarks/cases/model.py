"""Whole EQUISeg: inference, and a training step (loss and all gradients, without an optimiser).

Inference is that of the folded model, as the README has it; the baseline and the reference are not
folded.
"""

from copy import deepcopy
from functools import partial

import torch

from benchmarks.cases.common import data
from benchmarks.cases.common.data import NUM_CLASSES
from benchmarks.cases.common.network import alive, network_problem
from benchmarks.cases.common.op import TRAINING_MODES, Op
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.providers.baseline_model import EagerBaseline
from equiseg_fast.models import EQUISeg


def equiseg(shape: Shape, device: torch.device, seed: int) -> EQUISeg:
    """A model without random layers, whose weights let everything matter."""
    names = data.NAMES if shape.modalities == 3 else [f"m{i}" for i in range(shape.modalities)]
    still = {"drop_path": 0.0, "head_dropout": 0.0}
    fields = {"modalities": names, "num_classes": NUM_CLASSES, **still}
    return alive(lambda: EQUISeg.from_name(shape.variant, **fields), seed, device)


def build(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, training: bool
) -> Problem:
    model = equiseg(shape, device, seed).train(training)
    baseline = EagerBaseline(model)
    images = data.images(shape, seed, device)
    ignored = (images, *model.parameters(), *model.buffers())
    if not training:
        folded = deepcopy(model).fold_()
        return network_problem(
            folded, lambda network: (network(images),), lambda: (baseline.forward(images),), {},
            device, dtype, plain=model, output_names=("logits",),
            ignored=(*ignored, *folded.parameters(), *folded.buffers()),
        )  # fmt: skip
    labels = data.labels(shape.batch, shape.height, shape.width, seed, device)
    # Drawn once: the same for all, and nothing that waits for the device.
    order = torch.randperm(shape.modalities, generator=torch.Generator().manual_seed(seed))
    teachers = order.to(device)
    return network_problem(
        model.loss,
        lambda loss: (loss(images, labels, order=teachers)[0],),
        lambda: (baseline.loss(images, labels, order=order.tolist()),),
        dict(model.named_parameters()), device, dtype, output_names=("loss",),
        ignored=(*ignored, labels),
        # It asks which classes an image has.
        synchronising=frozenset({"baseline", "baseline_cl"}),
    )  # fmt: skip


OPS = tuple(
    Op(
        name, partial(build, training=training), None, what,
        modes=modes, rivals=("baseline_cl",), stages=(0,), scope="model",
    )
    for name, training, modes, what in (
        ("model", False, ("fwd",), "EQUISeg inference"),
        ("training", True, TRAINING_MODES, "EQUISeg loss and gradients of all parameters"),
    )
)  # fmt: skip

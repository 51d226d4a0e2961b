"""Whole EQUISeg: inference, and a training step (loss and all gradients, without an optimiser).

Inference is that of the folded model, as the README has it; the baseline and the reference are not
folded.
"""

from copy import deepcopy
from functools import partial

import torch

from benchmarks.cases.common import data
from benchmarks.cases.common.data import NUM_CLASSES
from benchmarks.cases.common.network import enliven, network_problem
from benchmarks.cases.common.op import Op
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.providers.baseline_model import EagerBaseline
from equiseg_fast.models import EQUISeg


def equiseg(shape: Shape, device: torch.device, seed: int) -> EQUISeg:
    """A model without random layers, whose weights let everything matter."""
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
        enliven(model)
    return model.to(device)


def build(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, training: bool
) -> Problem:
    model = equiseg(shape, device, seed).train(training)
    baseline = EagerBaseline(model)
    size = (shape.batch, shape.height, shape.width)
    images = data.images(shape.modalities, *size, seed, device)
    ignored = (images, *model.parameters(), *model.buffers())
    if not training:
        folded = deepcopy(model).fold_()
        return network_problem(
            folded,
            lambda network: (network(images),),
            lambda: (baseline.forward(images),),
            {},
            device,
            dtype,
            plain=model,
            output_names=("logits",),
            ignored=(*ignored, *folded.parameters(), *folded.buffers()),
        )
    labels = data.labels(*size, seed, device)
    # Drawn once: the same for all, and nothing that waits for the device.
    order = torch.randperm(shape.modalities, generator=torch.Generator().manual_seed(seed))
    teachers = order.to(device)

    return network_problem(
        model.loss,
        lambda loss: (loss(images, labels, order=teachers)[0],),
        lambda: (baseline.loss(images, labels, order=order.tolist()),),
        dict(model.named_parameters()),
        device,
        dtype,
        output_names=("loss",),
        ignored=(*ignored, labels),
        # It asks which classes an image has.
        synchronising=frozenset({"baseline", "baseline_cl"}),
    )


OPS = (
    Op(
        "model",
        partial(build, training=False),
        None,
        "EQUISeg inference",
        rivals=("baseline_cl",),
        modes=("fwd",),
        stages=(0,),
        scope="model",
    ),
    Op(
        "training",
        partial(build, training=True),
        None,
        "EQUISeg loss and gradients of all parameters",
        rivals=("baseline_cl",),
        modes=("fwd_train", "bwd", "step"),
        stages=(0,),
        scope="model",
    ),
)

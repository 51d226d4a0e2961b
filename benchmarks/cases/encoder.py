"""The Mix Transformer alone, beside `SegformerModel` of transformers with the same parameters.

The images of all modalities are one batch. What is compared are the features of the last stage and
the gradients of all parameters.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import baseline_model, data, model_cost
from benchmarks.cost import Cost
from benchmarks.network import enliven, network_problem
from benchmarks.registry import Op, Outputs, Problem, Shape
from equiseg_fast.models import MixTransformer
from equiseg_fast.models.config import VARIANTS
from equiseg_fast.models.layouts import HUGGING_FACE_V5


def _transformers(encoder: MixTransformer, variant: str, images: Tensor) -> Callable[[], Outputs]:
    """`SegformerModel` on the parameters of `encoder`; keys and values, one matrix here and two
    there, are views of it."""
    from transformers import SegformerConfig, SegformerModel

    dims, depths = VARIANTS[variant]
    config = SegformerConfig(
        hidden_sizes=dims,
        depths=depths,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    theirs = SegformerModel(config).to(images.device).eval()

    def run() -> Outputs:
        parameters = {}
        for name, parameter in encoder.named_parameters():
            sources = HUGGING_FACE_V5.sources(name)
            parameters |= zip(sources, parameter.chunk(len(sources)), strict=True)
        output = torch.func.functional_call(theirs, parameters, (images,), strict=True)
        return (output.last_hidden_state,)

    return run


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The eps of transformers.
        encoder = MixTransformer(shape.variant, drop_path=0.0, ln_eps_block=1e-5)
        enliven(encoder)
    encoder.to(device)
    size = (shape.modalities, shape.batch, shape.height, shape.width)
    images = data.images(*size, seed, device).flatten(0, 1)
    others = {}
    if find_spec("transformers"):
        others["transformers"] = _transformers(encoder, shape.variant, images)
    return network_problem(
        encoder,
        lambda network: (network(images)[-1],),
        lambda: (baseline_model.encode(encoder, images),),
        dict(encoder.named_parameters()),
        device,
        dtype,
        others=others,
        output_names=("features",),
        ignored=(images,),
    )


def cost(shape: Shape, itemsize: int) -> Cost:
    """The parts of the encoder one after the other, see `model_cost`."""
    return model_cost.combined(model_cost.encoder_parts(shape, itemsize))


OPS = (
    Op(
        "encoder",
        "",
        build,
        cost,
        "Mix Transformer, features of the last stage",
        extra_providers=("baseline_cl", "transformers"),
        stages=(0,),
        scope="encoder",
    ),
)

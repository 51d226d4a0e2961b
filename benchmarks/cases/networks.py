"""Whole models and parts of them, on the same parameters for everybody.

The weights are random (`alive`) and nothing else is: no stochastic depth, no dropout, teachers
drawn from a fixed seed, so that every provider computes the same. Half precision means autocast.
What of `equiseg_fast` only few of them need is imported there: `against` runs them on revisions
that may lack it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.common import data
from benchmarks.cases.common.op import TRAINING_MODES, Op
from benchmarks.cases.common.problem import Outputs, Problem, Shape
from benchmarks.providers import baselines
from benchmarks.providers.provider import COMPILED, lazily_compiled
from equiseg_fast import use_backend
from equiseg_fast.models import EQUISeg, MixTransformer
from equiseg_fast.models.config import VARIANTS
from equiseg_fast.ops._layout import to_map

# Relative RMS error of outputs and of all gradients, against the fp32 reference. The maxima and
# the selection of hard pixels are not continuous: one pixel that decides otherwise in the last bit
# sends its whole gradient elsewhere, which costs more than rounding does: up to 4e-3 of images of
# 64 x 96, and less of larger ones; without such a pixel it is 1e-5.
AGREEMENT = {torch.float32: (1e-4, 5e-3)}
HALF_AGREEMENT = (5e-2, 0.3)

Call = Callable[[], Outputs]


def network_problem(
    network: Callable[..., Any],
    run: Callable[[Callable[..., Any]], Outputs],
    baseline: Call,
    leaves: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    plain: Callable[..., Any] | None = None,
    others: Mapping[str, Call] | None = None,
    ignored: Sequence[Tensor] = (),
    **fields: Any,
) -> Problem:
    """A problem that every backend can do.

    network: ours, an nn.Module or a function over modules, which can be compiled. run: calls it, or
    what was made of it, on the inputs. baseline: the same in the style of `baselines`. plain: the
    network that the reference and the oracle run, if it is another. others: further providers.
    ignored, fields: of `Problem`; leaves are ignored anyway.
    """

    def on(backend: str, made: Callable[..., Any]) -> Call:
        return lambda: _within(use_backend(backend), lambda: run(made))

    def cast_to(wanted: torch.dtype, call: Call) -> Call:
        if wanted == torch.float32:
            return call
        return lambda: _within(torch.autocast(device.type, wanted), call)

    reference = on("reference", plain or network)
    calls = {
        "baseline": baseline,
        "baseline_cl": baselines.channels_last(baseline),
        "reference": reference,
        "torch": on("torch", network),
        "triton": on("auto", network),
        "tuned": on("auto", network),
        **{name: on("torch", lazily_compiled(network, m)) for name, m in COMPILED.items()},
        **(others or {}),
    }
    return Problem(
        calls={name: cast_to(dtype, call) for name, call in calls.items()},
        leaves=dict(leaves),
        cast=lambda wanted: (cast_to(wanted, reference), list(leaves.values())),
        agreement=AGREEMENT.get(dtype, HALF_AGREEMENT),
        ignored=(*ignored, *leaves.values()),
        **fields,
    )


def _within(context: AbstractContextManager[Any], call: Call) -> Outputs:
    with context:
        return call()


@torch.no_grad()
def alive(make: Callable[[], Any], seed: int, device: torch.device) -> Any:
    """A module whose random weights let everything matter: of standard deviation fan-in ** -0.5,
    layer scales around 1.

    Fresh models have branches so weak, and gates so equal, that whatever is wrong in them vanishes
    beside the residual stream: the gate of parity would not see it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for name, weight in module.named_parameters():
            if "layer_scale" in name:
                nn.init.normal_(weight, 1.0, 0.1)
            elif weight.dim() > 1:
                # The query hub has the depthwise filters of all modalities in one parameter.
                filter_of_one = weight[0, 0] if name.endswith("dw_weight") else weight[0]
                nn.init.normal_(weight, std=filter_of_one.numel() ** -0.5)
    return module.to(device)


def equiseg(shape: Shape, device: torch.device, seed: int) -> EQUISeg:
    """A model without random layers, whose weights let everything matter."""
    fields = {
        "modalities": [f"m{i}" for i in range(shape.modalities)], "num_classes": data.NUM_CLASSES,
        "drop_path": 0.0, "head_dropout": 0.0,
    }  # fmt: skip
    return alive(lambda: EQUISeg.from_name(shape.variant, **fields), seed, device)


def block(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, training: bool
) -> Problem:
    """The cross-modal block and the gate behind it, of one stage: all that happens between
    modalities; in training with the batch statistics of its norms and all gradients."""
    model = equiseg(shape, device, seed).train(training)
    s = shape.stage - 1
    parts = nn.ModuleDict({"block": model.fusion[s], "gate": model.gates[s]})
    block, gate = parts["block"], parts["gate"]
    size = (shape.modalities, shape.batch, shape.tokens, shape.channels)
    embedded = data.random_normal(size, torch.float32, seed, device)
    encoded = data.random_normal(size, torch.float32, seed + 1, device)

    def ours(embedded: Tensor, encoded: Tensor) -> Outputs:
        return gate(block(embedded, encoded, shape.h, shape.w))

    def theirs() -> Outputs:
        # Public models keep the embedded features as maps.
        maps = [baselines.to_nchw(x, shape.h, shape.w) for x in embedded]
        tokens = baselines.cross_modal_block(block, maps, list(encoded))
        return baselines.balance(gate, tokens)

    leaves = {}
    if training:
        inputs = {"embedded": embedded.requires_grad_(), "encoded": encoded.requires_grad_()}
        leaves = {**inputs, **dict(parts.named_parameters())}
    return network_problem(
        ours, lambda network: network(embedded, encoded), theirs, leaves, device, dtype,
        output_names=("branches", "fused"),
        ignored=(embedded, encoded, *parts.parameters(), *parts.buffers()),
    )  # fmt: skip


def stage(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """One stage of the encoder for all modalities, from the tokens of the stage before (images for
    the first) to embedded and encoded tokens. Public models take one modality after the other and
    make NCHW maps of tokens at both ends."""
    s = shape.stage - 1
    encoder = alive(lambda: MixTransformer(shape.variant, drop_path=0.0), seed, device)
    own = tuple(f"{name}{shape.stage}." for name in ("patch_embed", "block", "norm"))
    leaves = {name: p for name, p in encoder.named_parameters() if name.startswith(own)}
    before = replace(shape, stage=s)
    if s:
        size = (shape.modalities, shape.batch, before.tokens, before.channels)
        x = data.random_normal(size, torch.float32, seed, device)
        leaves["x"] = x.requires_grad_()
    else:
        x = data.images(shape, seed, device)

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
        if s:
            maps = [baselines.to_nchw(m, before.h, before.w) for m in x]
        else:
            maps = [baselines.in_memory_format(m) for m in x]
        embedded, encoded = zip(*(baselines.encode_stage(encoder, s, m) for m in maps), strict=True)
        return (*map(baselines.to_tokens, embedded), *encoded)

    return network_problem(
        ours, lambda network: network(x), theirs, leaves, device, dtype,
        output_names=("embedded", "encoded"), ignored=(x, *encoder.parameters()),
    )  # fmt: skip


def _segformer(variant: str) -> Any:
    """`SegformerModel` of transformers, without anything random."""
    from transformers import SegformerConfig, SegformerModel

    dims, depths = VARIANTS[variant]
    config = SegformerConfig(
        hidden_sizes=dims, depths=depths, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return SegformerModel(config).eval()


def encoder(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """The Mix Transformer alone, the images of all modalities as one batch, to the features of the
    last stage; beside it `SegformerModel` of transformers on the same parameters."""
    from equiseg_fast.models.layouts import HUGGING_FACE_V5

    of_transformers = {"drop_path": 0.0, "ln_eps_block": 1e-5}
    encoder = alive(lambda: MixTransformer(shape.variant, **of_transformers), seed, device)
    images = data.images(shape, seed, device).flatten(0, 1)
    others = {}
    if find_spec("transformers"):
        theirs = _segformer(shape.variant).to(device)

        def transformers() -> Outputs:
            parameters = {}
            for name, parameter in encoder.named_parameters():
                # Keys and values, one matrix here and two there, are views of it.
                sources = HUGGING_FACE_V5.sources(name)
                parameters |= zip(sources, parameter.chunk(len(sources)), strict=True)
            output = torch.func.functional_call(theirs, parameters, (images,), strict=True)
            return (output.last_hidden_state,)

        others["transformers"] = transformers
    return network_problem(
        encoder, lambda network: (network(images)[-1],),
        lambda: (baselines.encode(encoder, images),), dict(encoder.named_parameters()),
        device, dtype, others=others, output_names=("features",), ignored=(images,),
    )  # fmt: skip


def accelerated(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """The model of transformers is the baseline, ours the same one accelerated, on the same
    parameters."""
    from equiseg_fast.integrations import accelerate_segformer

    original = alive(lambda: _segformer(shape.variant), seed, device)
    fast = deepcopy(original, {id(p): p for p in original.parameters()})
    accelerate_segformer(fast, verbose=False)
    images = data.images(shape, seed, device).flatten(0, 1)
    return network_problem(
        fast, lambda network: (network(images).last_hidden_state,),
        lambda: (original(images).last_hidden_state,), dict(original.named_parameters()),
        device, dtype, output_names=("features",), ignored=(images,),
    )  # fmt: skip


def model(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, *, training: bool
) -> Problem:
    """Whole EQUISeg: inference of the folded model, as the README has it (the baseline and the
    reference are not folded), or loss and all gradients without an optimiser."""
    model = equiseg(shape, device, seed).train(training)
    baseline = baselines.EagerBaseline(model)
    images = data.images(shape, seed, device)
    ignored = (images, *model.parameters(), *model.buffers())
    if not training:
        folded = deepcopy(model).fold_()
        return network_problem(
            folded, lambda network: (network(images),), lambda: (baseline.forward(images),), {},
            device, dtype, plain=model, output_names=("logits",),
            ignored=(*ignored, *folded.parameters(), *folded.buffers()),
        )  # fmt: skip
    labels = data.labels((shape.batch, shape.height, shape.width), seed, device)
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


def _no_others(shape: Shape) -> str:
    return "there is no block between modalities with only one" if shape.modalities < 2 else ""


def _no_transformers(shape: Shape) -> str:
    return "" if find_spec("transformers") else "transformers is not installed"


OPS = [
    Op(
        "block", partial(block, training=False), None, "cross-modal block and gate, inference",
        ("baseline_cl",), ("fwd",), scope="block", refuses=_no_others,
    ),
    Op(
        "block_training", partial(block, training=True), None,
        "cross-modal block and gate, gradients of all inputs and parameters",
        ("baseline_cl",), TRAINING_MODES, scope="block", refuses=_no_others,
    ),
    Op("stage", stage, None, "one stage of the Mix Transformer", ("baseline_cl",), scope="stage"),
    Op(
        "encoder", encoder, None, "Mix Transformer, features of the last stage",
        ("baseline_cl", "transformers"), stages=(0,), scope="encoder",
    ),
    Op(
        "accelerate_segformer", accelerated, None,
        "SegformerModel of transformers, accelerated, features of the last stage",
        stages=(0,), scope="accelerated", refuses=_no_transformers,
    ),
    Op(
        "model", partial(model, training=False), None, "EQUISeg inference",
        ("baseline_cl",), ("fwd",), (0,), "model",
    ),
    Op(
        "training", partial(model, training=True), None,
        "EQUISeg loss and gradients of all parameters",
        ("baseline_cl",), TRAINING_MODES, (0,), "model",
    ),
]  # fmt: skip

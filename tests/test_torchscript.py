"""TorchScript, and the ONNX export built on it: refused in one sentence, never a wrong graph."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equiseg_fast.nn
from equiseg_fast import EQUISeg, MixTransformer, ops
from equiseg_fast.nn import (
    CrossModalAttention,
    CrossModalBlock,
    DepthwiseConv,
    EfficientSelfAttention,
    MixFFN,
    ParallelPoolingMixer,
    PatchEmbed,
    PrototypeLoss,
    SegmentationHead,
    SelfGuidedGate,
    SelfQueryHub,
)
from tests.every_operation import OPERATIONS

SENTENCE = r"torch\.jit\.trace, .* are not supported: .* use torch\.export"

MAP, MAPS = torch.randn(2, 4, 4, 4), torch.randn(2, 1, 4, 4, 4)
STAGES = [torch.randn(1, 4, side, side) for side in (8, 4, 2, 1)]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "CrossModalAttention": (lambda: CrossModalAttention(4, 2), (MAP, MAP)),
    "CrossModalBlock": (lambda: CrossModalBlock(4, 2, 2, 1), (MAPS, MAPS)),
    "DepthwiseConv": (lambda: DepthwiseConv(4), (MAP,)),
    "EfficientSelfAttention": (lambda: EfficientSelfAttention(4, 2, 2), (MAP,)),
    "MixFFN": (lambda: MixFFN(4, 8), (MAP,)),
    "ParallelPoolingMixer": (lambda: ParallelPoolingMixer(4), (MAP,)),
    "PatchEmbed": (lambda: PatchEmbed(4, 4, 3, 2), (MAP,)),
    "PrototypeLoss": (
        lambda: PrototypeLoss(3),
        (MAPS, torch.zeros(1, 4, 4, dtype=torch.int64), torch.tensor([0, 1])),
    ),
    "SegmentationHead": (lambda: SegmentationHead((4, 4, 4, 4), 4, 3), (STAGES,)),
    "SelfGuidedGate": (lambda: SelfGuidedGate(4), (MAPS,)),
    "SelfQueryHub": (lambda: SelfQueryHub(4, 2), (MAPS,)),
    "MixTransformer": (lambda: MixTransformer("b0"), (torch.randn(1, 3, 32, 32),)),
    "EQUISeg": (
        lambda: EQUISeg.from_name("b0", modalities=("rgb", "depth"), decoder_dim=8),
        (torch.randn(2, 1, 3, 32, 32),),
    ),
}


def test_every_layer_is_here() -> None:
    layers = {n for n in equiseg_fast.nn.__all__ if inspect.isclass(getattr(equiseg_fast.nn, n))}
    # Dropping paths is made of plain operators.
    assert set(LAYERS) == layers - {"DropPath"} | {"MixTransformer", "EQUISeg"}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Any, ...]]:
    make, inputs = LAYERS[request.param]
    return make().eval(), inputs


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:You are using the legacy")
def test_layers(layer: tuple[nn.Module, tuple[Any, ...]]) -> None:
    module, inputs = layer
    module(*inputs)
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.trace(module, inputs)
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.script(nn.Sequential(module))
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.onnx.export(module, inputs, "unwritten.onnx", dynamo=False)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore:.*is deprecated")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    operation = OPERATIONS[name]
    first, *rest = (inputs := operation.inputs())
    others = {n: inputs[n] for n in rest}
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.trace(lambda x: operation.function(**{first: x}, **others), inputs[first])
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.script(operation.function)


def scripted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.depthwise_conv_gelu(x, weight, bias, 4, 4)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_operations_inside_of_what_is_scripted() -> None:
    with pytest.raises(RuntimeError, match=SENTENCE):
        torch.jit.script(scripted)

"""What PyTorch's `FlopCounterMode` counts for the operations."""

import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from equiseg_fast.ops import _registry
from tests.every_operation import OPERATIONS
from tests.operations import Sizes, needs_interpreter

ROOT = Path(__file__).parent.parent
SIZES = Sizes(modalities=2, batch=1, height=2, width=4, channels=2, classes=2)
X = 2 * 4 * 2
"""Elements of the tokens of one image and modality."""


def count(name: str, backend: str) -> tuple[int, int]:
    """Of a forward with a graph, and of its backward to all inputs."""
    operation = OPERATIONS[name]
    inputs = operation.inputs(SIZES)
    leaves = [inputs[n].requires_grad_() for n in operation.shapes(SIZES)]
    with FlopCounterMode(display=False) as forward:
        out = operation.function(**inputs, backend=backend)
    total = sum(o.sum() for o in ((out,) if isinstance(out, Tensor) else out))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(total, leaves, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()


def test_every_registered_operation_has_a_formula() -> None:
    for name in _registry.LAUNCHERS:
        assert getattr(torch.ops.equiseg_fast, name) in flop_registry


def test_whoever_imports_first() -> None:
    """The counter imports Triton, which importing us must not."""
    code = (
        "import sys, equiseg_fast, torch\n"
        "assert 'triton' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.equiseg_fast.attention_fwd in flop_registry\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("attention", 2 * 2 * (2 * X * 2), 5 * 2 * (2 * X * 2)),  # 2 keys, 2 heads
        ("depthwise_conv_gelu", 18 * X, 3 * 18 * X),
        ("add_layer_norm", 0, 0),
        ("query_hub", 18 * 2 * X, 2 * 18 * 2 * X),
        ("pooling_mixer", 98 * X, 2 * 98 * X),
        ("guided_gate", 0, 0),
        ("class_prototypes", 2 * 2 * 2 * X, 0),
        ("upsample_cross_entropy", 0, 0),
    ],
)
def test_kernels(name: str, forward: int, backward: int) -> None:
    assert count(name, "triton") == (forward, backward)
    # The reference has a second, 1x1 convolution in the hub.
    again = 2 * 2 * X if name == "query_hub" else 0
    assert count(name, "reference")[0] == forward + again


@needs_interpreter
def test_nothing_counts_twice() -> None:
    """Products count by themselves, the operation between them by its formula."""
    shapes = OPERATIONS["mix_ffn"].shapes(SIZES)
    products = 2 * 8 * (prod(shapes["fc1_weight"]) + prod(shapes["fc2_weight"]))
    middle = 18 * 8 * shapes["dw_bias"][0]
    assert count("mix_ffn", "triton") == (products + middle, 2 * products + 3 * middle)


@pytest.mark.parametrize("name", ["attention", "depthwise_conv_gelu", "query_hub", "mix_ffn"])
def test_stock_operators(name: str) -> None:
    """The same products and convolutions as the kernels, though PyTorch's counter lacks its own
    attention of the CPU. (Of the gradient of a depthwise weight it counts all pairs of channels.)
    """
    forward, backward = count(name, "torch")
    expected = {"attention": 8 * X * 2, "depthwise_conv_gelu": 18 * X, "query_hub": 36 * X}
    assert forward == expected.get(name, count("mix_ffn", "reference")[0])
    assert backward >= 2 * forward


def test_partial_gradients_of_attention() -> None:
    q, k = torch.randn(1, 8, 2, 2), torch.randn(1, 2, 2, 2)
    product = 2 * q.numel() * 2
    args = (q, None, q, k, k, q, q[..., 0].mT.contiguous(), 1.0, False)
    for needs, products in (((True, True, True), 5), ((False, False, True), 2)):
        with FlopCounterMode(display=False) as counter:
            torch.ops.equiseg_fast.attention_bwd(*args, *needs)
        assert counter.get_total_flops() == products * product

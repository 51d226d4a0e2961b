"""Every public operation with small inputs, for tests that go over all of them."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from equiseg_fast import ops, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import random_normal

needs_interpreter = pytest.mark.skipif(
    not _backend.INTERPRET, reason="kernels on CPU tensors need TRITON_INTERPRET=1"
)


MEAN = 3.0
"""Of the features in every parity test: rounding what has an offset shows where it should not be
rounded, and centred numbers hide it."""


class Sizes(NamedTuple):
    """What the inputs of an operation are made of; each uses what it needs."""

    modalities: int = 3
    batch: int = 2
    height: int = 3
    width: int = 4
    channels: int = 6
    classes: int = 5
    factor: int = 2


Shapes = dict[str, tuple[int, ...]]


class Operation(NamedTuple):
    """shapes: of the floating inputs, all differentiable; others: labels, masks, sizes, numbers,
    from a seed; fp32: floating inputs that are fp32 for half-precision features; kinds and
    contraction: as for `check_op_parity`; centred: floating inputs without a mean."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: Callable[[Sizes], Shapes]
    others: Callable[[Sizes, int], dict[str, Any]] = lambda sizes, seed: {}
    fp32: tuple[str, ...] = ()
    kinds: dict[str, str] = {}  # noqa: RUF012 (never changed)
    contraction: Callable[[Sizes], int | None] = lambda sizes: None
    centred: tuple[str, ...] = ()

    def inputs(
        self,
        sizes: Sizes = Sizes(),  # noqa: B008 (immutable)
        dtype: torch.dtype = torch.float32,
        layout: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Keyword arguments; `layout` gives every floating input its memory."""
        tensors = {}
        for i, (name, shape) in enumerate(self.shapes(sizes).items()):
            wide = torch.float32 if name in self.fp32 and dtype.itemsize < 4 else dtype
            # Weights as a network has them: what they make has the size of what they take.
            fan_in = prod(shape[1:]) if name.endswith("weight") else 1
            centred = name in self.centred or name.endswith(("weight", "bias"))
            mean = 0.0 if centred else MEAN
            x = random_normal(shape, wide, seed=100 * seed + i, scale=fan_in**-0.5, mean=mean)
            tensors[name] = layout(x)
        return {**tensors, **self.others(sizes, seed)}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _map_size(s: Sizes, seed: int) -> dict[str, Any]:
    return {"height": s.height, "width": s.width}


def _present(s: Sizes, seed: int) -> dict[str, Any]:
    """A mask with at least one modality in every image."""
    mask = torch.rand(s.modalities, s.batch, generator=_generator(seed)) < 0.7
    mask[seed % s.modalities] = True
    return {"present": mask}


def _labels(classes: int, *size: int, seed: int) -> Tensor:
    labels = torch.randint(0, classes + 1, size, generator=_generator(seed))
    return labels.masked_fill(labels == classes, 255)


def _tokens(s: Sizes) -> tuple[int, ...]:
    return (s.batch, s.height * s.width, s.channels)


def _attention_shapes(s: Sizes) -> Shapes:
    keys = (s.batch, max(1, s.height * s.width // 4), 2, s.channels)
    return {"q": (s.batch, s.height * s.width, 2, s.channels), "k": keys, "v": keys}


def _hub_shapes(s: Sizes) -> Shapes:
    m, c = s.modalities, s.channels
    nets = {"dw_weight": (m, c, 3, 3), "dw_bias": (m, c), "pw_weight": (m, c), "pw_bias": (m,)}
    return {"x": (m, *_tokens(s)), **nets}


def _mix_ffn_shapes(s: Sizes) -> Shapes:
    c, hidden, out = s.channels, 2 * s.channels + 1, s.channels + 1
    return {
        "x": _tokens(s), "fc1_weight": (hidden, c), "fc1_bias": (hidden,),
        "dw_weight": (hidden, 1, 3, 3), "dw_bias": (hidden,), "fc2_weight": (out, hidden),
        "fc2_bias": (out,),
    }  # fmt: skip


def _stencil_shapes(side: int) -> Callable[[Sizes], Shapes]:
    def shapes(s: Sizes) -> Shapes:
        return {"x": _tokens(s), "weight": (s.channels, 1, side, side), "bias": (s.channels,)}

    return shapes


def _class_labels(s: Sizes, seed: int) -> dict[str, Any]:
    size = s.batch, s.factor * s.height, s.factor * s.width
    labels = {"labels": _labels(s.classes, *size, seed=seed), "num_classes": s.classes}
    return {**labels, **_map_size(s, seed)}


def _pixel_labels(s: Sizes, seed: int) -> dict[str, Any]:
    size = s.batch, s.factor * s.height + 1, s.factor * s.width
    return {"labels": _labels(s.classes, *size, seed=seed)}


OPERATIONS: dict[str, Operation] = {
    "attention": Operation(
        ops.attention, reference.attention, _attention_shapes,
        contraction=lambda s: min(s.channels, s.height * s.width // 4),
        # The kernels take dq from differences with the rounded result, which is to have no offset.
        centred=("v",),
    ),
    "depthwise_conv_gelu": Operation(
        ops.depthwise_conv_gelu, reference.depthwise_conv_gelu, _stencil_shapes(3), _map_size,
        kinds={"dweight": "parameter", "dbias": "parameter"},
    ),
    "add_layer_norm": Operation(
        ops.add_layer_norm, reference.add_layer_norm,
        lambda s: {
            "x": _tokens(s), "update": _tokens(s), "weight": (s.channels,), "bias": (s.channels,)
        },
        kinds={"dweight": "parameter", "dbias": "parameter"},
        contraction=lambda s: 0 if s.channels < 8 else 8, centred=("update",),
    ),
    "mix_ffn": Operation(
        ops.mix_ffn, reference.mix_ffn, _mix_ffn_shapes, _map_size,
        kinds=dict.fromkeys(
            ("dfc1_weight", "dfc1_bias", "ddw_weight", "ddw_bias", "dfc2_weight", "dfc2_bias"),
            "parameter",
        ),
        contraction=lambda s: s.channels,
    ),
    "query_hub": Operation(
        ops.query_hub, reference.query_hub, _hub_shapes,
        lambda s, seed: {**_map_size(s, seed), **_present(s, seed)},
        kinds=dict.fromkeys(
            ("ddw_weight", "ddw_bias", "dpw_weight", "dpw_bias"), "parameter"
        ),
    ),
    "pooling_mixer": Operation(
        ops.pooling_mixer, reference.pooling_mixer, _stencil_shapes(7), _map_size,
        kinds={"dweight": "parameter", "dbias": "parameter"},
    ),
    "guided_gate": Operation(
        ops.guided_gate, reference.guided_gate,
        lambda s: {
            "x": (s.modalities, *_tokens(s)), "logits": (s.modalities, s.batch, s.channels)
        },
        _present, fp32=("logits",),
        kinds={"dlogits": "parameter"},
    ),
    "class_prototypes": Operation(
        ops.class_prototypes, reference.class_prototypes,
        lambda s: {"x": (s.modalities, *_tokens(s))}, _class_labels,
        kinds={"out0": "statistic"},
    ),
    "upsample_cross_entropy": Operation(
        ops.upsample_cross_entropy, reference.upsample_cross_entropy,
        lambda s: {"logits": (s.batch, s.classes, s.height, s.width)}, _pixel_labels,
        kinds={"out": "statistic"},
    ),
    "ohem": Operation(
        ops.ohem, reference.ohem,
        lambda s: {"loss": (s.batch, s.height, s.width)},
        lambda s, seed: {
            "valid": torch.rand(s.batch, s.height, s.width, generator=_generator(seed)) < 0.8
        },
    ),
}  # fmt: skip

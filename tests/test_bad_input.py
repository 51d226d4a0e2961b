"""What every public function says to bad input: which error, and which argument it names.

Each table starts from arguments that work and changes some. Nothing raw may come through: no
AssertionError, no IndexError, no RuntimeError from inside PyTorch. The operations' own tests have
more on what is theirs alone.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equiseg_fast
from equiseg_fast import EQUISeg, load_backbone, testing
from equiseg_fast import integrations as foreign
from equiseg_fast import nn as layers
from tests.every_operation import OPERATIONS

Change = Callable[[Any], Any]


def half_precision(x: Tensor) -> Tensor:
    return x.to(torch.float16)


def integers(x: Tensor) -> Tensor:
    return x.long()


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def one_more_dimension(x: Tensor) -> Tensor:
    return x[None]


def one_longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], dim=-1)


def a_list(x: Tensor) -> list:
    return x.tolist()


CHANGES: dict[Change, type[Exception]] = {
    a_list: TypeError,
    integers: TypeError,
    one_more_dimension: ValueError,
    one_longer: ValueError,
    on_meta: ValueError,
}


# Sizes that no other argument has to agree with.
FINE = {
    ("class_prototypes", "x", one_longer),
    ("upsample_cross_entropy", "logits", one_longer),
    ("upsample_cross_entropy", "labels", one_longer),
}


def tensor_arguments() -> list[tuple[str, str, Change]]:
    found = []
    for name, operation in OPERATIONS.items():
        for argument, x in operation.inputs().items():
            if isinstance(x, Tensor):
                found += [(name, argument, c) for c in CHANGES if (name, argument, c) not in FINE]
    return found


@pytest.mark.parametrize(("name", "argument", "change"), tensor_arguments())
def test_tensors_of_operations(name: str, argument: str, change: Change) -> None:
    operation = OPERATIONS[name]
    inputs = operation.inputs()
    if change is integers and not inputs[argument].is_floating_point():
        change, expected = half_precision, TypeError  # labels and masks
    else:
        expected = CHANGES[change]
    inputs[argument] = change(inputs[argument])
    # The first tensor is what the others are compared with.
    first = next(iter(inputs))
    others = "|".join(rf"\b{n}\b" for n in inputs)
    named = rf"\b{argument}\b" if argument != first else others
    with pytest.raises(expected, match=named) as error:
        operation.function(**inputs)
    assert "must" in str(error.value)
    assert "got" in str(error.value)


SIZED = [name for name, o in OPERATIONS.items() if "height" in o.inputs()]


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", ["height", "width"])
@pytest.mark.parametrize(
    ("value", "expected", "message"),
    [
        (0, ValueError, "{} must be at least 1; got 0"),
        (-3, ValueError, "{} must be at least 1; got -3"),
        (2.0, TypeError, r"{} must be an integer; got 2\.0"),
        ("3", TypeError, "{} must be an integer; got '3'"),
        (None, TypeError, "{} must be an integer; got None"),
        (5, ValueError, "x must have height \\* width = .* tokens; got 12"),
    ],
)
def test_sizes_of_operations(
    name: str, size: str, value: Any, expected: type[Exception], message: str
) -> None:
    inputs = {**OPERATIONS[name].inputs(), size: value}
    with pytest.raises(expected, match=message.format(size)):
        OPERATIONS[name].function(**inputs)


@pytest.mark.parametrize(
    ("name", "changes", "expected", "message"),
    [
        ("attention", {"scale": "large"}, TypeError, "scale must be a number; got 'large'"),
        ("add_layer_norm", {"eps": 0.0}, ValueError, r"eps must be positive; got 0\.0"),
        ("add_layer_norm", {"eps": "x"}, TypeError, "eps must be a number; got 'x'"),
        ("guided_gate", {"rho": "x"}, TypeError, "rho must be a number; got 'x'"),
        ("class_prototypes", {"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ("class_prototypes", {"num_classes": 2.5}, TypeError, "num_classes must be an integer"),
        ("class_prototypes", {"ignore_index": "x"}, TypeError, "ignore_index must be an integer"),
        ("upsample_cross_entropy", {"ignore_index": None}, TypeError, "ignore_index must be"),
        ("upsample_cross_entropy", {"labels": torch.full((2, 7, 8), 77)}, ValueError,
         r"labels must be 0\.\.4 or 255 \(ignore_index\); got 77"),
        ("upsample_cross_entropy", {"labels": torch.full((2, 7, 8), -1)}, ValueError,
         r"labels must be 0\.\.4 or 255 \(ignore_index\); got -1"),
        ("ohem", {"thresh": 0.0}, ValueError, r"thresh must be in \(0, 1\]; got 0\.0"),
        ("ohem", {"thresh": "x"}, TypeError, "thresh must be a number; got 'x'"),
        ("ohem", {"min_kept_ratio": 0}, ValueError, "min_kept_ratio must be at least 1; got 0"),
        ("ohem", {"min_kept_ratio": 1.5}, TypeError, "min_kept_ratio must be an integer"),
        *((name, {"backend": "cuda"}, ValueError, "backend must be one of triton, torch")
          for name in OPERATIONS if name != "ohem"),
    ],
)  # fmt: skip
def test_numbers_of_operations(
    name: str, changes: dict, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        OPERATIONS[name].function(**{**OPERATIONS[name].inputs(), **changes})


# ---- layers -------------------------------------------------------------------------------------

TOKENS, MAP = torch.randn(2, 24, 16), torch.randn(2, 16, 6, 4)
MANY, MAPS = torch.randn(3, 2, 24, 16), torch.randn(3, 2, 16, 6, 4)
LABELS = torch.zeros(2, 12, 8, dtype=torch.long)
ORDER = torch.tensor([1, 0, 2])


def attention() -> nn.Module:
    return layers.EfficientSelfAttention(16, 2, 2)


def cross() -> nn.Module:
    return layers.CrossModalAttention(16, 2, 2)


def ffn() -> nn.Module:
    return layers.MixFFN(16, 24)


def mixer() -> nn.Module:
    return layers.ParallelPoolingMixer(16, 2)


def hub() -> nn.Module:
    return layers.SelfQueryHub(16, 3)


def gate() -> nn.Module:
    return layers.SelfGuidedGate(16)


def block() -> nn.Module:
    return layers.CrossModalBlock(16, 3, 2, 2)


def prototypes() -> nn.Module:
    return layers.PrototypeLoss(5)


def head() -> nn.Module:
    return layers.SegmentationHead([4, 8, 12, 16], 8, 3)


STAGES = [torch.randn(2, 4 * (s + 1), 8 >> s, 8 >> s) for s in range(4)]
MORE_ROWS = torch.randn(3, 8, 4, 4)
STAGE_TOKENS = [x.flatten(2).mT for x in STAGES]
SIZES = [(8 >> s, 8 >> s) for s in range(4)]
Call = tuple[Callable[[], nn.Module], tuple, dict, type[Exception], str]

ONE_FEATURE: list[Call] = [
    case
    for build in (attention, ffn, mixer)
    for case in (
        (build, (TOKENS,), {}, TypeError, r"must be given for tokens x \[B, L, C\]"),
        (build, (TOKENS, 6), {}, TypeError, "got height=6, width=None"),
        (build, (MAP, 6, 4), {}, TypeError, "must be left out for a map x .*got height=6, width=4"),
        (build, (MAP,), {"width": 4}, TypeError, "got height=None, width=4"),
        (build, (TOKENS, 5, 4), {}, ValueError, "x must have height . width = 5 . 4 = 20 tokens"),
        (build, (TOKENS, 0, 4), {}, ValueError, "height must be at least 1; got 0"),
        (build, (TOKENS, 6.0, 4), {}, TypeError, r"height must be an integer; got 6\.0"),
        (build, (TOKENS[0], 6, 4), {}, ValueError, r"x must have shape \[B, L, C\] \(tokens\)"),
        (build, (MAPS,), {}, ValueError, r"or \[B, C, H, W\] \(a map\); got \[3, 2, 16, 6, 4\]"),
        (build, ([1.0],), {}, TypeError, "x must be a tensor, tokens .* or a map .*; got list"),
        (build, (MAP.long(),), {}, TypeError, "x must have dtype float64, .*; got int64"),
        (build, (MAP[:, :8],), {}, ValueError, "x must have dim = 16 channels; got 8"),
        (build, (MAP[..., :0],), {}, ValueError, "x must have at least one position"),
    )
]  # fmt: skip
MORE: list[Call] = [
    (attention, (MAP[..., :1],), {}, ValueError, "height and width must be at least sr_ratio = 2"),
    (cross, (MAP, TOKENS), {}, ValueError, "source must have the shape of x"),
    (cross, (TOKENS, TOKENS[:, :20], 6, 4), {}, ValueError, "source must have the shape of x"),
    (cross, (TOKENS, TOKENS), {}, TypeError, "height and width must be given"),
    (cross, (TOKENS, None, 6, 4), {}, TypeError, "source must be a tensor, .*; got NoneType"),
    (cross, (None, TOKENS, 6, 4), {}, TypeError, "x must be a tensor, .*; got NoneType"),
    (mixer, (MAP,), {"rows": torch.ones(2)}, TypeError, "rows must have dtype bool; got float32"),
    (mixer, (MAP,), {"rows": torch.ones(3, dtype=torch.bool)}, ValueError, "rows must have shape"),
    (hub, (MANY,), {}, TypeError, r"given for tokens x \[M, B, L, C\]"),
    (hub, (MAPS, 6, 4), {}, TypeError, "must be left out for a map x"),
    (hub, (TOKENS, 6, 4), {}, ValueError, r"x must have shape \[M, B, L, C\] \(tokens\)"),
    (hub, (MAPS[:2],), {}, ValueError, "subset must choose one of the 3 .* each of the 2"),
    (hub, (MAPS[:2],), {"subset": (0, 3)}, ValueError, r"subset must .* got \(0, 3\)"),
    (hub, (MAPS[:2],), {"subset": (0, 1, 2)}, ValueError, "subset must choose"),
    (hub, (MAPS,), {"present": torch.ones(3, 2)}, TypeError, "present must have dtype bool"),
    (hub, (MAPS[:, :, :8],), {}, ValueError, "x must have dim = 16 channels; got 8"),
    (gate, (MAP[0],), {}, ValueError, r"x must have shape \[M, B, L, C\] \(tokens\) or"),
    (gate, (MAPS[:, :, :8],), {}, ValueError, "x must have dim = 16 channels; got 8"),
    (gate, (MAPS[:0],), {}, ValueError, "x must have at least one modality"),
    (gate, (MAPS,), {"present": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "present must"),
    (gate, ("x",), {}, TypeError, "x must be a tensor, .* got str"),
    (block, (MAPS, MANY), {}, ValueError, "encoded must have the shape of embedded"),
    (block, (MANY, MANY), {}, TypeError, "height and width must be given for tokens encoded"),
    (block, (MAPS, MAPS), {"present": [[True]]}, TypeError, "present must be a tensor"),
    (block, (MAPS, None), {}, TypeError, "encoded must be a tensor, .*; got NoneType"),
    (prototypes, (MANY, LABELS, ORDER), {}, TypeError, "height and width must be given"),
    (prototypes, (MAPS, LABELS[:, :11], ORDER), {}, ValueError, "labels must have shape"),
    (prototypes, (MAPS, LABELS.float(), ORDER), {}, TypeError, "labels must have dtype"),
    (prototypes, (MAPS, LABELS, ORDER[:2]), {}, ValueError, r"order must have shape \[M\] = \[3\]"),
    (prototypes, (MAPS, LABELS, [0, 1, 2]), {}, TypeError, "order must be a tensor"),
    (prototypes, (MAPS, LABELS, ORDER.float()), {}, TypeError, "order must have dtype int64"),
    (head, (STAGES[:3],), {}, ValueError, "features must have four stages; got 3"),
    (head, (STAGE_TOKENS,), {}, TypeError, r"sizes must be given for tokens features\[0\]"),
    (head, (STAGES, SIZES), {}, TypeError, r"left out for a map features\[0\]"),
    (head, (STAGE_TOKENS, SIZES[:2]), {}, ValueError, "sizes must have four stages; got 2"),
    (head, (STAGE_TOKENS, [(8, 7), *SIZES[1:]]), {}, ValueError, r"features\[0\] must have height"),
    (head, (STAGE_TOKENS, [None, *SIZES[1:]]), {}, TypeError,
     r"sizes\[0\] must be \(height, width\); got None"),
    (head, (STAGE_TOKENS, [*SIZES[:3], (1,)]), {}, TypeError, r"sizes\[3\] must .*; got \(1,\)"),
    (head, ([*STAGES[1:], STAGES[0]],), {}, ValueError, r"features\[0\] must have 4 chan"),
    (head, ([*STAGES[:3], STAGES[3][:1]],), {}, ValueError,
     r"features\[3\] must have the batch size of features\[0\], 2; got 1"),
    (head, ([STAGES[0], MORE_ROWS, *STAGES[2:]],), {}, ValueError,
     r"features\[1\] must have the batch size of features\[0\], 2; got 3"),
    (lambda: layers.PatchEmbed(3, 8, 3, 2), (MAP,), {}, ValueError, "3 channels; got 16"),
    (lambda: layers.PatchEmbed(3, 8, 3, 2), (TOKENS,), {}, ValueError, "x must have shape"),
    (lambda: layers.DepthwiseConv(16), (TOKENS,), {}, TypeError, "height and width must be given"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "args", "kwargs", "expected", "message"), ONE_FEATURE + MORE)
def test_layers(
    build: Callable, args: tuple, kwargs: dict, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        build()(*args, **kwargs)


@pytest.mark.parametrize(
    ("build", "expected", "message"),
    [
        (lambda: layers.CrossModalAttention(16, 3), ValueError, "dim must be a multiple of heads"),
        (lambda: layers.CrossModalAttention(16, 0), ValueError, "heads must be at least 1; got 0"),
        (lambda: layers.CrossModalAttention(16, 2, 0), ValueError, "sr_ratio must be at least 1"),
        (lambda: layers.EfficientSelfAttention(1.5, 1), TypeError, "dim must be an integer"),
        (lambda: layers.MixFFN(16, 0), ValueError, "hidden must be at least 1"),
        (lambda: layers.DepthwiseConv(0), ValueError, "dim must be at least 1"),
        (lambda: layers.DropPath(1.0), ValueError, r"rate must be in \[0, 1\); got 1"),
        (lambda: layers.ParallelPoolingMixer(16, 0), ValueError, "ratio must be at least 1"),
        (lambda: layers.ParallelPoolingMixer(16, 2, -0.1), ValueError, "drop_path must be"),
        (lambda: layers.SelfQueryHub(16, 0), ValueError, "modalities must be at least 1"),
        (lambda: layers.SelfGuidedGate(2), ValueError, "reduction must be at most dim = 2; got 4"),
        (lambda: layers.SelfGuidedGate(16, tau=0.0), ValueError, "tau must be positive; got 0"),
        (lambda: layers.SelfGuidedGate(16, tau="x"), TypeError, "tau must be a number; got 'x'"),
        (lambda: layers.MixFFN("16", 8), TypeError, "dim must be an integer; got '16'"),
        (lambda: layers.PrototypeLoss(0), ValueError, "num_classes must be at least 1"),
        (lambda: layers.PrototypeLoss(5, tau=-1.0), ValueError, "tau must be positive; got -1"),
        (lambda: layers.SegmentationHead([4, 8], 8, 3), ValueError, "in_channels must have four"),
        (lambda: layers.SegmentationHead([4, 8, 0, 4], 8, 3), ValueError, "in_channels must be"),
        (lambda: layers.SegmentationHead([4] * 4, 8, 0), ValueError, "num_classes must be at le"),
        (lambda: layers.PatchEmbed(3, 8, 3, 0), ValueError, "stride must be at least 1"),
        (lambda: layers.CrossModalBlock(16, 3, 2, 2, ppx_ratio=0), ValueError, "ppx_ratio must"),
    ],
)  # fmt: skip
def test_building_layers(build: Callable, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        build()


def test_layers_take_sizes_of_numpy() -> None:
    sixteen, two = np.int64(16), np.int32(2)
    assert layers.EfficientSelfAttention(sixteen, two, two)(TOKENS, 6, 4).shape == TOKENS.shape
    assert layers.MixFFN(sixteen, two)(TOKENS, 6, 4).shape == TOKENS.shape
    with pytest.raises(ValueError, match="dim must be at least 1; got 0"):
        layers.DepthwiseConv(np.int64(0))


# ---- the dtype of a layer -----------------------------------------------------------------------

DOORS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "attention": (attention(), {"x": MAP}),
    "cross": (cross(), {"x": MAP, "source": MAP}),
    "ffn": (ffn(), {"x": MAP}),
    "mixer": (mixer(), {"x": MAP}),
    "depthwise": (layers.DepthwiseConv(16), {"x": MAP}),
    "embed": (layers.PatchEmbed(16, 8, 3, 2), {"x": MAP}),
    "block": (block(), {"embedded": MAPS, "encoded": MAPS}),
    "head": (head(), {"features": STAGES}),
}


def to(dtype: torch.dtype, given: Any) -> Any:
    return given.to(dtype) if isinstance(given, Tensor) else [x.to(dtype) for x in given]


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_that_is_not_the_layers(name: str, dtype: torch.dtype) -> None:
    layer, inputs = DOORS[name]
    for argument, given in inputs.items():
        message = rf"^{argument}.* must have the dtype of the layer, torch.float32; got {dtype}"
        with pytest.raises(TypeError, match=message):
            layer(**{**inputs, argument: to(dtype, given)})
    # Autocast casts half precision, and neither from nor to fp64.
    with torch.autocast("cpu", torch.bfloat16):
        if dtype is not torch.float64:
            layer(**{argument: to(dtype, given) for argument, given in inputs.items()})
            return
        with pytest.raises(TypeError, match="must have the dtype of the layer"):
            layer(**{argument: to(dtype, given) for argument, given in inputs.items()})
    copy = deepcopy(layer).double()
    copy(**{argument: to(dtype, given) for argument, given in inputs.items()})


def test_a_child_that_is_not_plain_takes_what_it_takes() -> None:
    """Whoever casts in a hook, or has quantised weights, is not asked for the dtype of those."""
    layer = layers.MixFFN(16, 24)

    def widen(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0].float()

    layer.fc1.register_forward_pre_hook(widen)
    assert layer(MAP.half()).dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that another package will have this
        quantised = torch.ao.quantization.quantize_dynamic(layers.MixFFN(16, 24), {nn.Linear})
    assert quantised(MAP).dtype == torch.float32


# ---- models, integrations, testing --------------------------------------------------------------

MODEL = EQUISeg.from_name("b0", modalities=("rgb", "depth"), num_classes=5)
IMAGES = torch.randn(2, 1, 3, 32, 32)
TARGETS = torch.zeros(1, 32, 32, dtype=torch.long)
Q = torch.randn(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("call", "expected", "message"),
    [
        (lambda: MODEL(None), TypeError, "images must be a mapping or a tensor; got NoneType"),
        (lambda: MODEL(IMAGES[0]), ValueError, r"images must have shape \[M, B, 3, H, W\]"),
        (lambda: MODEL(IMAGES.half()), TypeError, "images must have the model's dtype"),
        (lambda: MODEL({n: x.double() for n, x in zip(("rgb", "depth"), IMAGES, strict=True)}),
         TypeError, r"images\['rgb'\] must have the model's dtype"),
        (lambda: EQUISeg.from_name("b0", modalities="rgb"), TypeError,
         "modalities must be a sequence of names; got 'rgb'"),
        (lambda: MODEL.loss(IMAGES, TARGETS, order=torch.tensor([0, 0])), ValueError,
         r"order must be a permutation of 0\.\.1; got \[0, 0\]"),
        (lambda: MODEL(IMAGES.to("meta")), ValueError, "images must be on the model's device"),
        (lambda: MODEL({"rgb": IMAGES[0]}), ValueError, "images lacks modality 'depth'"),
        (lambda: MODEL(IMAGES, present={"lidar"}), ValueError, "unknown modality 'lidar'"),
        (lambda: MODEL(IMAGES, present=3), TypeError, "present must be a bool mask"),
        (lambda: MODEL(IMAGES, present=torch.zeros(2, 1, dtype=torch.bool)), ValueError,
         "present must keep a modality of every image; image 0 has none"),
        (lambda: MODEL.loss(IMAGES, TARGETS + 7), ValueError, "labels must be 0..4 or 255"),
        (lambda: MODEL.loss(IMAGES, TARGETS[:, :31]), ValueError, "labels must have shape"),
        (lambda: MODEL.loss(IMAGES, TARGETS.float()), TypeError, "labels must have dtype"),
        (lambda: MODEL.loss(IMAGES, None), TypeError, "labels must be a tensor"),
        (lambda: EQUISeg.from_name("b9"), ValueError, "variant must be one of"),
        (lambda: EQUISeg.from_name("b0", num_classes=0), ValueError, "num_classes must be"),
        (lambda: EQUISeg.from_name("b0", modalities=()), ValueError, "modalities must"),
        (lambda: equiseg_fast.MixTransformer("b9"), ValueError, "variant must be one of"),
        (lambda: equiseg_fast.MixTransformer("b0")(MAP), ValueError, "3 channels; got 16"),
        (lambda: load_backbone(nn.Linear(2, 2), {}), TypeError, "model must be"),
        (lambda: load_backbone(MODEL, 7), TypeError, "be a mapping .* got int"),
        (lambda: load_backbone(MODEL, Path("/nowhere.pth")), FileNotFoundError, "nowhere"),
        (lambda: foreign.accelerate_module({}, ()), TypeError, "model must be a torch.nn.Module"),
        (lambda: foreign.accelerate_segformer(nn.ReLU()), ValueError, "model must contain"),
        (lambda: foreign.revert(None), TypeError, "model must be a torch.nn.Module; got NoneType"),
        (lambda: equiseg_fast.ops.explain("no"), ValueError, "op must be one of"),
        (lambda: equiseg_fast.ops.explain("attention"), TypeError,
         r"^attention\(\) missing .* 'q', 'k', and 'v'"),
        (lambda: equiseg_fast.ops.explain("attention", Q), TypeError,
         r"^attention\(\) missing .* 'k' and 'v'"),
        (lambda: equiseg_fast.ops.explain("attention", Q, Q, Q[0]), ValueError, "v must have sh"),
        (lambda: equiseg_fast.ops.explain("mix_ffn", TOKENS, 1), TypeError, "missing"),
        (lambda: testing.with_layout(MAP, "strange"), ValueError, "layout must be one of"),
        (lambda: testing.random_normal((2,), seed=0, layout="transposed"), ValueError, "layout"),
        (lambda: testing.assert_deterministic(lambda: MAP, 1), ValueError, "repeats must be"),
        (lambda: testing.check_op_parity(torch.relu, torch.relu, {"x": MAP}, differentiable=["y"]),
         ValueError, "differentiable must name"),
    ],
)  # fmt: skip
def test_the_rest(call: Callable, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        call()

"""Every argument of every public callable, replaced by every kind of nonsense.

What comes of it is an error of ours, TypeError or ValueError, that names the argument; or the call
is right to accept it, for a reason in `ACCEPTED`. Arguments are those of the signatures, so that a
new one is tried without being listed here; a new callable fails until its arguments are.
"""

import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equiseg_fast
from equiseg_fast import integrations, models, ops, testing
from equiseg_fast import nn as layers
from tests.every_operation import OPERATIONS

# ---- kinds of nonsense --------------------------------------------------------------------------

GENERIC: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "NaN of NumPy": lambda: np.float32("nan"),
    "str": lambda: "x",
    "empty str": lambda: "",
    "bytes": lambda: b"x",
    "True": lambda: True,
    "True of NumPy": lambda: np.bool_(True),
    "1.5": lambda: 1.5,
    "1j": lambda: 1j,
    "2**40": lambda: 2**40,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "0": lambda: 0,
    "-1": lambda: -1,
    "[]": list,
    "()": tuple,
    "{}": dict,
    "set": set,
    "list of a float": lambda: [1.5],
    "list of None": lambda: [None],
    "list of str": lambda: ["x"],
    "object": object,
    "class": lambda: int,
    "module": lambda: torch,
    "generator": lambda: (i for i in (1, 2)),
    "array": lambda: np.ones(3),
    "0-d array": lambda: np.array(1),
    "0-d tensor of int": lambda: torch.tensor(1),
    "0-d tensor of float": lambda: torch.tensor(0.5),
    "tensor": lambda: torch.ones(3),
}

DTYPES = {
    "int64": torch.int64,
    "bool": torch.bool,
    "uint16": torch.uint16,
    "uint64": torch.uint64,
    "complex64": torch.complex64,
    "float8": torch.float8_e4m3fn,
    "float16": torch.float16,
    "float64": torch.float64,
}

OF_A_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    **{name: partial(Tensor.to, dtype=dtype) for name, dtype in DTYPES.items()},
    "rank + 1": lambda x: x[None],
    "rank - 1": lambda x: x[0],
    "empty": lambda x: x[:0],
    "empty in its last dimension": lambda x: x[..., :0],
    "of no dimension that fits": lambda x: x.new_ones(0),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "list": Tensor.tolist,
    "numpy": Tensor.numpy,
}  # fmt: skip


def kinds_for(value: Any) -> Iterator[tuple[str, Any]]:
    """Nonsense in the place of a value that works, by kind."""
    for kind, make in GENERIC.items():
        yield kind, make()
    if isinstance(value, Tensor):
        for kind, change in OF_A_TENSOR.items():
            if value.dtype != DTYPES.get(kind):
                yield f"tensor: {kind}", change(value.detach())
    elif isinstance(value, (list, tuple)) and value:
        for kind, element in kinds_for(value[0]):
            yield f"[{kind}, ..]", type(value)([element, *value[1:]])
        yield "one too many", type(value)([*value, value[0]])
    elif isinstance(value, Mapping) and value:
        first = next(iter(value))
        for kind, element in kinds_for(value[first]):
            yield f"{{{kind}, ..}}", {**value, first: element}


# ---- what is called, with arguments that work ---------------------------------------------------


class Subject(NamedTuple):
    """A callable, and arguments that work; others have their default. Calls are by keyword."""

    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


TOKENS = torch.randn(2, 16, 8)
MANY = torch.randn(2, 2, 16, 8)
SIZE = {"height": 4, "width": 4}
PRESENT = torch.tensor([[True, False], [True, True]])
STAGES = [torch.randn(2, 4, 8 >> s, 8 >> s).flatten(2).mT for s in range(4)]
SIZES = [(8 >> s, 8 >> s) for s in range(4)]
LABELS = torch.zeros(2, 8, 8, dtype=torch.long)

MODEL = models.EQUISeg.from_name("b0", modalities=("rgb", "depth"), num_classes=3)
IMAGES = {name: torch.randn(1, 3, 32, 32) for name in ("rgb", "depth")}
PIXELS = torch.zeros(1, 32, 32, dtype=torch.long)
ORDER = torch.tensor([1, 0])
GENERATOR = torch.Generator()


class Ffn(nn.Module):
    """Mix-FFN as SegFormer's authors name it, the smallest module that is taken over."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 4)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4, 2)


class Attention(nn.Module):
    """Attention, likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = 1, 1
        self.q, self.kv, self.proj = nn.Linear(2, 2), nn.Linear(2, 4), nn.Linear(2, 2)


def halve(module: Any, x: Tensor) -> Tensor:
    return x / 2


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return halve(self, x)


RULE = integrations.Rule("halving", lambda m: isinstance(m, Halve), halve, lambda m: [(TOKENS,)])


def use(**arguments: Any) -> None:
    with ops.use_backend(**arguments):
        pass


def poison(**arguments: Any) -> None:
    with testing.nan_poison(**arguments):
        pass


def override(**arguments: Any) -> None:
    # What is made is kept for good.
    with mock.patch.dict("equiseg_fast.testing.policy._OVERRIDES"):
        testing.override(**arguments)


def register(**arguments: Any) -> None:
    # Importing transformers takes longer than all the rest of this.
    with mock.patch.dict(sys.modules, {"transformers": None}), suppress(ImportError):
        integrations.register_attention(**arguments)


QUERY = torch.randn(1, 2, 3, 4)
PARITY = {"actual": TOKENS, "oracle": TOKENS.double(), "eager": TOKENS}


def build(cls: type, **arguments: Any) -> dict[str, Subject]:
    return {cls.__name__: Subject(cls, lambda: arguments)}


def method(owner: Any, name: str, **arguments: Any) -> dict[str, Subject]:
    of = owner if isinstance(owner, type) else type(owner)
    return {f"{of.__name__}.{name}": Subject(getattr(owner, name), lambda: arguments)}


SUBJECTS: dict[str, Subject] = {
    **{name: Subject(o.function, o.inputs) for name, o in OPERATIONS.items()},
    "explain": Subject(
        ops.explain, lambda: {"op": "attention", **OPERATIONS["attention"].inputs()}
    ),
    "use_backend": Subject(use, lambda: {"backend": "torch"}),
    "init_module": Subject(layers.init_module, lambda: {"module": nn.Linear(2, 2)}),
    **build(layers.CrossModalAttention, dim=8, heads=2, sr_ratio=2),
    **method(layers.CrossModalAttention(8, 2, 2), "forward", x=TOKENS, source=TOKENS, **SIZE),
    **build(layers.EfficientSelfAttention, dim=8, heads=2, sr_ratio=2),
    **method(layers.EfficientSelfAttention(8, 2, 2), "forward", x=TOKENS, **SIZE),
    **method(layers.EfficientSelfAttention, "from_torch", module=Attention()),
    **build(layers.CrossModalBlock, dim=8, modalities=2, heads=2, sr_ratio=2),
    **method(
        layers.CrossModalBlock(8, 2, 2, 2), "forward",
        embedded=MANY, encoded=MANY, **SIZE, present=PRESENT, subset=(0, 1),
    ),
    **build(layers.DepthwiseConv, dim=8),
    **method(layers.DepthwiseConv(8), "forward", x=TOKENS, **SIZE),
    **build(layers.DropPath, rate=0.5),
    **method(layers.DropPath(0.5), "forward", x=TOKENS),
    **build(layers.MixFFN, dim=8, hidden=4),
    **method(layers.MixFFN(8, 4), "forward", x=TOKENS, **SIZE),
    **method(layers.MixFFN, "from_torch", module=Ffn()),
    **build(layers.ParallelPoolingMixer, dim=8, ratio=2),
    **method(
        layers.ParallelPoolingMixer(8, 2), "forward",
        x=TOKENS, **SIZE, rows=torch.tensor([True, False]),
    ),
    **method(
        layers.ParallelPoolingMixer, "from_torch", module=layers.ParallelPoolingMixer(8, 2)
    ),
    **build(layers.PatchEmbed, in_channels=3, dim=4, kernel=3, stride=2),
    **method(layers.PatchEmbed(3, 4, 3, 2), "forward", x=torch.randn(2, 3, 8, 8)),
    **build(layers.PrototypeLoss, num_classes=3),
    **method(
        layers.PrototypeLoss(3), "forward",
        x=MANY, labels=LABELS, order=ORDER, **SIZE, present=PRESENT,
    ),
    **build(layers.SegmentationHead, in_channels=[4, 4, 4, 4], dim=4, num_classes=3),
    **method(
        layers.SegmentationHead([4, 4, 4, 4], 4, 3), "forward", features=STAGES, sizes=SIZES
    ),
    **method(
        layers.SegmentationHead, "from_torch", module=layers.SegmentationHead([4, 4, 4, 4], 4, 3)
    ),
    **build(layers.SelfGuidedGate, dim=8),
    **method(layers.SelfGuidedGate(8), "forward", x=MANY, present=PRESENT),
    **method(layers.SelfGuidedGate(8), "logits", x=MANY, present=PRESENT),
    **build(layers.SelfQueryHub, dim=8, modalities=2),
    **method(
        layers.SelfQueryHub(8, 2), "forward", x=MANY, **SIZE, present=PRESENT, subset=(0, 1)
    ),
    **method(
        layers.SelfQueryHub, "from_torch",
        module=nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2, 2, 3, 1, 1, groups=2), nn.Conv2d(2, 1, 1))]
        ),
    ),
    **build(models.EQUISegConfig),
    **method(models.EQUISegConfig, "from_dict", content=models.EQUISegConfig().to_dict()),
    **build(models.EQUISeg, config=models.EQUISegConfig(modalities=("rgb",))),
    **method(models.EQUISeg, "from_name", variant="b0", modalities=("rgb",), drop_path=0.1),
    **method(
        MODEL, "forward", images=IMAGES, present=("rgb", "depth"), labels=PIXELS,
        generator=GENERATOR, order=ORDER,
    ),
    **method(
        MODEL, "loss", images=IMAGES, present=("rgb", "depth"), labels=PIXELS,
        generator=GENERATOR, order=ORDER,
    ),
    **method(
        MODEL, "stages", images=torch.stack(list(IMAGES.values())),
        present=torch.tensor([[True], [False]]),
    ),
    **build(models.MixTransformer),
    **method(MODEL.encoder, "forward", x=torch.randn(1, 3, 32, 32)),
    **method(MODEL.encoder, "embed", stage=0, x=torch.randn(1, 3, 32, 32)),
    **method(MODEL.encoder, "encode", stage=3, x=torch.randn(1, 4, 256), height=2, width=2),
    "load_backbone": Subject(
        models.load_backbone,
        lambda: {"model": MODEL, "path_or_state_dict": MODEL.encoder.state_dict()},
    ),
    **build(integrations.Rule, **vars(RULE)),
    "accelerate_module": Subject(
        integrations.accelerate_module,
        lambda: {"model": Halve(), "rules": [RULE], "verbose": False},
    ),
    "accelerate_segformer": Subject(
        integrations.accelerate_segformer,
        lambda: {"model": nn.ModuleList([Ffn()]), "verbose": False},
    ),
    "attention_forward": Subject(
        integrations.attention_forward,
        lambda: {
            "module": nn.Identity(), "query": QUERY, "key": QUERY, "value": QUERY,
            "is_causal": False,
        },
    ),
    "register_attention": Subject(register, lambda: {"name": "ours"}),
    "revert": Subject(integrations.revert, lambda: {"model": nn.Identity(), "verbose": False}),
    "assert_deterministic": Subject(
        testing.assert_deterministic, lambda: {"fn": lambda: TOKENS, "repeats": 2}
    ),
    "assert_parity": Subject(testing.assert_parity, lambda: PARITY),
    "check_op_parity": Subject(
        testing.check_op_parity,
        lambda: {
            "fn": torch.relu, "reference_fn": torch.relu, "inputs": {"input": TOKENS},
            "differentiable": ["input"],
        },
    ),
    "nan_poison": Subject(poison, lambda: {"modules": ["equiseg_fast.kernels"]}),
    "override": Subject(
        override,
        lambda: {"op": "nonsense", "tier": "B eager", "reason": "a test", "rms": 2.0},
    ),
    "random_normal": Subject(testing.random_normal, lambda: {"shape": [2, 3], "seed": 0}),
    "same_bits": Subject(testing.same_bits, lambda: {"a": TOKENS, "b": TOKENS}),
    "with_layout": Subject(testing.with_layout, lambda: {"x": TOKENS, "layout": "sliced"}),
}  # fmt: skip


# ---- what is accepted, or refused otherwise, and why --------------------------------------------

FLOATS = {"tensor: float16", "tensor: float64"}
TENSORS = {"tensor", "0-d tensor of int", "0-d tensor of float"}
DTYPES_AND_SHAPES = {f"tensor: {k}" for k in OF_A_TENSOR} - {
    f"tensor: {k}" for k in ("meta", "sparse", "nested", "list", "numpy")
}
NUMBERS = {"1.5", "2**40", "2**70", "0", "-1"}
MEANT = "a value that is meant"

ACCEPTED: list[tuple[str, str, set[str], str]] = [
    # subjects, arguments, kinds, reason
    (
        "attention* guided_gate ParallelPoolingMixer SelfGuidedGate EQUISegConfig",
        "scale scaling rho gate_rho layer_scale", NUMBERS, "any finite number is a factor",
    ),
    ("*", "eps ln_eps_* tau *_tau", NUMBERS - {"0", "-1"}, "any positive number"),
    ("random_normal", "scale", {"1.5", "2**40", "2**70"}, "any positive number"),
    ("random_normal", "mean", NUMBERS, "any finite number"),
    ("EQUISegConfig", "sgm_weight", NUMBERS - {"-1"}, "a weight of the loss, 0 without it"),
    ("*", "rate drop_path dropout head_dropout modality_dropout", {"0"}, "nothing is dropped"),
    ("*", "ignore_index seed", {"2**40", "0", "-1"}, "any integer of 64 bits"),
    (
        "*", "return_* fold tf32 unit_last_stride verbose adapt_channels", {"True"},
        "the flag has two values",
    ),
    ("*", "present", {"one too many"}, "a set of names: twice is once"),
    ("query_hub", "pw_bias", {"tensor"}, "as many modalities as there are"),
    (
        "depthwise_conv_gelu mix_ffn pooling_mixer *.forward *.embed *.encode", "x",
        {"tensor: empty"}, "an empty batch",
    ),
    (
        "guided_gate class_prototypes upsample_cross_entropy ohem PrototypeLoss.forward "
        "SelfGuidedGate.*", "x logits loss", FLOATS,
        "computes in fp32 or fp64 from any floating dtype",
    ),
    (
        "DropPath.forward", "x",
        {"tensor", "tensor: rank + 1", "tensor: rank - 1", "tensor: empty", "tensor: meta",
         "tensor: empty in its last dimension", "tensor: of no dimension that fits", *FLOATS},
        "rows of any floating tensor",
    ),
    ("EQUISeg*", "modalities", {"list of str", "[str, ..]"}, "any names"),
    ("EQUISegConfig", "sgm_stages", {"[]", "()"}, "no stage has the loss"),
    ("EQUISegConfig", "gate_stages", {"[]", "()"}, "no stage has a gate"),
    ("EQUISegConfig.from_dict", "content", {"{}"}, "all fields have defaults"),
    (
        "load_backbone", "path_or_state_dict",
        {"{tensor: float8, ..}", "{tensor: float16, ..}", "{tensor: float64, ..}"},
        "floating dtypes are converted",
    ),
    ("load_backbone", "prefix", {"empty str"}, "names that begin with the encoder's own"),
    ("Rule", "name", {"str"}, MEANT),
    ("Rule", "calls", {"[]", "list of str"}, "any names of children"),
    ("Rule", "matches forward examples", {"class"}, "a class can be called"),
    ("accelerate_module", "rules", {"one too many"}, "the first rule that matches is taken"),
    ("attention_forward", "module", {*GENERIC}, "only its name and is_causal are looked at"),
    ("register_attention", "name", {"str"}, MEANT),
    ("assert_parity override", "name op reason", {"str"}, MEANT),
    ("override", "rms", NUMBERS - {"-1"}, "any allowance"),
    (
        "assert_parity", "oracle", {f"tensor: {k}" for k in DTYPES if k != "float64"},
        "results that are exact have an oracle in their own dtype",
    ),
    (
        "assert_parity check_op_parity", "contraction", {"2**40", "2**70", "10**400", "0"},
        "the length of a sum",
    ),
    ("assert_parity check_op_parity", "overrides", {"[]", "()"}, "none"),
    (
        "check_op_parity", "inputs",
        {f"{{{k}, ..}}" for k in DTYPES_AND_SHAPES | TENSORS | FLOATS}, "whatever fn takes",
    ),
    ("check_op_parity", "differentiable", {"[]", "()"}, "no gradient is checked"),
    ("check_op_parity", "differentiable", {"one too many"}, "is checked twice"),
    ("check_op_parity", "kinds", {"{}"}, "every result has its default"),
    ("check_op_parity", "output_names", {"list of str"}, "any names"),
    (
        "nan_poison", "modules",
        {"[]", "()", "list of str", "[str, ..]", "[empty str, ..]", "one too many"}, "any names",
    ),
    ("random_normal", "shape", {"[]", "()", "[0, ..]", "one too many"}, "any shape"),
    ("same_bits", "a b", TENSORS | DTYPES_AND_SHAPES, "tensors of any dtype and shape"),
    ("with_layout", "x", {"tensor", "tensor: meta"} | DTYPES_AND_SHAPES, "any dtype and shape"),
]  # fmt: skip

REFUSED: list[tuple[str, str, type[Exception], str]] = [
    # subjects, arguments, what they raise instead, reason
    ("load_backbone", "path_or_state_dict", FileNotFoundError, "a path that does not exist"),
    ("assert_parity", "actual oracle eager", AssertionError, "a wrong result, which it is for"),
    ("check_op_parity", "*fn", TypeError, "what a function does is its own"),
]


def find(table: list[Any], name: str, argument: str, what: Any) -> int | None:
    """Where a table has an entry for it."""
    for i, (subjects, arguments, kinds, _) in enumerate(table):
        if any(fnmatchcase(name, s) for s in subjects.split()):
            if any(fnmatchcase(argument, a) for a in arguments.split()):
                if (what in kinds) if isinstance(kinds, set) else isinstance(what, kinds):
                    return i
    return None


# ---- the table --------------------------------------------------------------------------------

HERE = str(Path(equiseg_fast.__file__).parent)
WRAPPED = {
    "use_backend": ops.use_backend,
    "nan_poison": testing.nan_poison,
    "override": testing.override,
    "register_attention": integrations.register_attention,
}


def cases(name: str) -> Iterator[tuple[str, str, Any]]:
    """Argument, kind and value of everything that one subject is tried with."""
    signature = inspect.signature(WRAPPED.get(name, SUBJECTS[name].call))
    given = SUBJECTS[name].arguments()
    parameters = {
        p.name: p for p in signature.parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }  # fmt: skip
    for argument in dict.fromkeys((*parameters, *given)):
        parameter = parameters.get(argument)
        works = given.get(argument, parameter.default if parameter else None)
        optional = parameter and (parameter.default is None or "None" in str(parameter.annotation))
        for kind, value in kinds_for(works):
            same = isinstance(value, (bool, int, float, str, tuple)) and (
                type(value) is type(works) and repr(value) == repr(works)
            )
            if not (same or (optional and kind == "None")):
                yield argument, kind, value


def outcome(name: str, argument: str, value: Any) -> Exception | None:
    """What the call raises."""
    subject = SUBJECTS[name]
    try:
        subject.call(**{**subject.arguments(), argument: value})
    except Exception as error:
        return error
    return None


def is_clear(error: Exception, name: str, argument: str, kind: str) -> bool:
    """TypeError or ValueError of ours that names the argument, or the entry of it that is wrong.

    Of the first tensor it may name another, which then does not fit it.
    """
    if not isinstance(error, (TypeError, ValueError)):
        return False
    *_, last = traceback.extract_tb(error.__traceback__)
    given = SUBJECTS[name].arguments()
    names = [argument]
    if isinstance(given.get(argument), Mapping):
        names += given[argument]
    tensors = [n for n, x in given.items() if isinstance(x, Tensor)]
    if kind.startswith("tensor") and [argument] == tensors[:1]:
        names = list(given)
    pattern = "|".join(rf"\b{re.escape(n)}\b" for n in names)
    return last.filename.startswith(HERE) and bool(re.search(pattern, str(error)))


def test_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    clear, unclear, used = 0, [], set()
    accepted: list[tuple[str, str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about nested tensors
        for name in SUBJECTS:
            SUBJECTS[name].call(**SUBJECTS[name].arguments())
            for argument, kind, value in cases(name):
                error = outcome(name, argument, value)
                if error is not None and is_clear(error, name, argument, kind):
                    clear += 1
                    continue
                table, what = (ACCEPTED, kind) if error is None else (REFUSED, error)
                entry = find(table, name, argument, what)
                if entry is None:
                    how = "accepted" if error is None else f"{type(error).__name__}: {error}"
                    unclear.append(f"{name}({argument}={kind}): {how}")
                else:
                    accepted.append((name, argument, kind))
                    used.add((table is ACCEPTED, entry))
    with capsys.disabled():
        print(f"\nnonsense: {clear} clear, {len(unclear)} unclear, "
              f"{len(accepted)} accepted with reason")  # fmt: skip
    assert not unclear, "\n".join(unclear)
    assert clear > 10_000
    unused = [e for i, e in enumerate(ACCEPTED) if (True, i) not in used]
    unused += [e for i, e in enumerate(REFUSED) if (False, i) not in used]
    assert not unused, "entries that no call needs"


# ---- that all are here --------------------------------------------------------------------------

RECORDS = {
    "StageOutput", "LoadReport", "Change", "Report", "Check", "Override", "Parity", "Tolerance",
}  # fmt: skip
"""What functions return, or a row of a table: they hold what they are given."""

ELSEWHERE = {
    "hooked": "in the way of every call of a rule, it asks nothing else",
    "EQUISeg.hard_pixels": "`ohem`, which is here",
    "EQUISeg.set_extra_state": "for load_state_dict, which collects what RuntimeErrors say",
    "ParallelPoolingMixer.train": "PyTorch's own, apart from a state that it refuses",
    "SegmentationHead.train": "the same",
    "Tolerance.applies": "of a record",
    "Report.paths": "of a record",
}


def public() -> Iterator[tuple[str, Any]]:
    """Every public callable that takes arguments, by name."""
    for module in (equiseg_fast, ops, layers, models, integrations, testing):
        for name in module.__all__:
            what = getattr(module, name)
            if not callable(what) or name in RECORDS:
                continue
            yield name, what
            if isinstance(what, type):
                for method_name, function in vars(what).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method_name.startswith("_"):
                        yield f"{name}.{method_name}", function


def test_every_public_callable_is_here() -> None:
    missing = []
    for name, what in public():
        takes = [p for p in inspect.signature(what).parameters if p not in ("self", "cls")]
        if takes and name not in SUBJECTS and name not in ELSEWHERE:
            missing.append(name)
    assert not missing

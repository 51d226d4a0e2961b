"""What a dry device is driven with: EQUISeg, the suite core, awkward inputs, what a visit runs.

All on meta tensors: the full size takes no memory and little time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import operations
from benchmarks.cases.common.op import DTYPES
from benchmarks.cases.common.problem import Shape
from benchmarks.measure import launches
from benchmarks.measure.launches import META, run_case
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.offline import exercise
from benchmarks.offline.dry_device import on_meta
from equiseg_fast import EQUISeg, ops

Program = Callable[[], None]


@dataclass(frozen=True)
class Model:
    """A training step of EQUISeg (loss and all gradients), or inference of the folded model.

    dtype: of autocast, None for none. mask: some modalities may be absent.
    """

    variant: str = "b0"
    height: int = 512
    width: int = 512
    modalities: int = 4
    batch: int = 1
    classes: int = 25
    mask: bool = False
    dtype: torch.dtype | None = torch.bfloat16
    train: bool = True

    def run(self) -> None:
        names = [f"m{i}" for i in range(self.modalities)]
        with launches.on_meta():
            model = EQUISeg.from_name(
                self.variant, modalities=names, num_classes=self.classes, drop_path=0.0
            )
        if not self.train:
            model.fold_()
        model.train(self.train)
        size = (self.height, self.width)
        images = torch.empty(self.modalities, self.batch, 3, *size, device=META)
        kept = (self.modalities, self.batch)
        present = torch.ones(kept, dtype=torch.bool, device=META) if self.mask else None
        with on_meta(self.dtype, backend="auto"):
            if not self.train:
                with torch.no_grad():
                    model(images, present=present)
                return
            labels = torch.zeros(self.batch, *size, dtype=torch.int64, device=META)
            loss, _ = model.loss(images, labels, present=present, generator=torch.Generator())
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def model_programs(base: Model) -> Iterator[tuple[str, Program]]:
    """A training step, and what differs from it in one respect: each may need more binaries."""
    yield "training step", base.run
    for name, change in (
        ("inference", {"train": False}),
        ("batch 2", {"batch": 2}),
        ("batch 8", {"batch": 8}),
        ("1024 x 1024", {"height": 1024, "width": 1024}),
        ("480 x 640, batch 3", {"height": 480, "width": 640, "batch": 3}),
        ("1080 x 1920", {"height": 1080, "width": 1920}),
        ("65 x 33", {"height": 65, "width": 33}),
        ("19 classes", {"classes": 19}),
        ("150 classes", {"classes": 150}),
        ("3 modalities", {"modalities": 3}),
        ("2 modalities", {"modalities": 2}),
        ("1 modality", {"modalities": 1}),
        ("a mask", {"mask": True}),
        ("fp16", {"dtype": torch.float16}),
        ("fp32", {"dtype": None}),
    ):
        yield name, replace(base, **change).run


def _case(case: Case) -> None:
    dtype = DTYPES[case.dtype]
    with on_meta(None if case.op.scope == "operation" else dtype, backend="auto"):
        for mode in case.modes:
            with torch.set_grad_enabled(mode != "fwd"):
                run_case(case.op, case.shape, dtype, "triton", mode in ("bwd", "step"))


def core_programs(only: Sequence[str] = ()) -> Iterator[tuple[str, Program]]:
    """The provider "triton" of every case of the suite core."""
    for case in plan(Options(suite="core", device="cuda", ops=tuple(only))):
        yield case.label, partial(_case, case)


def visit_programs(only: Sequence[str] = ()) -> Iterator[tuple[str, Program]]:
    """What a visit runs: the suite core, EQUISeg-B2 at 1024 x 1024, and `exercise`."""
    yield from core_programs(only)
    chosen = {name: op for name, op in operations().items() if not only or name in only}
    for name in ("training", "model"):
        if name in chosen:
            modes = ("step",) if name == "training" else ("fwd",)
            case = Case(chosen[name], Shape("b2", 0, 1024, 1024, 1, 4), "bf16", modes, ("triton",))
            yield case.label, partial(_case, case)
    for op in chosen.values():
        for dtype in ("fp32", "bf16") if op.function else ():
            for shape in exercise.SHAPES:
                modes = ("fwd", "step")
                yield (
                    f"exercise {op.name} {shape.label} {dtype}",
                    partial(_case, Case(op, shape, dtype, modes, ("triton",))),
                )


def _awkward(
    function: Any, shapes: Sequence[tuple[int, ...]], how: Mapping[str, Any], dtype: torch.dtype,
    offset: int, wide: int | None = None, pitch: int | None = None,
) -> None:  # fmt: skip
    """Forward and backward on inputs of these shapes.

    dtype: of the inputs, but for the one at position `wide`, which is fp32. offset: elements before
    the first, so that an odd one makes every address unaligned. pitch: stride of the first
    dimension of the first input.
    """
    leaves = []
    for i, shape in enumerate(shapes):
        like = {"dtype": torch.float32 if i == wide else dtype, "device": META}
        x = torch.empty(offset + torch.Size(shape).numel(), **like)[offset:].view(shape)
        if pitch is not None and i == 0:
            x = torch.empty_strided(shape, (pitch, *x.stride()[1:]), **like)
        leaves.append(x.requires_grad_())
    with on_meta():
        found = function(*leaves, backend="triton", **how)
        outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])


Inputs = tuple[Any, Sequence[tuple[int, ...]], dict[str, Any]]
"""A function, the shapes of its differentiable inputs, and what else it gets (`wide` and `pitch`
are for `_awkward`)."""


def _awkward_inputs() -> Iterator[tuple[str, Inputs]]:
    far = 2**31 + 16

    def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=META)

    for b, lq, lk, h, d in (
        (1, 1, 1, 1, 32), (2, 33, 17, 3, 1), (4, 153, 8, 5, 40), (4, 300, 77, 2, 64),
        (4, 300, 77, 2, 127), (4, 300, 77, 2, 128),
    ):  # fmt: skip
        shapes = ((b, lq, h, d), *2 * ((b, lk, h, d),))
        how = {"scale": 1.0, "return_lse": True}
        yield f"attention B{b} Lq{lq} Lk{lk} H{h} D{d}", (ops.attention, shapes, how)
    shapes = ((2, 300, 2, 64), *2 * ((2, 77, 2, 64),))
    yield "attention far apart", (ops.attention, shapes, {"pitch": far})
    for b, h, w, c in ((1, 1, 1, 1), (2, 17, 9, 33), (1, 17, 9, 64), (2, 3, 3, 160)):
        tokens, size = (b, h * w, c), {"height": h, "width": w}
        for op, side in ((ops.depthwise_conv_gelu, 3), (ops.pooling_mixer, 7)):
            inputs = (tokens, (c, 1, side, side), (c,))
            yield f"{op.__name__} {tokens}", (op, inputs, size)
            if c == 33:
                yield f"{op.__name__} {tokens} far apart", (op, inputs, size | {"pitch": far})
        for m, masked in ((1, False), (3, True), (8, False)):
            present = {
                "present": torch.ones(m, b, dtype=torch.bool, device=META) if masked else None
            }
            hubs = ((m, *tokens), (m, c, 3, 3), (m, c), (m, c), (m,))
            yield f"query_hub M{m} {tokens}", (ops.query_hub, hubs, size | present)
            gate = ((m, *tokens), (m, b, c))
            how = {"wide": 1, "rho": 1.0} | present
            yield f"guided_gate M{m} {tokens}", (ops.guided_gate, gate, how)
        for k, kind in (
            (1, torch.int64), (25, torch.int64), (150, torch.int32), (256, torch.uint8),
        ):  # fmt: skip
            how = {"labels": zeros(b, 4 * h, 4 * w, dtype=kind), "num_classes": k} | size
            yield f"class_prototypes K{k} {tokens}", (ops.class_prototypes, ((2, *tokens),), how)
            how = {"labels": zeros(b, 65, 33, dtype=kind)}
            loss = (ops.upsample_cross_entropy, ((b, k, h, w),), how)
            yield f"upsample_cross_entropy K{k} {tokens}", loss
    for c in (129, 1024):
        shapes = ((4, 1, 153, c), (4, c, 3, 3), (4, c), (4, c), (4,))
        yield f"query_hub M4 C{c}", (ops.query_hub, shapes, {"height": 17, "width": 9})
    for c in (1, 33, 160, 512, 4095, 4096):
        shapes = ((2, 17, c), (2, 17, c), (c,), (c,))
        yield f"add_layer_norm C{c}", (ops.add_layer_norm, shapes, {"eps": 1.0})


def awkward_programs(only: Sequence[str] = ()) -> Iterator[tuple[str, Program]]:
    """Inputs that nobody would choose: sizes and scalars of 1, odd widths, addresses that are no
    multiple of 16 bytes ("x[1:]"), strides over 2^31. `only`: names of functions."""
    for name, dtype in DTYPES.items():
        for offset in (0, 1):
            for label, (function, shapes, given) in _awkward_inputs():
                how = dict(given)
                special = {name: how.pop(name, None) for name in ("wide", "pitch")}
                if not only or function.__name__ in only:
                    program = partial(_awkward, function, shapes, how, dtype, offset, **special)
                    yield f"{label} {name}" + " x[1:]" * offset, program


WHAT = {
    "model": "a training step of EQUISeg, and what differs in one respect",
    "core": "the suite core",
    "awkward": "odd, unaligned and far apart inputs of every operation",
    "visit": "what `visit` runs",
}


def programs(what: str, base: Model, only: Sequence[str] = ()) -> dict[str, Program]:
    """The programs of a key of `WHAT`, by name."""
    if what == "model":
        return dict(model_programs(base))
    made = {"core": core_programs, "awkward": awkward_programs, "visit": visit_programs}
    return dict(made[what](only))

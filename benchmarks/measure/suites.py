"""Which cases are run together: grids of shapes, and the suites made of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from benchmarks.cases.common.op import MODES, Op
from benchmarks.cases.common.problem import Shape
from benchmarks.measure.timing import FEWEST
from benchmarks.providers.provider import PROVIDERS, SDPA


@dataclass(frozen=True)
class Grid:
    """Every combination of these. of: names or scopes of operations, empty for all."""

    variants: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...] = (1,)
    modalities: tuple[int, ...] = (4,)
    stages: tuple[int, ...] = (1, 2, 3, 4)
    of: tuple[str, ...] = ()

    def has(self, op: Op) -> bool:
        return not self.of or op.name in self.of or op.scope in self.of

    def shapes(self, op: Op) -> list[Shape]:
        stages = [s for s in op.stages if s in self.stages] or op.stages
        grid = product(self.variants, self.sizes, self.batches, self.modalities, stages)
        return [Shape(v, s, *size, b, m) for v, size, b, m, s in grid]


@dataclass(frozen=True)
class Suite:
    """Which cases, dtypes and modes, and how long each may take.

    seconds: of timing, per case and mode, shared by all providers; rounds: at least and at most.
    """

    grids: tuple[Grid, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    seconds: float
    rounds: tuple[int, int]

    def shapes(self, op: Op, asked: bool = False) -> list[Shape]:
        """The cases of one operation, each once. asked: for by name, so that an operation which no
        grid names gets the shapes of the first."""
        grids = [g for g in self.grids if g.has(op)] or self.grids[: 1 if asked else 0]
        return list(dict.fromkeys(shape for grid in grids for shape in grid.shapes(op)))


SIZES = ((512, 512), (1024, 1024), (480, 640), (1080, 1920))
STENCILS = ("attention", "depthwise_conv_gelu", "query_hub", "pooling_mixer")

SUITES = {
    # About a minute on two CPU cores. All but the encoder, which is most of the model.
    "quick": Suite(
        (Grid(("b0",), ((480, 736),), modalities=(3,), stages=(2,), of=("operation", "model")),),
        dtypes=("fp32",), modes=("fwd", "step"),
        providers=("baseline", "reference", "torch", "triton", *SDPA), seconds=0.1,
        rounds=(FEWEST, 30),
    ),
    # Whole networks on a CPU.
    "cpu": Suite(
        (Grid(("b0",), ((512, 512),), modalities=(1, 4), of=("encoder", "model")),),
        dtypes=("fp32",), modes=("fwd", "step"), providers=("baseline", "transformers", "torch"),
        seconds=20.0, rounds=(7, 30),
    ),
    # Meant for ten minutes on one GPU (a prediction), most of it spent in compilers: all stages at
    # the size of training, the largest at that of evaluation, one with odd maps, and networks.
    "core": Suite(
        (
            Grid(("b0",), ((512, 512),), of=("operation",)),
            Grid(("b2",), ((1024, 1024),), stages=(1,), of=("operation",)),
            Grid(("b2",), ((1080, 1920),), modalities=(2,), stages=(1,), of=STENCILS),
            Grid(("b0",), ((512, 512),), stages=(1, 3), of=("block",)),
            Grid(("b0",), ((512, 512),), stages=(2,), of=("stage",)),
            Grid(("b0",), ((512, 512),), of=("encoder", "model")),
        ),
        dtypes=("bf16",), modes=("fwd", "step"),
        # The searching compiler alone would take longer than all others.
        providers=tuple(name for name in PROVIDERS if name != "compile_max"), seconds=0.2,
        rounds=(10, 100),
    ),
    # Whole networks on a GPU, in the sizes of training and of evaluation.
    "headline": Suite(
        (
            Grid(("b0",), ((512, 512),), of=("encoder", "model")),
            Grid(("b2",), ((1024, 1024),), of=("model",)),
        ),
        dtypes=("bf16",), modes=("fwd", "step"),
        providers=("baseline", "transformers", "torch", "triton"), seconds=0.2, rounds=(10, 100),
    ),
    # Everything: days, if nothing narrows it down (--op, --at, --dtype, --mode, --provider).
    "full": Suite(
        (Grid(("b0", "b2"), SIZES, (1, 4, 8), (1, 2, 3, 4)),),
        dtypes=("fp16", "bf16", "fp32"), modes=MODES, providers=tuple(PROVIDERS), seconds=0.4,
        rounds=(10, 200),
    ),
}  # fmt: skip

"""Declared costs against hand counts, against the tensors that move, and against PyTorch's own
counter; floors from costs and limits."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Cost, Limits, Work, total
from benchmarks.cases.common.problem import Shape
from benchmarks.measure import launches
from benchmarks.measure.launches import Call, cost_of, counting, on_meta
from equiseg_fast import EQUISeg, use_backend
from equiseg_fast.models import MixTransformer
from equiseg_fast.models.config import VARIANTS
from equiseg_fast.ops import _backend

CPU = torch.device("cpu")
SMALL = Shape("b0", 1, 64, 96, batch=2, modalities=3)

# b0 stage 2, images of 64 x 96, B = 2, M = 3, 4 bytes: R = 6 rows, L = 8 * 12 = 96 tokens,
# C = 64 channels in 2 heads, 2 * 3 = 6 keys, R L C = 36864. (bytes, matrix, vector, exps) each.
N = 36_864
HAND = {
    "attention": (
        (4 * (2 * N + 2 * 6 * 6 * 64), 2 * (6 * 96 * 6 * 64) * 2, 0, 6 * 2 * 96 * 6),
        (4 * (4 * N + 4 * 6 * 6 * 64), 5 * 2 * (6 * 96 * 6 * 64), 0, 6 * 2 * 96 * 6),
    ),
    "depthwise_conv_gelu": (
        (4 * 2 * 4 * N, 0, 19 * 4 * N, 4 * N),
        (4 * 3 * 4 * N, 0, 56 * 4 * N, 2 * 4 * N),
    ),
    "mix_ffn": (
        (4 * 2 * N, 576 * 2 * 2 * 64 * 256, 576 * 19 * 256, 576 * 256),
        (4 * 3 * N, 576 * 4 * 2 * 64 * 256, 576 * 38 * 256, 576 * 2 * 256),
    ),
    "add_layer_norm": ((4 * 4 * N, 0, 8 * N, 0), (4 * 4 * N, 0, 14 * N, 0)),
    "query_hub": ((4 * 2 * N, 0, 25 * N, 576), (4 * 3 * N, 0, 65 * N, 576)),
    "pooling_mixer": ((4 * 2 * N, 0, 116 * N, 0), (4 * 3 * N, 0, 214 * N, 0)),
    "guided_gate": (
        (4 * (2 * N + 12_288), 0, 3 * N, 6 * 64),
        (4 * (3 * N + 12_288), 0, 8 * N, 6 * 64),
    ),
    "class_prototypes": 2 * ((4 * N + 8 * 2 * 96 + 4 * 6 * 25 * 64, 0, N, 0),),
}


@pytest.mark.parametrize("name", HAND)
def test_costs_equal_a_hand_count(name: str) -> None:
    cost = cost_of(operations()[name], replace(SMALL, stage=2), 4)
    forward, backward = (Work(*counts) for counts in HAND[name])
    assert cost.of("fwd") == cost.of("fwd_train") == (forward,)
    assert cost.of("bwd") == (backward,)
    assert cost.of("step") == (forward, backward)


def test_cost_of_the_loss_equals_a_hand_count() -> None:
    # Logits 2 x 25 x 16 x 24, labels 2 x 64 x 96 = 12288 pixels of 8 bytes, losses of 4.
    cost = operations()["upsample_cross_entropy"].cost(SMALL, 2)
    logits, pixels = 2 * 25 * 16 * 24 * 2, 12_288
    assert cost.forward == (Work(logits + 12 * pixels, 0, 11 * 25 * pixels, 25 * pixels),)
    assert cost.backward == (Work(2 * logits + 12 * pixels, 0, 19 * 25 * pixels, 25 * pixels),)


@pytest.mark.parametrize("name", [*HAND, "upsample_cross_entropy"])
def test_bytes_are_those_of_inputs_and_outputs(name: str) -> None:
    """Inputs read once and outputs written once; weights, and labels between tokens, are left out
    of the formulas."""
    op = operations()[name]
    shape = replace(SMALL, stage=op.stages[0])
    problem = op.build(shape, torch.float32, CPU, 0)
    outputs = [x for x in problem.calls["reference"]() if x.is_floating_point()]
    tensors = [
        x for x in problem.ignored if x.is_floating_point() or name == "upsample_cross_entropy"
    ]
    moved = sum(x.nbytes for x in (*tensors, *outputs))
    assert math.isclose(op.cost(shape, 4).fwd_bytes, moved, rel_tol=0.35)


@pytest.mark.parametrize("name", ["attention", "mix_ffn"])
def test_products_are_those_that_pytorch_counts(name: str) -> None:
    """Forward and backward of the baseline, without convolutions. It keeps the scores, so the fifth
    product of the attention's backward is missing there."""
    op = operations()[name]
    problem = op.build(SMALL, torch.float32, CPU, 0)
    cost = op.cost(SMALL, 4)
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    with counters[0]:
        (out,) = problem.calls["baseline"]()
    with counters[1]:
        out.backward(torch.randn_like(out))
    forward, backward = (
        sum(n for op, n in c.get_flop_counts()["Global"].items() if "convolution" not in str(op))
        for c in counters
    )
    scores = forward / 2 if name == "attention" else 0
    assert (forward, backward + scores) == (cost.forward[0].matrix, cost.backward[0].matrix)


# ---- whole models -------------------------------------------------------------------------------


def stencils(shape: Shape) -> float:
    """Multiply-adds that PyTorch counts among convolutions and we among other FLOPs: 9 taps in
    Mix-FFN, 49 in the pooling mixer, 9 + 1 in the score nets, and 3 of the channel gate."""
    found = 0.0
    ratios = (8, 8, 4, 4)
    for s, (c, depth, ratio) in enumerate(zip(*VARIANTS[shape.variant], ratios, strict=True), 1):
        here = replace(shape, stage=s)
        n = here.rows * here.tokens * c
        found += 9 * (4 * depth + ratio) * n + 49 * n + 10 * n + 3 * here.rows * c
    return found


@pytest.mark.parametrize(
    ("variant", "size", "modalities", "gmac"),
    [
        # the numbers that tests/test_model.py asserts for the model with the published head
        ("b0", 512, 4, 24.932),
        ("b0", 1024, 4, 174.622),
        ("b2", 512, 4, 124.044),
        ("b2", 1024, 4, 732.932),
    ],
)
def test_parts_add_up_to_the_multiply_adds_of_the_model(
    variant: str, size: int, modalities: int, gmac: float
) -> None:
    shape = Shape(variant, 0, size, size, 1, modalities)
    with on_meta():
        names = [f"m{i}" for i in range(modalities)]
        model = EQUISeg.from_name(variant, modalities=names, num_classes=25, fold_head=False).eval()
        images = torch.empty(modalities, 1, 3, size, size)
        with torch.no_grad(), counting() as calls:
            model(images)
    matrix = sum(work.matrix for call in calls for work in call.works)
    assert (matrix / 2 + stencils(shape)) / 1e9 == pytest.approx(gmac, abs=1e-3)


def works(calls: list[Call], phase: str = "fwd", name: str = "") -> list[Work]:
    """Of calls with this in their names."""
    return [w for c in calls if c.phase == phase and name in c.name for w in c.works]


def calls_of(op: str, shape: Shape, dtype: torch.dtype = torch.float32) -> list[Call]:
    return launches.count(operations()[op], shape, dtype, "triton", op == "training")


def test_the_folded_head_and_the_backward_are_those_that_pytorch_counts() -> None:
    shape = Shape("b0", 0, 64, 64, 2, 3)
    model = EQUISeg.from_name("b0", modalities=("a", "b", "c"))
    stages = [replace(shape, stage=s) for s in (1, 2, 3, 4)]
    features = [torch.randn(2, s.tokens, s.channels, requires_grad=True) for s in stages]
    sizes = [(s.h, s.w) for s in stages]
    with counting() as calls:
        out = model.head(features, sizes)
        out.backward(torch.randn_like(out))
    forward, backward = (total(works(calls, phase)).matrix for phase in ("fwd", "bwd"))
    with FlopCounterMode(display=False) as counter, use_backend("reference"):
        out = model.head(features, sizes)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.randn_like(out))
    assert counter.get_total_flops() == backward


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_encoder_is_a_part_of_the_model(itemsize: int) -> None:
    shape = Shape("b2", 0, 128, 192, 2, 4)
    alone = cost_of(operations()["encoder"], shape, itemsize).forward
    whole = cost_of(operations()["model"], shape, itemsize).forward
    assert len(alone) > 100
    assert Counter(alone) <= Counter(whole)


def test_images_get_no_gradient() -> None:
    embed = MixTransformer("b0").patch_embed1.proj
    cotangent = torch.randn(3, 32, 16, 16)
    with counting() as calls:
        embed(torch.randn(3, 3, 64, 64)).backward(cotangent)
    forward, backward = (total(works(calls, phase, "convolution")) for phase in ("fwd", "bwd"))
    assert backward.matrix == forward.matrix
    # 3 images of 64 x 64 x 3, 16 x 16 tokens of 32 channels, 7 x 7 taps
    images, tokens, weight = 3 * 64 * 64 * 3, 3 * 16 * 16 * 32, 49 * 3 * 32
    assert forward.matrix == 2 * tokens * 49 * 3
    assert forward.bytes == 4 * (images + tokens + weight)
    # and the gradient of the bias, which reads that of the tokens again
    assert backward.bytes == forward.bytes + 4 * (tokens + 32)
    with counting() as calls:
        embed(torch.randn(3, 3, 64, 64, requires_grad=True)).backward(cotangent)
    assert total(works(calls, "bwd", "convolution")).matrix == 2 * forward.matrix


def test_training_needs_the_losses_and_statistics() -> None:
    shape = Shape("b0", 0, 64, 64, 1, 2)
    inference, training = (calls_of(op, shape) for op in ("model", "training"))
    names = [
        {c.name for c in calls if c.phase == "fwd" and c.works} for calls in (inference, training)
    ]
    assert names[1] - names[0] >= {
        "class_prototypes_fwd", "upsample_cross_entropy_fwd", "_native_batch_norm_legit", "mm"
    }  # fmt: skip
    assert names[0] - names[1] == {"_native_batch_norm_legit_no_training"}
    norms = [total(works(calls, name="batch_norm")).bytes for calls in (inference, training)]
    # 16 x 16 to 2 x 2 tokens of two images; two norms in a mixer, one of them folded for inference;
    # one in the head, which is folded too. Statistics take a third pass.
    mixers = 4 * 2 * (256 * 32 + 64 * 64 + 16 * 160 + 4 * 256)
    assert norms[0] == 2 * mixers
    assert norms[1] == 3 * (2 * mixers + 4 * 256 * 256)


def test_logits_are_written_at_the_size_of_the_images() -> None:
    calls = calls_of("model", Shape("b0", 0, 64, 64, 1, 2), torch.bfloat16)
    assert works(calls, name="upsample")[-1].bytes == 2 * 25 * (16 * 16 + 64 * 64)


def test_one_modality_has_nothing_to_fuse() -> None:
    names = {call.name for call in calls_of("training", Shape("b0", 0, 64, 64, 1, 1))}
    assert not [name for name in names if name.startswith(("query_hub", "pooling", "guided"))]


def test_counting_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    op, shape = operations()["block_training"], Shape("b0", 3, 64, 64, 1, 2)
    known = cost_of(op, shape, 2)
    launches.count.cache_clear()
    monkeypatch.setattr(_backend, "TRITON_INSTALLED", False)
    monkeypatch.setattr(launches, "kernel_stems", lambda: pytest.fail("it imports kernels"))
    assert cost_of(op, shape, 2) == known


# ---- floors -------------------------------------------------------------------------------------

LIMITS = Limits(bandwidth=100.0, peak={"fp32": 10.0, "bf16": 40.0}, exps=5.0)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(300.0, 20.0, 10.0, 4.0), 3.0, "bytes"),
        (Work(100.0, 80.0, 10.0, 4.0), 2.0, "matrix FLOPs"),
        (Work(100.0, 20.0, 60.0, 4.0), 6.0, "other FLOPs"),
        (Work(100.0, 20.0, 10.0, 20.0), 4.0, "exps"),
    ],
)
def test_floor_is_the_longest_of_four_times(work: Work, seconds: float, bound: str) -> None:
    assert LIMITS.floor([work], "bf16") == seconds
    assert LIMITS.bound([work], "bf16") == bound
    assert LIMITS.floor([work, work], "bf16") == 2 * seconds


def test_calls_one_after_the_other_do_not_overlap() -> None:
    works = [Work(bytes=100.0), Work(exps=15.0)]
    assert LIMITS.floor(works, "bf16") == 4.0
    assert LIMITS.bound(works, "bf16") == "exps"
    cost = Cost((works[0],), (works[1],))
    assert LIMITS.floor(cost.of("step"), "bf16") == 4.0


def test_unknown_exponentials_bound_nothing_and_unknown_dtypes_are_refused() -> None:
    limits = replace(LIMITS, exps=None)
    assert limits.floor([Work(exps=1e9, bytes=1.0)], "bf16") == 0.01
    assert Limits.read({"bandwidth": 100.0, "peak": {"fp32": 10.0}}).exps is None
    with pytest.raises(ValueError, match=r"dtype must be among fp32, bf16.*'fp16'"):
        LIMITS.floor([Work()], "fp16")


def test_work_adds_up() -> None:
    assert total([Work(1, 2, 3, 4), Work(1, 1, 1, 1)]) == Work(2, 3, 4, 5)
    assert total([]) == Work()
    assert Work(1, 2, 3, 4).flops == 5

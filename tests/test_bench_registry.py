"""What the benchmarks declare: shapes, suites, modes, and who can do what where."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.op import MODES, unavailable
from benchmarks.cases.common.problem import Shape
from benchmarks.measure.plan import Options, dry_run, plan
from benchmarks.measure.suites import SIZES
from benchmarks.providers.provider import OURS, PROVIDERS
from equiseg_fast import ops
from equiseg_fast.models import EQUISeg, MixTransformer
from equiseg_fast.nn.attention import reduce_tokens
from equiseg_fast.ops._layout import to_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["b0", "b2"])
@pytest.mark.parametrize("size", [*SIZES, (33, 95)])
def test_shapes_are_those_of_the_encoder(variant: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        encoder, x = MixTransformer(variant), torch.empty(1, 3, *size)
    for stage in (1, 2, 3, 4):
        shape = Shape(variant, stage, *size)
        tokens, h, w = encoder.embed(stage - 1, x)
        assert (shape.h, shape.w, shape.tokens) == (h, w, tokens.shape[1])
        attention = getattr(encoder, f"block{stage}")[0].attn
        assert (shape.channels, shape.heads) == (tokens.shape[2], attention.heads)
        keys = tokens
        if attention.sr_ratio > 1 and min(h, w) >= attention.sr_ratio:
            keys = reduce_tokens(attention.sr, tokens, h, w)
        if min(h, w) >= attention.sr_ratio:
            assert shape.keys == keys.shape[1]
        x = to_map(tokens, h, w)


def test_rows_of_1080_by_hand() -> None:
    shapes = [Shape("b2", stage, 1080, 1920) for stage in (1, 2, 3, 4)]
    assert [shape.h for shape in shapes] == [270, 135, 68, 34]
    assert [shape.w for shape in shapes] == [480, 240, 120, 60]
    assert [shape.keys for shape in shapes] == [33 * 60, 33 * 60, 34 * 60, 34 * 60]


def test_equiseg_pads_where_the_encoder_rounds() -> None:
    model = EQUISeg.from_name("b0", modalities=("a",), num_classes=3).eval()
    with torch.no_grad():
        sizes = [stage.size for stage in model.stages(torch.randn(1, 1, 3, 40, 64))]
    padded = [Shape("b0", stage, 64, 64) for stage in (1, 2, 3, 4)]
    assert sizes == [(shape.h, shape.w) for shape in padded]
    assert Shape("b0", 1, 40, 64).h == 10


# ---- suites -------------------------------------------------------------------------------------


def test_the_full_suite_has_the_whole_grid() -> None:
    cases = {(case.op.name, case.shape, case.dtype) for case in plan(Options(suite="full"))}
    for size, batch, modalities, dtype in product(SIZES, (1, 4, 8), (2, 4), ("fp32", "bf16")):
        for variant, stage in product(("b0", "b2"), (1, 2, 3, 4)):
            shape = Shape(variant, stage, *size, batch, modalities)
            assert ("attention", shape, dtype) in cases
            assert ("block_training", shape, dtype) in cases
        for variant in ("b0", "b2"):
            whole = Shape(variant, 0, *size, batch, modalities)
            assert {("model", whole, dtype), ("encoder", whole, dtype)} <= cases


def test_the_core_suite_fits_into_minutes() -> None:
    """A few dozen operations, and every larger part of the model."""
    cases = plan(Options(suite="core"))
    scopes = [case.op.scope for case in cases]
    assert 30 <= scopes.count("operation") <= 60
    assert {"block", "stage", "encoder", "model"} <= set(scopes)
    assert {case.modes for case in cases if case.op.scope == "operation"} == {("fwd", "step")}
    assert len(cases) - scopes.count("operation") <= 10


def test_the_quick_suite_is_that_of_the_committed_results() -> None:
    from benchmarks.measure.record import read

    committed = read(Path(__file__).parents[1] / "benchmarks/results/cpu-2-cores")
    today = {
        (case.op.name, case.shape.label, case.dtype, mode, provider)
        for case in plan(Options(suite="quick"))
        for mode in case.modes
        for provider in case.providers
    }
    assert today == {row.key for row in committed}


def test_the_quick_suite_has_somebody_to_beat_attention() -> None:
    """On a CPU ours is mostly PyTorch's own attention, so that is who it is compared with."""
    (case,) = plan(Options(suite="quick", ops=("attention",)))
    usable = [p for p in case.providers if not unavailable(case.op, p, CPU, case.dtype)]
    assert usable == ["baseline", "reference", "torch", "sdpa_math", "sdpa_flash"]
    assert set(case.providers) - set(usable) == {"triton", "sdpa_efficient", "sdpa_cudnn"}


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ""], "--out: must not be empty"),
        (["--threads", "0"], "--threads: must be 1 to 1024; got '0'"),
        (["--threads", "99999999999"], "must be 1 to 1024; got '99999999999'"),
        (["--at", "depth=4"], "--at must be among variant, stage, height"),
        (["--at", "variant=b9"], "--at variant must be among nano, b0"),
        (["--at", "stage=5"], "--at stage must be among 0, 1, 2, 3, 4; got '5'"),
        (["--at", "batch=0"], "--at batch must be a positive integer; got '0'"),
        (["--at", "height=x"], "--at height must be a positive integer; got 'x'"),
        (["--at", "stage"], "must be like variant=b2,stage=1; got 'stage'"),
        (["--op", "training", "--mode", "fwd"], "nothing to run"),
        (["--mode", "block"], "--mode must be among fwd, fwd_train, bwd, step; got 'block'"),
        (["--op", "atention"], "--op must be among attention, depthwise"),
        (["--dtype", "fp8"], "--dtype must be among"),
        (["--provider", "x"], "--provider must be among"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["run", "--dry-run", "--device", "cpu", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# ---- dry run and providers ----------------------------------------------------------------------


def test_dry_run_for_a_gpu_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", "--device", "cuda", "--suite", "core"]) == 0
    out = capsys.readouterr().out
    line = "attention b2 s1 1080x1920 B1 M2 bf16: fwd, step: baseline, reference, torch, triton"
    assert line in out
    assert "sdpa_cudnn, flex" in out


def test_a_shape_of_your_own() -> None:
    at = (("batch", "4"), ("height", "720"), ("stage", "3"))
    own = plan(Options(ops=("add_layer_norm", "model"), at=at))
    labels = [case.shape.label for case in own]
    assert labels == ["b0 s3 720x736 B4 M3", "b0 720x736 B4 M3"]
    every = plan(
        Options(suite="core", ops=("add_layer_norm",), at=(("variant", "b1"), *at, ("width", "96")))
    )
    assert len(every) == 1  # what differed in nothing else is one case


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_on_a_gpu_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_dry_run_says_who_is_left_out_and_why() -> None:
    options = Options(ops=("query_hub",), providers=("torch",), at=(("modalities", "1"),))
    lines = dry_run(plan(options), CPU)
    assert lines == [
        "query_hub b0 s2 480x736 B1 M1 fp32: fwd, step: nobody",
        "skipped: query_hub torch: the hub needs two modalities or more",
        "1 cases, 2 with their modes; nothing was run",
    ]


@pytest.mark.parametrize(
    ("provider", "device", "dtype", "reason"),
    [
        ("sdpa_math", CPU, "fp32", ""),
        ("sdpa_flash", CPU, "fp32", ""),
        ("sdpa_efficient", CPU, "fp32", "on a GPU only"),
        ("sdpa_cudnn", CPU, "bf16", "on a GPU only"),
        ("flex", CPU, "fp32", "FlexAttention has no backward on a CPU"),
        ("flex", CUDA, "fp32", ""),
        ("sdpa_flash", CUDA, "fp32", "fp16 and bf16 only"),
        ("sdpa_flash", CUDA, "bf16", ""),
        ("sdpa_cudnn", CUDA, "fp32", "fp16 and bf16 only"),
        ("sdpa_efficient", CUDA, "fp32", ""),
        ("transformers", CPU, "fp32", "no such implementation of this operation"),
    ],
)
def test_reasons_of_attention(provider: str, device: torch.device, dtype: str, reason: str) -> None:
    found = unavailable(operations()["attention"], provider, device, dtype)
    assert (reason in found) if reason else found == ""


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.providers.provider.find_spec", lambda name: None)
    reason = unavailable(operations()["encoder"], "transformers", CUDA)
    assert reason == "transformers is not installed"


def test_every_operation_is_timed() -> None:
    timed = {name for name, op in operations().items() if op.scope == "operation"}
    assert timed == set(ops.__all__) - {"explain", "ohem", "use_backend"}


def test_every_declaration_is_complete_and_can_be_sent_to_a_worker() -> None:
    for name, op in operations().items():
        assert op.name == name
        assert set(op.providers) <= set(PROVIDERS)
        assert set(op.modes) <= set(MODES)
        assert len(set(op.providers)) == len(op.providers)
        assert set(OURS) <= set(op.providers)
    cases = plan(Options(suite="core"))
    copies = pickle.loads(pickle.dumps(cases))
    assert [case.label for case in copies] == [case.label for case in cases]

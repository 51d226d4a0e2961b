"""Predicted times: what is counted, what is assumed, what is committed, and who was wrong."""

import importlib.util
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.machines import judgement, predictions
from benchmarks.machines.gpus import GPUS
from benchmarks.machines.predictions import ASSUMPTIONS, GAP, Prediction, limiting
from benchmarks.measure.kernel_work import Kernel
from benchmarks.measure.launches import META, Call, counting, on_meta
from benchmarks.measure.plan import Case
from benchmarks.measure.record import Record
from equiseg_fast import EQUISeg

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="counting launches needs triton"
)
HOPPER = (90, 132)
H200 = GPUS["h200"]


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> None:
    """Not here: the poison itself would be counted."""


# ---- what is assumed ----------------------------------------------------------------------------


class TestAssumptions:
    def test_every_one_limits_a_kind(self) -> None:
        for name, (_, _, kinds) in ASSUMPTIONS.items():
            assert name == GAP or kinds
        assert limiting("attention forward D=32") == [
            "HBM of our kernels", "attention forward D=32"
        ]  # fmt: skip
        assert limiting("SDPA backward") == ["SDPA backward", "stock pointwise"]
        assert limiting("GEMM") == ["GEMM, memory", "GEMM, tensor cores"]
        assert limiting("interpolation") == ["stock pointwise"]

    def test_longest_unit_and_a_gap(self) -> None:
        copy, product = 0.8957 * 4.8e12, 0.8025 * 989.4e12
        gemm = Kernel("mm", "GEMM", bytes=1e-6 * copy, matrix=0.7e-6 * product)
        spent = predictions.spend([gemm], H200)
        assert spent == {"GEMM, memory": pytest.approx(1.25), GAP: 1.5}
        more = replace(gemm, matrix=7e-6 * product)
        spent = predictions.spend([gemm, more], H200)
        assert spent["GEMM, tensor cores"] == pytest.approx(10)
        assert sum(spent.values()) == pytest.approx(14.25)
        ours = Kernel("dwconv", "ours", bytes=1.0, slots=1e9)
        wanted = 1e15 / (0.75 * 0.96 * 128 * 132 * 1.83e9)
        name = "issue slots of our kernels"
        assert predictions.spend([ours], H200)[name] == pytest.approx(wanted)

    def test_what_such_gpus_have_shown(self) -> None:
        for name, copy, product in (("h100", 3.0e12, 798e12), ("h200", 4.3e12, 790e12)):
            gpu = GPUS[name]
            assert predictions.COPY * gpu.bandwidth == pytest.approx(copy, rel=0.001)
            assert predictions.PRODUCT * gpu.peak["bf16"] == pytest.approx(product, rel=0.006)

    @pytest.mark.parametrize("dim", [64, 32])
    def test_attention(self, dim: int) -> None:
        """16 scores per clock and SM: tensor cores do 4096 FLOPs of 4 D, exponentials are 16."""
        scores = 1e9
        kernel = Kernel(
            "attention_fwd", f"attention forward D={dim}", bytes=1.0, matrix=4 * dim * scores,
            exps=scores, programs=10_000,
        )  # fmt: skip
        share = {64: 0.44, 32: 0.56}[dim]
        wanted = 1e6 * scores / (16 * share * 132 * 0.96 * 1.83e9)
        assert predictions.spend([kernel], H200)[kernel.kind] == pytest.approx(wanted, rel=1e-3)
        starving = replace(kernel, programs=33)
        found = predictions.spend([starving], H200)[kernel.kind]
        assert found == pytest.approx(4 * wanted, rel=1e-3)


# ---- totals -------------------------------------------------------------------------------------


def large_model(train: bool, autocast: torch.dtype | None) -> list[Call]:
    """EQUISeg-B2 with random layers on two images of four modalities at 1024 x 1024."""
    with on_meta():
        model = EQUISeg.from_name("b2", num_classes=25)
        if not train:
            model.fold_()
        dtype = torch.float32 if autocast else torch.bfloat16
        model.to(META, dtype).train(train)
        images = torch.empty(4, 2, 3, 1024, 1024, dtype=dtype)
        labels = torch.zeros(2, 1024, 1024, dtype=torch.uint8)
    with on_meta(autocast), torch.set_grad_enabled(train), counting(HOPPER) as calls:
        if train:
            loss, _ = model.loss(images, labels)
            torch.autograd.grad(loss, list(model.parameters()))
        else:
            model(images)
    return calls


@pytest.mark.parametrize(
    ("train", "autocast", "ours", "kernels", "gb", "ms"),
    [
        (False, None, 90, 456, 31.8, 14.1),
        (True, None, 335, 2044, 109.6, 57.4),
        (False, torch.bfloat16, 90, 903, 49.4, 20.0),
        (True, torch.bfloat16, 335, 2983, 156.9, 73.1),
    ],
)
def test_totals_of_an_earlier_account(
    train: bool, autocast: torch.dtype | None, ours: int, kernels: int, gb: float, ms: float
) -> None:
    """Counted and added up by hand before, with every stage's times; that account also copied
    gradients into parameters (24 kernels) and had the bias of depthwise convolutions apart. Since
    then gates average features without an fp32 copy, 8 bytes for each of 65 million elements, and
    teachers are masked only if some sensor may be absent."""
    saved, copied = 28 if train else 4, 0.52 if autocast is None else 0.0
    calls = large_model(train, autocast)
    found = [kernel for call in calls for kernel in call.kernels]
    assert sum(call.ours for call in calls) == ours
    known = {"norm", "conv", "mm", "attention", "pool", "sort", "topk", "sum", "mean"}
    unknown = {k.name for k in found if k.kind == "pointwise" and any(x in k.name for x in known)}
    assert unknown <= {"topk"}
    assert len(found) + saved == pytest.approx(kernels, rel=0.03)
    assert sum(k.bytes for k in found) / 1e9 + copied == pytest.approx(gb, rel=0.01)
    assert sum(predictions.spend(found, H200).values()) / 1e3 == pytest.approx(ms, rel=0.04)


# ---- what is committed --------------------------------------------------------------------------

SUBSET = (
    ("add_layer_norm", "b2 s1 1024x1024 B1 M4"),
    ("attention", "b2 s1 1080x1920 B1 M2"),
    ("upsample_cross_entropy", "b0 s1 512x512 B1 M4"),
    ("block_training", "b0 s3 512x512 B1 M4"),
    ("training", "b0 512x512 B1 M4"),
)


def subset() -> list[Case]:
    return [case for case in predictions.cases() if (case.op.name, case.shape.label) in SUBSET]


@pytest.mark.parametrize("gpu", ["h100", "h200"])
class TestCommitted:
    def test_all_that_a_visit_times(self, gpu: str) -> None:
        keys = [row.key for row in predictions.read(gpu)]
        wanted = {
            (case.op.name, case.shape.label, case.dtype, mode, provider)
            for case in predictions.cases()
            for mode in predictions.modes_of(case)
            for provider in ("baseline", "torch", "triton")
        }
        assert len(keys) == len(set(keys))
        assert set(keys) == wanted
        for op, mode in (("training", "step"), ("model", "fwd")):
            assert (op, "b2 1024x1024 B1 M4", "bf16", mode, "triton") in keys

    def test_what_the_sources_say(self, gpu: str) -> None:
        assert len(subset()) == len(SUBSET)
        rows = predictions.predict(subset(), GPUS[gpu])
        committed = {row.key: row for row in predictions.read(gpu)}
        found = list(predictions.differences([committed[row.key] for row in rows], rows))
        assert found == [], "`python -m benchmarks predict` writes them anew"

    def test_times_are_spent_on_assumptions(self, gpu: str) -> None:
        for row in predictions.read(gpu):
            assert set(row.spent) <= set(ASSUMPTIONS)
            spent = list(row.spent.values())
            assert spent == sorted(spent, reverse=True)
            assert 0.95 * row.us < sum(spent) < 1.001 * row.us


def large_step() -> Case:
    return next(
        case for case in predictions.cases()
        if case.label == "training b2 1024x1024 B1 M4 bf16"
    )  # fmt: skip


def test_launches_of_a_large_step() -> None:
    """Five reductions of attention more than at batch 2, where no queries are split there."""
    kernels = {
        mode: predictions.kernels_of(large_step(), "triton", mode, H200)
        for mode in ("step", "fwd_train", "bwd")
    }
    assert kernels["step"] == kernels["fwd_train"] + kernels["bwd"]
    ours = [k for k in kernels["step"] if k.kind == "ours" or k.kind.startswith("attention")]
    assert len(ours) == 340


def test_differences() -> None:
    row = Prediction("a", "s", "bf16", "fwd", "triton", 10.0, 1, 0, 0, {})
    other = replace(row, mode="step")
    assert list(predictions.differences([row], [replace(row, us=10.09)])) == []
    assert list(predictions.differences([row], [replace(row, us=10.2)])) == [
        "a s bf16 fwd triton: 10 us are 10.2 us now"
    ]
    assert list(predictions.differences([row], [other])) == [
        "a s bf16 fwd triton: 10 us are 0 us now", "a s bf16 step triton: 0 us are 10 us now"
    ]  # fmt: skip


def test_command_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [large_step(), *subset()[:1]]
    monkeypatch.setattr(predictions, "cases", lambda: chosen)
    monkeypatch.setattr(predictions, "PROVIDERS", ("triton",))
    command = ["predict", "--gpu", "H200", "--out", str(tmp_path)]
    assert main([*command, "--check"]) == 1
    capsys.readouterr()
    assert main(command) == 0
    assert "predicted, not measured:\ntraining b2 1024x1024" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200.jsonl"]
    assert main([*command, "--check"]) == 0
    monkeypatch.setitem(ASSUMPTIONS, GAP, (3.0, "us", ""))
    assert main([*command, "--check"]) == 1
    assert "us now" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", "--gpu", "h300"])


# ---- who was wrong ------------------------------------------------------------------------------


def records(times: Callable[[Prediction], float | None], gpu: str = "h200") -> list[Record]:
    """What a run would have written, had it measured these microseconds."""
    shapes = {case.shape.label: asdict(case.shape) for case in predictions.cases()}
    return [
        Record(
            "core", row.op, shapes[row.shape], row.mode, row.provider, row.dtype,
            status="error" if us is None else "ok", method="graph", p50_us=us,
        )
        for row in predictions.read(gpu)
        for us in [times(row)]
    ]  # fmt: skip


def with_factors(factors: dict[str, float]) -> Callable[[Prediction], float]:
    """All as predicted, but for what some assumptions decide."""
    return lambda row: (
        row.us + sum((factor - 1) * row.spent.get(name, 0.0) for name, factor in factors.items())
    )


H200_NAME = "NVIDIA H200"


class TestJudgement:
    def test_as_predicted(self) -> None:
        found = judgement.compare(records(lambda row: row.us), H200_NAME)
        assert len(found) == len(predictions.read("h200"))
        assert all(us == row.us for row, us, _ in found)
        assert [row.us for row, *_ in found] == sorted((r.us for r, *_ in found), reverse=True)
        verdicts = judgement.verdicts(found)
        assert {stretch for _, stretch in verdicts.values()} == {1.0}
        assert sum(rows for rows, _ in verdicts.values()) == len(found)

    @pytest.mark.parametrize(
        ("name", "factor", "said"),
        [
            ("attention backward D=64", 2.0, "31 % of its bound | 16 % of its bound"),
            ("HBM of our kernels", 0.8, "80 % of copy bandwidth | 100 % of copy bandwidth"),
            (GAP, 2.0, "1.5 us | 3 us"),
            ("SDPA backward", 0.25, "26 % of its bound | 104 % of its bound"),
        ],
    )
    def test_points_at_the_wrong_assumption(self, name: str, factor: float, said: str) -> None:
        found = judgement.compare(records(with_factors({name: factor})), H200_NAME)
        worst, (rows, stretch) = next(iter(judgement.verdicts(found).items()))
        assert worst == name
        assert stretch == pytest.approx(factor, rel=0.01)
        assert f"| {name} | {said} | {rows} |" == judgement.markdown(found)[4]

    def test_noise_moves_no_median(self) -> None:
        exact, draw = with_factors({GAP: 0.6}), random.Random(0)
        found = judgement.compare(
            records(lambda row: exact(row) * draw.uniform(0.95, 1.05)), H200_NAME
        )
        worst, (_, stretch) = next(iter(judgement.verdicts(found).items()))
        assert (worst, stretch) == (GAP, pytest.approx(0.6, rel=0.05))

    def test_stretch_by_hand(self) -> None:
        """Half of the time is of the assumption: 10 us more are twice as long for it."""
        row = Prediction("a", "", "", "", "", 20.0, 1, 0, 0, {"GEMM, memory": 10.0, GAP: 7.0})
        other = replace(row, spent={"BatchNorm": 20.0})
        rows = [(row, 30.0, "graph"), (row, 1e-3, "graph"), (row, 25.0, "graph")]
        found = judgement.verdicts([(other, 20.0, "graph"), *rows])
        assert found == {"GEMM, memory": (3, 1.5), "BatchNorm": (1, 1.0)}
        assert list(found) == ["GEMM, memory", "BatchNorm"]
        assert judgement.verdicts(rows[1:2]) == {"GEMM, memory": (1, 0.01)}

    def test_what_the_host_was_timed_for_is_no_evidence(self) -> None:
        found = [r for r in records(lambda row: 3 * row.us) if r.key[0] == "training"]
        for record in found:
            record.method, record.host_us = "events", 0.9 * (record.p50_us or 0)
        assert judgement.compare(found, H200_NAME) == []
        for record in found:
            record.host_us = 0.5 * (record.p50_us or 0)
        assert len(judgement.compare(found, H200_NAME)) == len(found)

    def test_the_last_record_with_a_time_counts_and_a_graph_most(self) -> None:
        key = ("attention", "b2 s1 1024x1024 B1 M4", "bf16", "fwd", "triton")
        slow = next(r for r in records(lambda row: 2 * row.us) if r.key == key)
        slower = replace(slow, p50_us=2 * (slow.p50_us or 0))
        ((row, us, method),) = judgement.compare([slower, slow], H200_NAME)
        assert (row.key, us, method) == (key, 2 * row.us, "graph")
        slow.method, slow.graph_us = "events", 1.0
        failed = replace(slow, status="error", p50_us=None)
        assert judgement.compare([slow, failed], H200_NAME) == [(row, 1.0, "graph")]

    def test_summary(self) -> None:
        lines = judgement.markdown(judgement.compare(records(with_factors({GAP: 2})), H200_NAME))
        assert lines.index("") == 1
        row = next(
            row
            for row in predictions.read("h200")
            if row.key == ("model", "b2 1024x1024 B1 M4", "bf16", "fwd", "triton")
        )
        line = next(x for x in lines if x.startswith("| model b2") and "| triton |" in x)
        us = row.us + row.spent[GAP]
        assert f"| {row.us / 1e3:.1f} | {us / 1e3:.1f} (graph) | {us / row.us:.2f} |" in line

    @pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "AMD EPYC"])
    def test_nothing_was_predicted(self, device: str) -> None:
        found = judgement.compare(records(lambda row: row.us), device)
        assert found == []
        assert "python -m benchmarks predict" in judgement.markdown(found)[0]

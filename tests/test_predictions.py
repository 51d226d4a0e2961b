"""Predicted times: what is counted, what is assumed, what is committed, and who was wrong."""

import importlib.util
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.machines import efficiency, judgement, predictions
from benchmarks.machines.efficiency import ASSUMPTIONS, GAP, KINDS, SEEN, rates
from benchmarks.machines.predictions import Prediction
from benchmarks.measure.kernel_work import Kernel
from benchmarks.measure.launches import META, Call, counting, on_meta
from benchmarks.measure.plan import Case
from benchmarks.measure.record import Record
from equiseg_fast import EQUISeg

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="counting launches needs triton"
)
HOPPER = (90, 132)
H200 = rates("h200")


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> None:
    """Not here: the poison itself would be counted."""


# ---- what is assumed ----------------------------------------------------------------------------


class TestEfficiency:
    def test_names(self) -> None:
        used = {name for names in KINDS.values() for name in names}
        assert used | {GAP} == set(ASSUMPTIONS)

    def test_longest_unit_and_a_gap(self) -> None:
        gemm = Kernel("mm", "GEMM", bytes=4.3e6, matrix=0.7 * 790e6)
        assert efficiency.predict([gemm], H200) == {
            "GEMM, memory": pytest.approx(1.25),
            GAP: 1.5,
        }
        more = replace(gemm, matrix=7 * 790e6)
        assert efficiency.limit(more, H200) == ("GEMM, tensor cores", pytest.approx(10e-6))
        assert sum(efficiency.predict([gemm, more], H200).values()) == pytest.approx(14.25)

    @pytest.mark.parametrize(("dim", "bound"), [(64, 16), (32, 16)])
    def test_attention(self, dim: int, bound: float) -> None:
        """Scores per clock and SM: tensor cores do 4096 FLOPs of 4 D, exponentials are 16."""
        scores = 1e9
        kernel = Kernel(
            "attention_fwd", f"attention forward D={dim}", bytes=1.0, matrix=4 * dim * scores,
            exps=scores, programs=10_000,
        )  # fmt: skip
        clock = efficiency.CLOCK_UNDER_LOAD * 1.83e9
        share = ASSUMPTIONS[kernel.kind].value
        name, seconds = efficiency.limit(kernel, H200)
        assert name == kernel.kind
        assert seconds == pytest.approx(scores / (bound * share * 132 * clock))
        starving = replace(kernel, programs=33)
        assert efficiency.limit(starving, H200)[1] == pytest.approx(4 * seconds)

    def test_rates(self) -> None:
        assert (H200.bandwidth, H200.products) == SEEN["h200"] == (4.3e12, 790e12)
        assert rates("h100").bandwidth == 3.0e12
        assert rates("a100").bandwidth == pytest.approx(0.895 * 2.039e12)
        assert rates("a100").origin != H200.origin
        with pytest.raises(ValueError, match="must be one of h200"):
            rates("h300")


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
    assert sum(efficiency.predict(found, H200).values()) / 1e3 == pytest.approx(ms, rel=0.04)


# ---- what is committed --------------------------------------------------------------------------

GPUS = ("h100", "h200")
SUBSET = (
    ("add_layer_norm", "b2 s1 1024x1024 B1 M4"),
    ("attention", "b2 s1 1080x1920 B1 M2"),
    ("upsample_cross_entropy", "b0 s1 512x512 B1 M4"),
    ("block_training", "b0 s3 512x512 B1 M4"),
    ("training", "b0 512x512 B1 M4"),
)


def subset() -> list[Case]:
    return [case for case in predictions.cases() if (case.op.name, case.shape.label) in SUBSET]


@pytest.mark.parametrize("gpu", GPUS)
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
        rows = predictions.predict(subset(), gpu)
        committed = {row.key: row for row in predictions.read(gpu)}
        found = list(predictions.differences([committed[row.key] for row in rows], rows))
        assert found == [], "`python -m benchmarks predict` writes them anew"

    def test_times_are_spent_on_assumptions(self, gpu: str) -> None:
        for row in predictions.read(gpu):
            assert set(row.spent) <= set(ASSUMPTIONS)
            spent = list(row.spent.values())
            assert spent == sorted(spent, reverse=True)
            assert 0.95 * row.us < sum(spent) < 1.001 * row.us


def test_launches_of_a_large_step() -> None:
    """Five reductions of attention more than at batch 2, where no queries are split there."""
    step = next(
        case for case in predictions.cases()
        if (case.op.name, case.shape) == ("training", predictions.LARGE)
    )  # fmt: skip
    calls = predictions.counted(step, "triton", HOPPER)["step"]
    assert sum(call.ours for call in calls) == 340
    assert {call.phase for call in calls} == {"fwd", "bwd"}


def test_differences() -> None:
    row = Prediction("a", "s", "bf16", "fwd", "triton", 10.0, 1, 0, 0, {})
    other = replace(row, mode="step")
    assert list(predictions.differences([row], [replace(row, us=10.09)])) == []
    assert list(predictions.differences([row], [replace(row, us=10.2)])) == [
        "a s bf16 fwd triton: 10 us are 10.2 us now"
    ]
    found = sorted(predictions.differences([row], [other]))
    assert found == ["a s bf16 fwd triton: no longer there", "a s bf16 step triton: new"]


def test_command_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        replace(case, providers=("triton",))
        for case in predictions.cases()
        if (case.op.name, case.shape) == ("training", predictions.LARGE)
        or (case.op.name, case.shape.label) == SUBSET[0]
    ]
    monkeypatch.setattr(predictions, "cases", lambda: chosen)
    command = ["predict", "--gpu", "H200", "--out", str(tmp_path)]
    assert main([*command, "--check"]) == 1
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200.jsonl"]
    assert main([*command, "--check"]) == 0
    monkeypatch.setitem(ASSUMPTIONS, GAP, replace(ASSUMPTIONS[GAP], value=3.0))
    assert main([*command, "--check"]) == 1
    assert "us now" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
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
        assert (found.gpu, found.reason) == ("h200", "")
        assert len(found.measured) == len(predictions.read("h200"))
        assert {row.ratio for row in found.rows} == {1.0}
        assert {verdict.stretch for verdict in found.verdicts} == {1.0}
        assert sum(verdict.rows for verdict in found.verdicts) == len(found.rows)
        assert sum(verdict.weight for verdict in found.verdicts) == pytest.approx(1, abs=0.02)

    @pytest.mark.parametrize(
        ("name", "factor", "said"),
        [
            ("attention backward D=64", 2.0, "assumed 31 % of its bound, implied 1"),
            ("HBM of our kernels", 0.8, "assumed 80 % of copy bandwidth, implied 100 % of copy"),
            (GAP, 2.0, "assumed 1.5 us, implied 3 us"),
            ("SDPA backward", 0.25, "assumed 26 % of its bound, implied 1"),
        ],
    )
    def test_points_at_the_wrong_assumption(self, name: str, factor: float, said: str) -> None:
        found = judgement.compare(records(with_factors({name: factor})), H200_NAME)
        worst = found.verdicts[0]
        assert worst.assumption == name
        assert worst.stretch == pytest.approx(factor, rel=0.02)
        value = ASSUMPTIONS[name].value
        wanted = value * factor if name == GAP else value / factor
        assert worst.implied == pytest.approx(wanted, rel=0.02)
        assert f"Most wrong: {name}, {said}" in judgement.markdown(found)[0]
        others = [v.stretch for v in found.verdicts[1:] if v.implied is not None]
        assert others == pytest.approx([1.0] * len(others), abs=0.03)

    def test_several_at_once_and_noise(self) -> None:
        wrong = {"attention backward D=64": 0.7, GAP: 0.6, "stock stencil, memory": 2.5}
        exact, draw = with_factors(wrong), random.Random(0)
        found = judgement.compare(
            records(lambda row: exact(row) * draw.uniform(0.95, 1.05)), H200_NAME
        )
        by_name = {verdict.assumption: verdict for verdict in found.verdicts}
        for name, factor in wrong.items():
            assert by_name[name].implied is not None
            assert by_name[name].stretch == pytest.approx(factor, rel=0.05)
        assert found.verdicts[0].assumption == GAP  # by far the most of all times

    def test_one_slow_record(self) -> None:
        key = ("attention", "b2 s1 1024x1024 B1 M4", "bf16", "fwd", "triton")
        slow = [r for r in records(lambda row: 2 * row.us) if r.key == key]
        found = judgement.compare([*slow, *records(lambda row: None)], H200_NAME)
        (row,) = found.measured
        assert (row.prediction.key, row.ratio) == (key, 2.0)
        worst, gap = found.verdicts
        assert (worst.assumption, worst.rows, worst.ratio) == ("attention forward D=64", 1, 2.0)
        assert worst.stretch == pytest.approx(2, rel=0.02)
        assert worst.implied == pytest.approx(0.22, rel=0.02)
        # A hundredth of one time says nothing.
        assert (gap.assumption, gap.rows, gap.ratio, gap.implied) == (GAP, 0, None, None)

    def test_stretch_by_hand(self) -> None:
        """One row all of one assumption, twice as slow: half of it is off, against a prior of 1 to
        100. Then the same ten times, and one of another."""
        row = judgement.Row(
            Prediction("a", "", "", "", "", 10.0, 1, 0, 0, {"GEMM, memory": 10.0}), 20.0, "graph"
        )
        (verdict,) = judgement._verdicts([row])
        assert verdict.stretch == pytest.approx(1 + 0.5 * 0.5 / (0.25 + 0.01))
        assert verdict.error == pytest.approx(0.05 / (0.25 + 0.01) ** 0.5)
        assert verdict.blame == verdict.stretch - 1
        other = replace(row, prediction=replace(row.prediction, spent={"BatchNorm": 10.0}))
        first, second = judgement._verdicts([*10 * [row], replace(other, measured_us=10.0)])
        assert first.stretch == pytest.approx(1 + 2.5 / 2.51)
        assert (first.rows, second.stretch) == (10, 1.0)
        (fast,) = judgement._verdicts([replace(row, measured_us=1e-3)])
        assert fast.stretch == judgement.LEAST_STRETCH

    def test_what_the_host_was_timed_for_is_no_evidence(self) -> None:
        found = [r for r in records(lambda row: 3 * row.us) if r.key[0] == "training"]
        for record in found:
            record.method, record.host_us = "events", 2.7 * (record.p50_us or 0) / 3
        comparison = judgement.compare(found, H200_NAME)
        assert all(row.starved for row in comparison.measured)
        assert comparison.verdicts == ()
        text = "\n".join(judgement.markdown(comparison))
        assert "(events)*" in text
        assert f"{len(found)} rows may have timed the host" in text
        for record in found:
            record.host_us = 0.5 * (record.p50_us or 0)
        assert len(judgement.compare(found, H200_NAME).verdicts) > 0

    def test_names_of_gpus(self) -> None:
        found = judgement.compare(records(lambda row: row.us, "h100"), "NVIDIA H100 80GB HBM3")
        assert found.gpu == "h100"
        assert {row.ratio for row in found.rows} == {1.0}
        found = judgement.compare([], "NVIDIA A100-SXM4-80GB")
        assert found.rows == ()
        assert judgement.markdown(found) == [
            "Nothing to compare with: no predictions for 'NVIDIA A100-SXM4-80GB', only for h200, "
            "h100 (`python -m benchmarks predict --gpu a100` makes them)."
        ]
        assert "predict" not in judgement.compare([], "AMD EPYC").reason.split("only")[1]

    def test_summary(self) -> None:
        nothing = judgement.markdown(judgement.compare([], H200_NAME))
        assert nothing[0] == "Predicted for the H200 SXM; nothing of it was measured."
        rows = [line for line in nothing if line.startswith(("| training", "| model"))]
        assert len(rows) == 2 * 3 + 2 * 3
        assert all("| - | - |" in line for line in rows)
        lines = judgement.markdown(judgement.compare(records(with_factors({GAP: 2})), H200_NAME))
        places = [
            next(i for i, line in enumerate(lines) if line.startswith(f"| {start}"))
            for start in ("training", "model", "encoder", "assumption", "stage", "attention b0")
        ]
        assert places == sorted(places)
        assert [i for i, line in enumerate(lines) if line == ""] == [
            1, places[3] - 1, places[4] - 3,
        ]  # fmt: skip
        torch_, triton = (
            next(
                row
                for row in predictions.read("h200")
                if row.key == ("model", "b2 1024x1024 B1 M4", "bf16", "fwd", provider)
            )
            for provider in ("torch", "triton")
        )
        line = next(x for x in lines if x.startswith("| model b2") and "| triton |" in x)
        assert f"| {triton.us:.0f} | {triton.us + triton.spent[GAP]:.0f} (graph) |" in line
        slowed = (torch_.us + torch_.spent[GAP]) / (triton.us + triton.spent[GAP])
        assert line.endswith(f"| {torch_.us / triton.us:.2f}: {slowed:.2f} |")

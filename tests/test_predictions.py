"""Predicted times: what is counted, what is assumed, what is committed, and who was wrong."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import efficiency, judgement, predictions
from benchmarks.__main__ import main
from benchmarks.efficiency import ASSUMPTIONS, GAP, KINDS, SEEN, rates
from benchmarks.kernel_work import Kernel
from benchmarks.launches import KernelCounter, counting
from benchmarks.meta import META, on_meta
from benchmarks.plan import Case
from benchmarks.predictions import Prediction
from benchmarks.record import Record
from equiseg_fast import EQUISeg, add_layer_norm, attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="counting launches needs triton"
)
HOPPER = (90, 132)
H200 = rates("h200")


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> None:
    """Not here: the poison itself would be counted."""


def new(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


def step(function: Callable[..., Tensor], *leaves: Tensor) -> KernelCounter:
    with counting(HOPPER) as counter:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return counter


def named(counter: KernelCounter) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in counter.kernels()}


# ---- what is counted ----------------------------------------------------------------------------


class TestWork:
    def test_one_launch_of_ours(self) -> None:
        x, update, weight, bias = new(2, 64, 32), new(2, 64, 32), new(32), new(32)
        with counting(HOPPER) as counter:
            add_layer_norm(x, update, weight, bias)
        (kernel,) = counter.kernels()
        # x, update, total, normed; weight, bias; mean, rstd in fp32
        assert kernel.bytes == 4 * 2 * 64 * 32 * 2 + 2 * 32 * 2 + 2 * 128 * 4
        assert kernel.slots == 28.5 * 2 * 64 * 32
        assert (kernel.name, kernel.kind) == ("add_layer_norm_fwd", "ours")
        assert counter.fused == {"add_layer_norm_fwd": 1}

    def test_attention(self) -> None:
        q, k, v = (new(2, length, 5, 64, grad=True) for length in (1024, 256, 256))
        found = named(step(attention, q, k, v))
        scores, size = 2 * 5 * 1024 * 256, 2 * 1024 * 5 * 64 * 2
        forward = found["attention_fwd"]
        assert (forward.matrix, forward.exps) == (4 * 64 * scores, scores)
        assert forward.bytes == 2 * size + 2 * size // 4 + 2 * 5 * 1024 * 4
        assert forward.kind == "attention forward D=64"
        assert forward.programs == 2 * 5 * 1024 // 128
        assert found["attention_bwd_dkdv"].matrix == 8 * 64 * scores
        assert found["attention_bwd_dq"].matrix == 6 * 64 * scores
        assert found["attention_bwd_dq"].kind == "attention backward D=64"
        with counting(HOPPER) as counter:
            attention(q[..., :32], k[..., :32], v[..., :32])
        assert counter.kernels()[0].kind == "attention forward D=32"

    def test_stock_linear(self) -> None:
        counter = step(
            F.linear, new(4096, 32, grad=True), new(64, 32, grad=True), new(64, grad=True)
        )
        forward, *backward = counter.kernels()
        assert (forward.name, forward.kind) == ("addmm", "GEMM")
        assert forward.matrix == 2 * 4096 * 32 * 64
        assert forward.bytes == 2 * (4096 * 32 + 64 * 32 + 64 + 4096 * 64)
        assert [k.kind for k in backward] == ["GEMM", "weight-gradient GEMM", "reduction"]
        assert [call.phase for call in counter.calls] == ["fwd", "bwd", "bwd", "bwd"]
        with counting() as counter:
            F.linear(new(4, 32, dtype=torch.float32), new(64, 32, dtype=torch.float32))
        (single,) = counter.kernels()
        assert (single.matrix, single.vector) == (0, 2 * 4 * 32 * 64)

    def test_convolution_is_several_kernels(self) -> None:
        x, weight, bias = new(2, 16, 8, 8, grad=True), new(32, 16, 3, 3, grad=True), new(32)
        found = step(lambda x, w: F.conv2d(x, w, bias, padding=1), x, weight).kernels()
        product, size = 2 * 2 * 64 * 9 * 16 * 32, 2 * 2 * 64 * 32
        assert [k.name for k in found] == [
            "convolution", "add_", "convolution_backward dx", "convolution_backward dweight",
        ]  # fmt: skip
        assert [k.matrix for k in found] == [product, 0, product, product]
        assert found[1].bytes == 2 * size
        assert {found[i].kind for i in (0, 2, 3)} == {"convolution"}

    def test_stencils_and_pools(self) -> None:
        x, weight = new(2, 16, 8, 8), new(16, 1, 7, 7)
        with counting() as counter:
            F.conv2d(x, weight, new(16), padding=3, groups=16)
            F.avg_pool2d(x, 11, 1, 5)
        convolution, pool = counter.kernels()
        assert convolution.slots == 3.25 * 49 * x.numel()
        assert convolution.matrix == 0
        assert pool.slots == 3.25 * 121 * x.numel()
        assert convolution.kind == pool.kind == "stencil"

    def test_norms_read_twice(self) -> None:
        x, weight, bias = new(8, 64, 32, grad=True), new(32, grad=True), new(32, grad=True)
        found = step(lambda *a: F.layer_norm(a[0], (32,), *a[1:]), x, weight, bias).kernels()
        size = 8 * 64 * 32 * 2
        kinds = ["LayerNorm forward", *2 * ["LayerNorm backward"]]
        assert [k.kind for k in found] == kinds
        assert [k.bytes // size for k in found] == [2, 3, 2]
        maps = new(2, 32, 8, 8, grad=True)
        mean, var = new(32, dtype=torch.float32), new(32, dtype=torch.float32)
        found = step(lambda x: F.batch_norm(x, mean, var, training=True), maps).kernels()
        size = 2 * 32 * 64 * 2
        assert [k.bytes // size for k in found if k.kind == "BatchNorm"] == [1, 2, 2, 3]
        with counting() as counter:
            F.batch_norm(maps, mean, var)
        assert [k.bytes // size for k in counter.kernels()] == [2]

    def test_copies_and_what_is_overwritten(self) -> None:
        x = new(64, 32)
        with counting() as counter:
            x.clone()
            x.mT.contiguous()
            x.copy_(new(64, 32))
            x.zero_()
            x.add_(x)
            new(1, 32).expand(64, 32) + 1
        size = 64 * 32 * 2
        found = counter.kernels()
        kinds = ["pointwise", "transposing copy", *4 * ["pointwise"]]
        assert [k.kind for k in found] == kinds
        assert [k.bytes for k in found] == [*3 * [2 * size], size, 2 * size, size + 64]

    def test_flash_attention_has_a_program_per_block_of_keys(self) -> None:
        q, k, v = (new(4, 2, n, 64, grad=True) for n in (4096, 256, 256))
        with on_meta():
            found = step(F.scaled_dot_product_attention, q, k, v).kernels()
        forward, _, backward, _ = found
        scores = 4 * 2 * 4096 * 256
        assert (forward.kind, forward.matrix) == ("SDPA forward D=64", 4 * 64 * scores)
        assert (backward.kind, backward.matrix) == ("SDPA backward", 10 * 64 * scores)
        assert (forward.programs, backward.programs) == (4 * 2 * 32, 4 * 2 * 2)

    def test_sums_of_gradients_are_backward(self) -> None:
        counter = step(lambda x: x.exp() + x.sin(), new(8, grad=True))
        added = [call.phase for call in counter.calls if call.name.startswith("add")]
        assert added == ["fwd", "bwd"]


class TestMeta:
    def test_casts_as_autocast_of_cuda_does(self) -> None:
        x, weight = new(4, 8, dtype=torch.float32), new(8, 8, dtype=torch.float32)
        with on_meta(torch.bfloat16):
            y = F.linear(x, weight)
            assert y.dtype == torch.bfloat16
            assert F.gelu(y).dtype == torch.bfloat16
            assert {F.layer_norm(y, (8,)).dtype, y.softmax(-1).dtype, y.sum().dtype} == {
                torch.float32
            }
            assert (y @ y.T.float()[:, :4]).dtype == torch.bfloat16
        with on_meta():
            assert F.linear(x, weight).dtype == torch.float32

    def test_everything_is_made_there(self) -> None:
        with on_meta():
            generator = torch.Generator().manual_seed(0)
            assert torch.randn(2**40, generator=generator).device == META
            assert torch.randperm(4, generator=generator).device.type == "cpu"
        assert torch.zeros(1).device.type == "cpu"

    def test_who_waits_for_a_value_goes_on(self) -> None:
        with on_meta(), counting() as counter:
            marks = torch.zeros(64, dtype=torch.int64)
            mask = marks == 3
            assert mask.sum() > 0
            assert int(mask.sum()) == mask.sum().item() == 1
            assert torch.zeros(64, 8)[mask].shape == (64, 8)
        assert counter.stock["nonzero"] + counter.stock["index"] >= 1


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


def large_model(train: bool, autocast: torch.dtype | None) -> KernelCounter:
    """EQUISeg-B2 with random layers on two images of four modalities at 1024 x 1024."""
    with on_meta():
        model = EQUISeg.from_name("b2", num_classes=25)
        if not train:
            model.fold_()
        model.to(META, torch.float32 if autocast else torch.bfloat16).train(train)
        images = new(4, 2, 3, 1024, 1024, dtype=torch.float32 if autocast else torch.bfloat16)
        labels = torch.zeros(2, 1024, 1024, dtype=torch.uint8)
    with on_meta(autocast), torch.set_grad_enabled(train), counting(HOPPER) as counter:
        if train:
            loss, _ = model.loss(images, labels)
            torch.autograd.grad(loss, list(model.parameters()))
        else:
            model(images)
    return counter


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
    gradients into parameters (24 kernels) and had the bias of depthwise convolutions apart."""
    counter = large_model(train, autocast)
    found = counter.kernels()
    assert counter.fused.total() == ours
    known = {"norm", "conv", "mm", "attention", "pool", "sort", "topk", "sum", "mean"}
    unknown = {k.name for k in found if k.kind == "pointwise" and any(x in k.name for x in known)}
    assert unknown <= {"topk"}
    assert len(found) == pytest.approx(kernels, rel=0.03)
    assert sum(k.bytes for k in found) / 1e9 == pytest.approx(gb, rel=0.01)
    assert sum(efficiency.predict(found, H200).values()) / 1e3 == pytest.approx(ms, rel=0.04)


# ---- what is committed --------------------------------------------------------------------------

GPUS = ("h100", "h200")
SUBSET = (
    ("norm", "b2 s1 1024x1024 B1 M4"),
    ("attention", "b2 s1 1080x1920 B1 M2"),
    ("losses", "b0 s1 512x512 B1 M4"),
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
        committed = {row.key: asdict(row) for row in predictions.read(gpu)}
        before = [committed[row.key] for row in rows]
        assert list(predictions.differences(before, [asdict(row) for row in rows])) == []

    def test_times_are_spent_on_assumptions(self, gpu: str) -> None:
        for row in predictions.read(gpu):
            assert set(row.spent) <= set(ASSUMPTIONS)
            spent = list(row.spent.values())
            assert spent == sorted(spent, reverse=True)
            assert 0.95 * row.us < sum(spent) < 1.001 * row.us

    def test_kernel_by_kernel(self, gpu: str) -> None:
        lines = (predictions.FOLDER / f"{gpu}-kernels.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        # Five reductions of attention more than at batch 2, where no queries are split there.
        assert sum(row["launches"] for row in rows) == 340
        assert {row["phase"] for row in rows} == {"fwd", "bwd"}
        whole = next(
            row for row in predictions.read(gpu)
            if row.key == ("training", "b2 1024x1024 B1 M4", "bf16", "step", "triton")
        )  # fmt: skip
        backward = sum(
            row["launches"] * row["us"] for row in rows if row["limit"] == "attention backward D=64"
        )
        assert backward == pytest.approx(whole.spent["attention backward D=64"], rel=1e-3)


def test_differences() -> None:
    row = {"op": "a", "mode": "fwd", "us": 10.0, "spent": {}}
    other = row | {"mode": "step"}
    assert list(predictions.differences([row], [row | {"us": 10.09}])) == []
    assert list(predictions.differences([row], [row | {"us": 10.2}])) == [
        "a fwd: 10 us are 10.2 us now"
    ]
    found = sorted(predictions.differences([row], [other]))
    assert found == ["a fwd: no longer there", "a step: new"]


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200-kernels.jsonl", "h200.jsonl"]
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


def with_factor(name: str, factor: float) -> Callable[[Prediction], float]:
    """All as predicted, but for what one assumption decides."""
    return lambda row: row.us + (factor - 1) * row.spent.get(name, 0.0)


H200_NAME = "NVIDIA H200"


class TestJudgement:
    def test_as_predicted(self) -> None:
        found = judgement.compare(records(lambda row: row.us), H200_NAME)
        assert (found.gpu, found.reason) == ("h200", "")
        assert len(found.measured) == len(predictions.read("h200"))
        assert {row.ratio for row in found.rows} == {1.0}
        for verdict in found.verdicts:
            if verdict.implied is not None:
                value = ASSUMPTIONS[verdict.assumption].value
                assert verdict.implied == pytest.approx(value)
        assert sum(verdict.rows for verdict in found.verdicts) == len(found.rows)

    @pytest.mark.parametrize(
        ("name", "factor", "said"),
        [
            ("attention backward D=64", 2.0, "assumed 31 % of its bound, implied 16 % of its"),
            ("HBM of our kernels", 0.8, "assumed 80 % of copy bandwidth, implied 100 % of copy"),
            (GAP, 2.0, "assumed 1.5 us, implied 3 us"),
            ("SDPA backward", 0.25, "assumed 26 % of its bound, implied 104 %"),
        ],
    )
    def test_points_at_the_wrong_assumption(self, name: str, factor: float, said: str) -> None:
        found = judgement.compare(records(with_factor(name, factor)), H200_NAME)
        worst = found.verdicts[0]
        assert worst.assumption == name
        value = ASSUMPTIONS[name].value
        wanted = value * factor if name == GAP else value / factor
        assert worst.implied == pytest.approx(wanted, rel=0.02)
        assert worst.error == pytest.approx(max(factor, 1 / factor), rel=0.02)
        first = judgement.markdown(found)[0]
        assert f"Most wrong: {name}, {said}" in first

    def test_one_slow_record(self) -> None:
        key = ("attention", "b2 s1 1024x1024 B1 M4", "bf16", "fwd", "triton")
        slow = [r for r in records(lambda row: 2 * row.us) if r.key == key]
        found = judgement.compare([*slow, *records(lambda row: None)], H200_NAME)
        (row,) = found.measured
        assert (row.prediction.key, row.ratio) == (key, 2.0)
        (verdict,) = found.verdicts
        assert (verdict.assumption, verdict.rows, verdict.telling) == (
            "attention forward D=64", 1, 1,
        )  # fmt: skip
        share = row.prediction.dominating[1]
        assert verdict.implied == pytest.approx(0.44 * share / (1 + share))
        assert "by 1 row." in judgement.markdown(found)[0]

    def test_a_small_part_of_the_time_tells_nothing(self) -> None:
        row = judgement.Row(
            Prediction("a", "", "", "", "", 10.0, 1, 0, 0, {"GEMM, memory": 4.0}), 20.0, "graph"
        )
        assert row.ratio == 2
        assert row.implied is None
        clear = replace(row.prediction, spent={"GEMM, memory": 8.0})
        assert replace(row, prediction=clear).implied == pytest.approx(0.8 / (1.8 / 0.8))
        # Faster than everything else alone should have been.
        assert replace(row, prediction=clear, measured_us=1.0).implied is None

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
        lines = judgement.markdown(judgement.compare(records(with_factor(GAP, 2)), H200_NAME))
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

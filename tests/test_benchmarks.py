"""The benchmark suite: an honest baseline, a gate that refuses what is wrong, right numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common import data
from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.op import MODES, Op, unavailable
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.command.table import significant
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options, plan
from benchmarks.measure.record import Record, environment, read
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES, Grid, Suite
from benchmarks.providers.baselines import EagerBaseline
from benchmarks.reporting import report
from equiseg_fast import add_layer_norm, attention, ops
from equiseg_fast.models import EQUISeg

CPU = torch.device("cpu")
SMALL = Shape("b0", 1, 64, 96, batch=2, modalities=3)
PROVIDERS = ("baseline", "reference", "torch")
NETWORKS = ("block", "block_training", "stage", "encoder", "model", "training")
ACCELERATED = ("accelerate_segformer",)
OPS = tuple(name for name in ops.__all__ if name not in ("explain", "ohem", "use_backend"))


# ---- the baseline -------------------------------------------------------------------------------


def small_model(dtype: torch.dtype, modalities: int = 3) -> tuple[EQUISeg, Tensor, Tensor]:
    model = EQUISeg.from_name(
        "b0",
        modalities=[f"m{i}" for i in range(modalities)],
        num_classes=7,
        drop_path=0.0,
        head_dropout=0.0,
    ).to(dtype)
    for gate in model.gates:
        nn.init.normal_(gate.fc2.weight, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    labels = torch.randint(0, 7, (2, 32, 64))
    labels[0, :5] = 255
    labels[1] = 3  # one class only: this image teaches nothing
    return model, torch.randn(modalities, 2, 3, 32, 64, dtype=dtype), labels


@pytest.mark.parametrize(("modalities", "training"), [(2, True), (3, False), (4, True)])
def test_baseline_is_the_model(modalities: int, training: bool) -> None:
    model, images, labels = small_model(torch.float64, modalities)
    model.train(training)
    baseline = EagerBaseline(model)
    torch.testing.assert_close(baseline.forward(images), model(images), rtol=1e-9, atol=1e-9)

    order = torch.randperm(modalities)
    losses = [
        baseline.loss(images, labels, order=order.tolist()),
        model.loss(images, labels, order=order)[0],
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    got, expected = (torch.autograd.grad(x, list(model.parameters())) for x in losses)
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_baseline_is_the_model_in_fp32() -> None:
    model, images, labels = small_model(torch.float32)
    baseline = EagerBaseline(model)
    order = torch.tensor([1, 2, 0])
    torch.testing.assert_close(baseline.forward(images), model(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        baseline.loss(images, labels, order=order.tolist()),
        model.loss(images, labels, order=order)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_baseline_updates_the_same_running_statistics() -> None:
    model, images, _ = small_model(torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(images)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(before)
    EagerBaseline(model).forward(images)
    torch.testing.assert_close(dict(model.state_dict()), after)


# ---- the gate -----------------------------------------------------------------------------------


def tiny_suite() -> Suite:
    return replace(SUITES["quick"], seconds=0.0, rounds=(2, 2))


def case_of(op: Op, dtype: str = "fp32", shape: Shape = SMALL) -> Case:
    shape = replace(shape, stage=op.stages[0])
    if not shape.stage:
        shape = replace(shape, height=32, width=64, batch=1)
    modes = tuple(m for m in ("fwd", "step") if m in op.modes)
    return Case(op, shape, dtype, modes, (*PROVIDERS, "triton"))


def run_case(case: Case) -> dict[tuple[str, str], Record]:
    limits = Limits(1e9, {"fp32": 1e9, "bf16": 1e9}, 1e9)
    rows = Runner(Options(), limits, suite=tiny_suite()).run(case)
    return {(r.provider, r.mode): r for r in rows}


@pytest.mark.parametrize("name", [*OPS, *NETWORKS])
def test_every_provider_is_correct_and_measured(name: str) -> None:
    case = case_of(operations()[name])
    rows = run_case(case)
    assert len(rows) == len(case.modes) * 4
    for (provider, _), row in rows.items():
        if provider == "triton":
            assert row.status == "unsupported"
            assert "GPU" in row.reason
            assert row.p50_us is None
            continue
        assert (row.status, row.reason) == ("ok", "")
        assert 0 < row.min_us <= row.p20_us <= row.p50_us <= row.p80_us
        assert row.n == 2
        assert row.method == "wall"
        assert row.peak_mib > 0
        assert row.budget <= 1
        assert row.cpu_us > 0
        if "step" in case.modes and len(case.modes) == 2:
            assert rows[provider, "step"].peak_mib > rows[provider, "fwd"].peak_mib


def test_segformer_of_transformers_runs_on_our_parameters() -> None:
    """The same features, and through the same leaves the same gradients."""
    case = case_of(operations()["encoder"])
    rows = run_case(replace(case, providers=("torch", "transformers")))
    assert {r.status for r in rows.values()} == {"ok"}
    problem = case.op.build(case.shape, torch.float32, CPU, 0)
    with torch.no_grad():
        for leaf in problem.leaves.values():
            leaf.normal_(std=0.1)
    (ours,), (theirs,) = problem.calls["torch"](), problem.calls["transformers"]()
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerated_models_are_timed_beside_what_they_were(name: str) -> None:
    if name == "accelerate_segformer":
        pytest.importorskip("transformers", reason="transformers not installed")
    case = replace(case_of(operations()[name]), modes=("step",), providers=("baseline", "torch"))
    rows = run_case(case)
    assert {(r.provider, r.status, r.n) for r in rows.values()} == {
        ("baseline", "ok", 2), ("torch", "ok", 2),
    }  # fmt: skip
    problem = case.op.build(case.shape, torch.float32, CPU, 0)
    with mock.patch("equiseg_fast.integrations.segformer.attention", wraps=attention) as ours:
        problem.calls["baseline"]()
        assert ours.call_count == 0
        problem.calls["torch"]()
        assert ours.call_count == 8  # blocks


@pytest.mark.parametrize("name", [*OPS, *NETWORKS])
def test_half_precision_passes_the_gate(name: str) -> None:
    shape = replace(SMALL, batch=1)
    rows = run_case(case_of(operations()[name], "bf16", shape))
    assert {r.status for (p, _), r in rows.items() if p != "triton"} == {"ok"}, {
        p: r.reason for (p, _), r in rows.items()
    }


def with_wrong(op: Op, spoil) -> Op:
    """The operation, its torch provider returning what `spoil` makes of the outputs."""

    def build(*arguments: object) -> Problem:
        problem = op.build(*arguments)
        right = problem.calls["torch"]
        problem.calls["torch"] = lambda: tuple(spoil(x) for x in right())
        return problem

    return replace(op, build=build)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.01 * grad


def _fails(x: Tensor) -> Tensor:
    raise RuntimeError("no such kernel image\nat some/file.cu")


@pytest.mark.parametrize(
    ("spoil", "status", "reason"),
    [
        (lambda x: x * 1.001, "incorrect", "error"),
        (lambda x: x[:, :-1], "incorrect", "shape"),
        (lambda x: torch.where(x == x.max(), float("nan"), x), "incorrect", "not finite"),
        (_fails, "error", "RuntimeError: no such kernel image"),
    ],
)
def test_what_is_wrong_is_not_timed(spoil, status: str, reason: str) -> None:
    rows = run_case(case_of(with_wrong(operations()["depthwise_conv_gelu"], spoil)))
    for mode in ("fwd", "step"):
        row = rows["torch", mode]
        assert row.status == status
        assert reason in row.reason
        assert row.p50_us is row.peak_mib is row.tflops is None
        assert row.n == 0
        assert rows["baseline", mode].status == "ok"


class _OneInTenThousand(_WrongGradient):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.0001 * grad


class _NoGradient(_WrongGradient):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("no backward here")


@pytest.mark.parametrize("name", ["depthwise_conv_gelu", "encoder"])
@pytest.mark.parametrize(
    ("spoil", "status"), [(_WrongGradient.apply, "incorrect"), (_NoGradient.apply, "error")]
)
def test_a_gradient_refuses_no_forward(name: str, spoil, status: str) -> None:
    case = case_of(with_wrong(operations()[name], spoil))
    rows = run_case(replace(case, providers=("reference", "torch")))
    forward, step = rows["torch", "fwd"], rows["torch", "step"]
    assert (forward.status, step.status) == ("ok", status)
    assert forward.p50_us > 0
    assert forward.budget < 1
    assert step.p50_us is None
    # Who runs forwards alone asks for no gradient, not even of the reference.
    alone = replace(case, modes=("fwd",), providers=("torch",))
    (row,) = run_case(alone).values()
    assert (row.status, row.saved_mib) == ("ok", None)


def test_long_chains_of_one_thread_pass_and_what_is_wrong_does_not() -> None:
    """PyTorch's LayerNorm then adds 16,560 terms one after the other."""
    torch.set_num_threads(1)
    op, shape = operations()["add_layer_norm"], Shape("b0", 2, 480, 736)
    case = Case(op, shape, "fp32", ("fwd", "step"), ("baseline", "torch"))
    assert {row.status for row in run_case(case).values()} == {"ok"}

    def build(*arguments: object) -> Problem:
        problem = op.build(*arguments)

        def wrong() -> tuple[Tensor, ...]:
            weight = _OneInTenThousand.apply(problem.inputs["weight"])
            return add_layer_norm(**{**problem.inputs, "weight": weight}, backend="torch")

        problem.calls["torch"] = wrong
        return problem

    step = replace(case, op=replace(op, build=build), modes=("step",), providers=("torch",))
    (row,) = run_case(step).values()
    assert (row.status, row.reason[:7]) == ("incorrect", "dweight")


@pytest.mark.parametrize("name", ["model", "training"])
def test_a_wrong_model_is_not_timed(name: str) -> None:
    rows = run_case(case_of(with_wrong(operations()[name], lambda x: 1.01 * x)))
    assert {r.status for (p, _), r in rows.items() if p == "torch"} == {"incorrect"}


def test_a_wrong_fold_is_blamed_on_the_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle and the reference are the model as it was."""
    right = EQUISeg.fold_

    def wrong(model: EQUISeg) -> EQUISeg:
        folded = right(model)
        with torch.no_grad():
            folded.head.linear_pred.weight.mul_(1.01)
        return folded

    monkeypatch.setattr(EQUISeg, "fold_", wrong)
    rows = run_case(case_of(operations()["model"]))
    status = {p: r.status for (p, _), r in rows.items() if p != "triton"}
    assert status.pop("torch") == "incorrect"
    assert set(status.values()) == {"ok"}


def test_out_of_memory_and_unsupported_are_rows() -> None:
    def exhausted(*arguments: object) -> Problem:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    rows = run_case(case_of(replace(operations()["attention"], build=exhausted)))
    assert {(r.status, r.reason) for (p, _), r in rows.items() if p != "triton"} == {
        ("oom", "out of memory")
    }
    rows = run_case(case_of(operations()["query_hub"], shape=replace(SMALL, modalities=1)))
    assert {r.status for r in rows.values()} == {"unsupported"}


# ---- timing and memory --------------------------------------------------------------------------


def test_memory_of_a_known_pattern() -> None:
    def call() -> Tensor:
        a = torch.empty(2**20)  # 4 MiB
        b = torch.empty(2**19)  # 2 MiB, 6 together
        del a
        return torch.empty(2**19) + b  # 2 + 2 + 2

    peak, result = timing.peak_bytes(call, CPU)
    assert peak == 6 * timing.MIB
    assert result.shape == (2**19,)


def test_memory_counts_from_the_state_before() -> None:
    held = torch.empty(2**20)
    assert timing.peak_bytes(lambda: torch.empty(2**18), CPU)[0] == timing.MIB
    assert timing.peak_bytes(lambda: held[:10], CPU)[0] == 0


def test_saved_bytes_counts_storages_once_and_not_the_inputs() -> None:
    x, w = torch.randn(2**18, requires_grad=True), torch.randn(2**18, requires_grad=True)

    def forward() -> tuple[Tensor, ...]:
        y = x * w  # saves x and w
        z = y.exp()  # saves z, 1 MiB
        return (z * z,)  # saves z twice more

    saved, (out,) = timing.saved_bytes(forward, [x, w])
    assert saved == timing.MIB
    out.sum().backward()
    assert x.grad is not None


def test_timing_quantiles_and_noise() -> None:
    steady = timing.Timing.of([1e-3] * 5, "wall")
    assert (steady.p20_us, steady.p50_us, steady.p80_us, steady.n) == (1000, 1000, 1000, 5)
    values = [i * 1e-6 for i in range(1, 12)]
    spread = timing.Timing.of(values, "wall")
    assert (spread.p20_us, spread.p50_us, spread.p80_us, spread.min_us) == pytest.approx(
        (3, 6, 9, 1)
    )
    assert record(5.0, width=0.3).noisy
    assert not record(5.0, width=0.2).noisy


def test_providers_are_interleaved_and_rotate() -> None:
    seen: list[str] = []
    calls = {name: (lambda n=name: seen.append(n)) for name in "abc"}
    timings = timing.measure_cpu(calls, seconds=0.0, rounds=(3, 9))
    assert "".join(seen) == "abcbcacab"
    assert {t.n for t in timings.values()} == {3}


@pytest.mark.parametrize("mode", MODES)
def test_modes_do_what_they_say(mode: str) -> None:
    x = torch.randn(5, requires_grad=True)
    forwards = []

    def forward() -> tuple[Tensor, ...]:
        forwards.append(torch.is_grad_enabled())
        return (x.square(),)

    call = timing.call_in_mode(forward, [x], mode)
    forwards.clear()
    result = call()
    assert x.grad is None
    assert forwards == {"fwd": [False], "bwd": []}.get(mode, [True])
    if mode in ("bwd", "step"):
        torch.testing.assert_close(result[0], 2 * x.detach() * timing.cotangent(x, 0))


# ---- data ---------------------------------------------------------------------------------------


def test_sensors_are_real_and_labels_are_bands() -> None:
    images, labels = data.motorcycle()
    assert images.shape == (3, 1, 3, 480, 736)
    assert images.isfinite().all()
    assert labels.shape == (1, 480, 736)
    labelled = labels[labels != data.IGNORE]
    shares = labelled.bincount().double() / len(labelled)
    assert len(shares) == data.BANDS
    assert shares.min() > 0.08
    measured = images[2][:, 0] > 0
    assert 0.8 < measured.double().mean() < 1
    assert torch.equal(labels != data.IGNORE, measured)
    assert images[2].max() == 1


def test_other_sizes_get_random_images_and_patches_of_labels() -> None:
    images = data.images(Shape("b0", 0, 64, 96, 2, 2), 0, CPU)
    assert images.shape == (2, 2, 3, 64, 96)
    assert images.std() > 0.9
    labels = data.labels((2, 256, 320), 0, CPU)
    assert set(labels.unique().tolist()) <= {*range(25), 255}
    assert (labels[:, :, 1:] == labels[:, :, :-1]).float().mean() > 0.85


# ---- records, comparison, report ----------------------------------------------------------------


def record(p50: float, *, width: float = 0.0, **fields: object) -> Record:
    case = {"variant": "b0", "stage": 1, "height": 64, "width": 96, "batch": 1, "modalities": 3}
    values = {"suite": "quick", "op": "attention", "case": case, "mode": "fwd"}
    row = Record(**(values | {"provider": "torch", "dtype": "fp32"} | fields))
    row.p20_us, row.p50_us, row.p80_us = p50 - width, p50, p50 + width
    row.min_us, row.n, row.method = p50 - width, 5, "wall"
    return row


def test_environment_names_versions_and_nothing_private() -> None:
    import getpass
    import socket

    env = environment(CPU)
    assert env["torch"] == torch.__version__
    text = json.dumps(env)
    assert str(Path.home()) not in text
    assert str(Path(__file__).resolve().parents[1]) not in text
    host = socket.gethostname()
    assert host not in text or len(host) < 4
    assert f'"{getpass.getuser()}"' not in text
    assert env["env_id"] == environment(CPU, {"bandwidth": 1.0})["env_id"]


def test_report_marks_winners_and_hides_no_loss() -> None:
    rows = [
        record(8000.0, provider="baseline"),
        record(2000.0),
        record(1000.0, provider="baseline", op="upsample_cross_entropy"),
        record(3000.0, op="upsample_cross_entropy"),
        replace(
            record(1.0, provider="reference", status="oom", reason="out of memory"), p50_us=None
        ),
    ]
    text = report.markdown(rows, {"device": "a chip"}, ["![latency](plots/latency.png)"])
    assert "**2.00**" in text
    assert "**8.00**" not in text
    lost = "upsample_cross_entropy fwd b0 s1 64x96 B1 M3 fp32"
    assert f"- {lost}: torch takes 3.00x the time of baseline" in text
    assert "reference: oom, out of memory" in text
    assert "![latency](plots/latency.png)" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.2345, "1.23"),
        (123.45, "123"),
        (4567.8, "4568"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


# ---- command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", list(SUITES))
def test_every_suite_can_be_planned(suite: str) -> None:
    cases = plan(Options(suite=suite))
    quick = {*OPS, "model", "training"}
    networks = {"encoder", "model", "training"}
    names = {"quick": quick, "cpu": networks, "headline": networks}
    names["core"] = {*operations()} - {*ACCELERATED}
    assert {case.op.name for case in cases} == names.get(suite, set(operations()))
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)


def test_dry_run_lists_cases_providers_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--suite", "core", "--device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "attention b2 s1 1024x1024 B1 M4 bf16: fwd, step: baseline, reference, torch, compile"
        in out
    )
    assert "skipped: attention triton: kernels are timed on a GPU only" in out
    assert "skipped: upsample_cross_entropy sdpa" not in out
    assert main(["run", "--device", "cpu", "--provider", "sdpa_flash", "--dry-run"]) == 0
    skipped = "skipped: upsample_cross_entropy sdpa_flash: no such implementation"
    assert skipped in capsys.readouterr().out


def test_run_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid(("b0",), ((64, 96),), modalities=(3,), stages=(4,))
    tiny = replace(tiny_suite(), grids=(grid,))
    monkeypatch.setitem(SUITES, "core", tiny)
    out = tmp_path / "first"
    arguments = ["run", "--suite", "core", "--op", "guided_gate,upsample_cross_entropy"]
    arguments += ["--device", "cpu"]
    assert main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "total" in shown
    assert f"written to {out}" in shown
    files = {"results.jsonl", "env.json", "report.md", "plots"}
    assert {p.name for p in out.iterdir()} == files
    assert {p.name for p in (out / "plots").iterdir()} == {"latency.png", "memory.png"}
    rows = read(out)
    env = json.loads((out / "env.json").read_text())
    assert {r.env_id for r in rows} == {env["env_id"]}
    assert {r.status for r in rows} == {"ok", "unsupported"}
    assert str(tmp_path) not in (out / "report.md").read_text()

    (out / "report.md").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").is_file()


def test_environment_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_triton_is_never_timed_off_a_gpu() -> None:
    for op in operations().values():
        assert "GPU" in unavailable(op, "triton", CPU)


def test_a_busy_machine_is_reported() -> None:
    quiet, busy = record(1000.0, cpu_us=1900.0), record(1000.0, cpu_us=600.0)
    assert not quiet.contended
    assert report.contention([quiet]) == []
    assert "during 1 of 2 medians" in report.contention([quiet, busy])[0]
    # Two threads got one between them: the call alone cannot tell.
    starved = record(1000.0, cpu_us=1000.0, cpu_share=0.5)
    assert starved.contended
    assert not replace(starved, cpu_share=0.97).contended


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_share_of_the_cpu_is_that_of_all_threads(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def wall() -> float:
        nonlocal now
        now += 0.004
        return now

    monkeypatch.setattr(timing, "perf_counter", wall)
    monkeypatch.setattr(timing, "process_time", lambda: share * torch.get_num_threads() * now)
    assert timing.cpu_share() == pytest.approx(share, rel=0.2)

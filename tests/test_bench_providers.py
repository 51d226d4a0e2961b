"""Providers that others made: called the right way, and held against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import operations
from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.problem import Shape
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import Record
from benchmarks.measure.runner import Runner
from benchmarks.measure.suites import SUITES
from benchmarks.providers import baselines, provider
from benchmarks.providers.baselines import EagerBaseline
from equiseg_fast.models import EQUISeg

SMALL = Shape("b0", 2, 64, 96, batch=2, modalities=3)


def measured(op: str, *names: str, shape: Shape = SMALL, dtype: str = "fp32") -> dict[str, Record]:
    """One record per provider, of a step (of inference where there is none)."""
    declared = operations()[op]
    if shape.stage not in declared.stages:
        shape = replace(shape, stage=0, height=40, width=64, batch=1)
    mode = "step" if "step" in declared.modes else "fwd"
    case = Case(declared, shape, dtype, (mode,), names)
    limits = Limits(1e9, {"fp32": 1e9, "bf16": 1e9})
    suite = replace(SUITES["quick"], seconds=0.0, rounds=(2, 2))
    return {row.provider: row for row in Runner(Options(), limits, suite=suite).run(case)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", ["sdpa_math", "sdpa_flash"])
def test_backends_of_sdpa_that_a_cpu_has(provider: str, dtype: str) -> None:
    row = measured("attention", provider, dtype=dtype)[provider]
    assert (row.status, row.reason) == ("ok", "")
    assert row.p50_us > 0


@pytest.mark.parametrize(
    "op",
    [
        "query_hub",
        "pooling_mixer",
        "block",
        "block_training",
        "stage",
        "encoder",
        "model",
        "training",
    ],
)
def test_the_baseline_in_channels_last_memory_is_correct(op: str) -> None:
    row = measured(op, "baseline_cl")["baseline_cl"]
    assert (row.status, row.reason) == ("ok", "")


OPERATIONS = [name for name, op in operations().items() if op.scope == "operation"]


@pytest.mark.parametrize("op", [*OPERATIONS, "block_training", "stage", "encoder"])
def test_maps_of_any_size(op: str) -> None:
    """70 x 102 pixels are 5 x 7 tokens of stage 3, and 18 x 26 of stage 1."""
    stage = 3 if 3 in operations()[op].stages else operations()[op].stages[0]
    shape = Shape("b0", stage, 70, 102, batch=1, modalities=2)
    for row in measured(op, "baseline", "torch", shape=shape).values():
        assert (row.status, row.reason) == ("ok", "")
        assert row.shape == shape


def test_channels_last_is_what_it_says_and_ends_with_the_call() -> None:
    def memory_format(x: Tensor) -> str:
        y = baselines.to_nchw(x, 4, 6)
        return "last" if y.is_contiguous(memory_format=torch.channels_last) else "first"

    x = torch.randn(2, 24, 8)
    assert memory_format(x) == "first"
    assert baselines.channels_last(memory_format)(x) == "last"
    with pytest.raises(ZeroDivisionError):
        baselines.channels_last(lambda: 1 / 0)()
    assert memory_format(x) == "first"
    view = baselines.channels_last(baselines.to_nchw)(x, 4, 6)
    assert view.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("modalities", [1, 2])
def test_the_baseline_pads_as_the_model_does(modalities: int) -> None:
    names = [f"m{i}" for i in range(modalities)]
    model = EQUISeg.from_name(
        "b0", modalities=names, num_classes=5, drop_path=0.0, head_dropout=0.0
    ).double()
    images = torch.randn(modalities, 1, 3, 40, 72, dtype=torch.double)
    labels = torch.randint(0, 5, (1, 40, 72))
    baseline = EagerBaseline(model.eval())
    torch.testing.assert_close(baseline.forward(images), model(images))
    order = torch.arange(modalities)
    ours = model.loss(images, labels, order=order)[0]
    torch.testing.assert_close(baseline.loss(images, labels, order=order.tolist()), ours)


ENCODER, BETWEEN = ("attention", "mix_ffn"), ("attention", "pooled", "hub_of")


@pytest.mark.parametrize(
    ("op", "part"),
    [
        *(("block", part) for part in BETWEEN),
        *(("block_training", part) for part in BETWEEN),
        *(("stage", part) for part in ENCODER),
        *(("encoder", part) for part in ENCODER),
        *(("model", part) for part in (*BETWEEN, "mix_ffn")),
        *(("training", part) for part in (*BETWEEN, "mix_ffn")),
    ],
)
def test_one_percent_in_any_part_is_wrong(
    op: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing hides behind the residual stream."""
    right = getattr(baselines, part)
    monkeypatch.setattr(baselines, part, lambda *inputs: 1.01 * right(*inputs))
    row = measured(op, "baseline")["baseline"]
    assert (row.status, row.p50_us) == ("incorrect", None)


def test_flex_attention_gets_heads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cases import ops

    def bhld(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[1] == SMALL.heads
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(ops, "_compiled_flex", lambda: bhld)
    on_cpu = replace(provider.PROVIDERS["flex"], gpu_only="")
    monkeypatch.setitem(provider.PROVIDERS, "flex", on_cpu)
    row = measured("attention", "flex")["flex"]
    assert (row.status, row.reason) == ("ok", "")


def test_flex_attention_is_that_of_pytorch_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from benchmarks.cases import ops

    ops._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options))
    try:
        assert ops._compiled_flex() == (flex_attention, {"dynamic": False})
    finally:
        ops._compiled_flex.cache_clear()


def test_compiled_providers_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        seen.append(options["mode"])
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    provider._compiled.cache_clear()
    try:
        rows = measured("guided_gate", "compile", "compile_max")
    finally:
        provider._compiled.cache_clear()
    assert {row.status for row in rows.values()} == {"ok"}
    assert seen == [None, "max-autotune-no-cudagraphs"]

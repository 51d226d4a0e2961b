"""Providers that others made: called the right way, held against the reference, or named missing.

Packages that run on GPUs only are played by modules of ours with the interface that they document;
what is proven is that the benchmarks hand over the right layout and take the right one back.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
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


# ---- packages that run on GPUs only -------------------------------------------------------------


def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is kept to GPUs."""
    found = {name: replace(p, gpu_only="") for name, p in provider.PROVIDERS.items()}
    monkeypatch.setattr(provider, "PROVIDERS", found)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module of that name, and of its parents, with these functions in it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        module = ModuleType(path)
        module.__spec__ = ModuleSpec(path, None)
        monkeypatch.setitem(sys.modules, path, module)
    for key, value in functions.items():
        setattr(sys.modules[name], key, value)
    # What they cannot do here is exactly what these stand-ins can.
    everywhere(monkeypatch)


def attention_blhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As flash_attn and xformers document it: `[B, L, H, D]`."""
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1), v)


@pytest.mark.parametrize(
    ("provider", "module", "function"),
    [
        ("flash_attn", "flash_attn", "flash_attn_func"),
        ("xformers", "xformers.ops", "memory_efficient_attention"),
    ],
)
def test_attention_of_packages(
    provider: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(tuple(q.shape))
        return attention_blhd(q, k, v)

    install(monkeypatch, module, **{function: called})
    row = measured("attention", provider)[provider]
    assert (row.status, row.reason) == ("ok", "")
    assert set(calls) == {(SMALL.rows, SMALL.tokens, SMALL.heads, 32)}

    wrong = {function: lambda q, k, v: attention_blhd(q, k, 1.01 * v)}
    install(monkeypatch, module, **wrong)
    row = measured("attention", provider)[provider]
    assert row.status == "incorrect"
    assert row.p50_us is None


def test_flex_attention_gets_heads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cases import ops

    def bhld(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[1] == SMALL.heads
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(ops, "_compiled_flex", lambda: bhld)
    everywhere(monkeypatch)
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


class _LigerCrossEntropy(torch.autograd.Function):
    """As liger_kernel does it: the gradient is made in the forward and overwrites the input."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, target: Tensor, ignore: int) -> Tensor:
        with torch.enable_grad():
            x = rows.detach().clone().requires_grad_()
            loss = F.cross_entropy(x, target, ignore_index=ignore, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        rows.detach().copy_(gradient)
        ctx.save_for_backward(rows.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None, None


def test_cross_entropy_of_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    def liger_cross_entropy(
        input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None,
        ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        assert input.is_contiguous()
        assert input.dim() == 2
        assert reduction == "none"
        return _LigerCrossEntropy.apply(input, target, ignore_index)

    install(
        monkeypatch,
        "liger_kernel.transformers.functional",
        liger_cross_entropy=liger_cross_entropy,
    )
    shape = replace(SMALL, stage=1)
    row = measured("upsample_cross_entropy", "liger", shape=shape)["liger"]
    assert (row.status, row.reason) == ("ok", "")


def test_layer_norm_of_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        return F.layer_norm(X, W.shape, W, B, eps)

    install(monkeypatch, "liger_kernel.transformers.functional", liger_layer_norm=liger_layer_norm)
    row = measured("add_layer_norm", "liger")["liger"]
    assert (row.status, row.reason) == ("ok", "")


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


def test_what_is_missing_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    monkeypatch.setattr(provider, "find_spec", lambda name: None)
    rows = measured("attention", "flash_attn", "xformers", "sdpa_math")
    assert (rows["flash_attn"].status, rows["flash_attn"].reason) == (
        "unsupported", "flash_attn is not installed"
    )  # fmt: skip
    assert rows["xformers"].reason == "xformers is not installed"
    assert rows["sdpa_math"].status == "ok"

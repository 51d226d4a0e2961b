"""The device that is not there: what it accepts, what it finds, and what EQUISeg compiles on it."""

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs triton")

from benchmarks.__main__ import main
from benchmarks.offline import dry

MOST_BINARIES = 72
"""Of a training step of EQUISeg-B0 with autocast to bf16: a tenth more than there are. On a GPU
every one costs about half a second before the first step ends."""
STEP, INFERENCE = (f"{name} b0 512x512 B1 M4 bf16" for name in ("training", "model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dry") / "cache"


@pytest.fixture(scope="module")
def pool(cache: Path) -> Iterator[Executor]:
    """A process that compiles: this one interprets."""
    with dry.compilers(1, cache) as pool:
        yield pool


def bind(pool: Executor, label: str, what: str = "awkward") -> dry.Bound:
    bound = pool.submit(dry.bind, what, label).result()
    assert bound.errors == [], label
    assert bound.binaries, label
    return bound


@pytest.fixture(scope="module")
def step(pool: Executor) -> dry.Bound:
    return bind(pool, STEP, "model")


@pytest.fixture(scope="module")
def inference(pool: Executor) -> dry.Bound:
    return bind(pool, INFERENCE, "model")


class TestModel:
    """EQUISeg-B0 at 512 x 512 with four modalities, in autocast to bf16, on sm_90."""

    def test_binds(self, step: dry.Bound, inference: dry.Bound) -> None:
        assert len(step.binaries) <= MOST_BINARIES
        assert step.launches >= len(step.binaries)
        kernels, fewer = ({b.kernel for b in x.binaries.values()} for x in (step, inference))
        assert kernels > fewer

    @pytest.mark.parametrize("change", ["512x512 B8", "1024x1024 B1", "480x640 B3", "65x33 B1"])
    def test_another_batch_or_size_compiles_nothing(
        self, pool: Executor, step: dry.Bound, change: str
    ) -> None:
        other = bind(pool, f"training b0 {change} M4 bf16", "model").binaries
        assert [other[key].label for key in other.keys() - step.binaries.keys()] == []

    def test_another_dtype_compiles_something(self, pool: Executor, step: dry.Bound) -> None:
        """So that the test above can fail."""
        other = bind(pool, STEP.replace("bf16", "fp16"), "model")
        assert other.binaries.keys() - step.binaries.keys()

    def test_compiles_without_spills(
        self, pool: Executor, inference: dry.Bound, cache: Path
    ) -> None:
        """And is found again in the cache, wherever that lies by then, by Triton's own path."""
        costs = list(pool.map(dry.compile_binary, inference.binaries.values()))
        assert [(r.label, r.problems()) for r in costs if r.problems()] == []
        assert all(r.registers > 0 for r in costs)
        assert {p.suffix for p in cache.rglob("*") if p.is_file()} == {".cubin", ".json", ".source"}
        there = cache.rename(cache.with_name("there"))
        with dry.compilers(1, there) as other:
            hits = other.submit(hits_for_real).result()
        assert hits == [True] * len(inference.binaries)


def hits_for_real() -> list[bool]:
    """Inference by way of `JITFunction.run`, compiler and all: which binaries were in the cache."""
    import triton
    from triton.runtime.jit import JITFunction

    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
    compiling, device = JITFunction._do_compile, dry.dry_device

    @contextmanager
    def real(*given: int) -> Iterator[dry.Bound]:
        with device(*given) as bound, patch.object(JITFunction, "_do_compile", compiling):
            yield bound

    with patch.object(dry, "dry_device", real):
        assert dry.bind("model", INFERENCE).errors == []
    return hits


class TestAwkward:
    @pytest.mark.parametrize(
        "label",
        [
            "attention C33 far apart b0 s4 544x288 B2 M3 bf16",
            "attention C1 x[1:] b0 s4 544x288 B2 M3 fp16",
            "query_hub C33 x[1:] b0 s4 544x288 B2 M3 bf16",
            "add_layer_norm C1 b0 s4 32x32 B1 M8 fp32",
            "class_prototypes C48 b0 s4 32x32 B1 M8 fp16",
            "guided_gate C33 b0 s4 32x32 B1 M8 bf16",
            "upsample_cross_entropy C1 b0 s4 544x288 B2 M3 bf16",
            "pooling_mixer C33 far apart b0 s4 544x288 B2 M3 bf16",
            "depthwise_conv_gelu C33 far apart b0 s4 544x288 B2 M3 fp32",
        ],
    )
    def test_binds(self, pool: Executor, label: str) -> None:
        """Every operation on odd, unaligned and far apart inputs; a few of hundreds."""
        binaries = bind(pool, label).binaries.values()
        if "far apart" in label:
            assert any("i64" in b.signature.values() for b in binaries)
        if "x[1:]" in label:
            assert any("unaligned" in b.label for b in binaries)

    @pytest.mark.parametrize(
        "name",
        [
            "attention C128", "depthwise_conv_gelu C48", "pooling_mixer C48", "query_hub C48",
            "guided_gate C48", "class_prototypes C48", "add_layer_norm C48",
        ],
    )  # fmt: skip
    def test_whole_rows_are_read_as_vectors_wherever_they_lie(
        self, pool: Executor, name: str
    ) -> None:
        """x[1:] of a whole width is copied; parameters, which are small, stay where they are."""
        moved = bind(pool, f"{name} x[1:] b0 s4 544x288 B2 M3 bf16").binaries.values()
        small = {"p_w", "p_b", "p_bias", "p_logits"}
        assert {n for b in moved for n in b.unaligned} <= small
        odd = bind(pool, "add_layer_norm C33 x[1:] b0 s4 544x288 B2 M3 bf16").binaries.values()
        assert any(set(b.unaligned) - small for b in odd)

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_a_single_channel_compiles_without_spills(self, pool: Executor, dtype: str) -> None:
        """The narrowest width, which the table of resources does not have."""
        bound = bind(pool, f"query_hub C1 b0 s4 32x32 B1 M8 {dtype}")
        for r in pool.map(dry.compile_binary, bound.binaries.values()):
            assert r.problems() == [], r.label

    def test_what_is_refused_is_an_error(self, pool: Executor) -> None:
        *found, last = pool.submit(launch_wrongly).result()
        assert found == [
            "sum_partials_kernel: the grid (2, 70000) is outside 1 to (2147483647, 65535, 65535)",
            "sum_partials_kernel: an argument is a tensor on the CPU",
        ]
        assert re.match(r"sum_partials_kernel: TypeError: .* missing 2 required", last)


def launch_wrongly() -> list[str]:
    """Errors of a grid over the limits, of a tensor on the CPU, and of too few arguments."""
    from equiseg_fast.kernels._common import launch, sum_partials_kernel

    x, options = torch.empty(64, device="meta"), {"num_warps": 4, "num_stages": 1}
    options |= {"TAPS": 1, "BLOCK_N": 16, "BLOCK_C": 16}
    with dry.dry_device() as bound:
        launch(sum_partials_kernel, (2, 70000), x, x, x, 1, 16, **options)
        launch(sum_partials_kernel, (2,), x, x.new_empty(64, device="cpu"), x, 1, 16, **options)
        launch(sum_partials_kernel, (2,), x, x, x, **options)
    return bound.errors


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--what", "core", "--op", "add_layer_norm", "--count", "--processes", "1")
    assert main(["dry", *words]) == 0
    shown = capsys.readouterr().out
    assert "core: add_layer_norm b0 s1 512x512 B1 M4 bf16: " in shown
    assert " 0 problems; " in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--what all", "--what must be among model, core, awkward, visit; got 'all'"),
        ("--what core --op nothing", "--op must be of core; got nothing"),
        ("--arch 91", "invalid choice: 91"),
    ],
)
def test_wrong_names(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dry", *words.split()])
    assert text in capsys.readouterr().err

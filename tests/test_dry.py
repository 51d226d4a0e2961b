"""The device that is not there: what it accepts, what it finds, and what EQUISeg compiles on it."""

import argparse
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="compiling needs triton")

from benchmarks.offline import dry, dry_device, resources
from benchmarks.offline.dry_programs import Model

MOST_BINARIES = 72
"""Of a training step of EQUISeg-B0 with autocast to bf16: a tenth more than there are. On a GPU
every one costs about half a second before the first step ends."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process that compiles: this one interprets."""
    with resources.children(1, str(tmp_path_factory.mktemp("cache"))) as pool:
        yield pool


def traced(pool: ProcessPoolExecutor, *names: str, what: str = "model") -> list[dry.Traced]:
    order = dry.Order((what,))
    return [pool.submit(dry.trace, order, (what, name)).result() for name in names]


@pytest.fixture(scope="module")
def step(pool: ProcessPoolExecutor) -> dry.Traced:
    return traced(pool, "training step")[0]


class TestModel:
    """EQUISeg-B0 at 512 x 512 with four modalities, in autocast to bf16, on sm_90."""

    def test_binds(self, pool: ProcessPoolExecutor, step: dry.Traced) -> None:
        (inference,) = traced(pool, "inference")
        assert step.errors == inference.errors == []
        assert 0 < len(step.binaries) <= MOST_BINARIES
        assert step.launches >= len(step.binaries)
        assert {b.kernel for b in step.binaries} > {b.kernel for b in inference.binaries}

    @pytest.mark.parametrize("change", ["batch 8", "1024 x 1024", "480 x 640, batch 3", "65 x 33"])
    def test_another_batch_or_size_compiles_nothing(
        self, pool: ProcessPoolExecutor, step: dry.Traced, change: str
    ) -> None:
        (other,) = traced(pool, change)
        known = {b.key for b in step.binaries}
        assert other.errors == []
        assert other.binaries
        assert [f"{b.kernel} {b.case}" for b in other.binaries if b.key not in known] == []

    def test_another_dtype_compiles_something(
        self, pool: ProcessPoolExecutor, step: dry.Traced
    ) -> None:
        """So that the test above can fail."""
        (other,) = traced(pool, "fp16")
        assert {b.key for b in other.binaries} - {b.key for b in step.binaries}

    def test_compiles_without_spills(self, tmp_path: Path) -> None:
        """And is found again in the cache, wherever that lies by then, also by the real path."""
        here, there = tmp_path / "here", tmp_path / "there"
        order = dry.Order(("model",), names=("training step", "inference"))
        first = dry.survey(order, here, processes=2)
        assert first.errors == []
        assert (first.hits, len(first.programs)) == (0, 2)
        assert all(b.registers > 0 and b.seconds > 0 for b in first.binaries.values())
        here.rename(there)
        dry.adopt(there)
        with resources.children(1, str(there)) as pool:
            found = pool.submit(run_for_real, there).result()
        assert found.errors == []
        assert found.binaries
        for b in found.binaries:
            assert b.hit, f"{b.kernel} {b.case}"
            assert b.registers == first.binaries[b.key].registers
        kept = {path.suffix for path in there.rglob("*") if path.is_file()}
        assert kept <= {".cubin", ".json", ".so"}


def run_for_real(cache: Path) -> dry_device.DryDevice:
    """Inference by way of `JITFunction.run`, compiler and all."""
    with dry_device.dry_device(cache=cache) as device:
        Model(train=False).run()
    return device


class TestAwkward:
    def test_binds(self, pool: ProcessPoolExecutor) -> None:
        """Every operation on odd, unaligned and far apart inputs; a few of hundreds."""
        names = (
            "attention far apart bf16", "attention B2 Lq33 Lk17 H3 D1 fp16 x[1:]",
            "query_hub M3 (2, 153, 33) bf16 x[1:]", "add_layer_norm C1 fp32",
            "class_prototypes K256 (1, 1, 1) fp16", "guided_gate M8 (2, 153, 33) bf16",
            "upsample_cross_entropy K1 (2, 153, 33) bf16", 
            "pooling_mixer (2, 153, 33) far apart bf16",
            "depthwise_conv_gelu (2, 153, 33) far apart fp32 x[1:]",
        )  # fmt: skip
        for found in traced(pool, *names, what="awkward"):
            assert found.errors == [], found.name
            assert found.binaries
            if "far apart" in found.name:
                assert any("i64" in b.signature.values() for b in found.binaries)
            if "x[1:]" in found.name:
                assert any("unaligned" in b.case for b in found.binaries)

    @pytest.mark.parametrize(
        "name",
        [
            "attention B4 Lq300 Lk77 H2 D128", "depthwise_conv_gelu (2, 9, 160)",
            "pooling_mixer (2, 9, 160)", "query_hub M3 (2, 9, 160)", "guided_gate M3 (2, 9, 160)",
            "class_prototypes K25 (2, 9, 160)", "add_layer_norm C160",
        ],
    )  # fmt: skip
    def test_whole_rows_are_read_as_vectors_wherever_they_lie(
        self, pool: ProcessPoolExecutor, name: str
    ) -> None:
        """x[1:] of a whole width is copied; parameters, which are small, stay where they are."""
        (moved,) = traced(pool, f"{name} bf16 x[1:]", what="awkward")
        assert moved.errors == []
        small = {"p_w", "p_b", "p_bias", "p_logits"}
        assert {n for b in moved.binaries for n in b.unaligned} <= small
        (odd,) = traced(pool, "add_layer_norm C33 bf16 x[1:]", what="awkward")
        assert any(set(b.unaligned) - small for b in odd.binaries)

    def test_a_single_channel_compiles_without_spills(self) -> None:
        """The narrowest width, which the table of resources does not have."""
        names = tuple(f"query_hub M8 (1, 1, 1) {dtype}" for dtype in ("bf16", "fp32"))
        found = dry.survey(dry.Order(("awkward",), names=names), processes=1)
        assert found.errors == []
        assert len(found.programs) == 2

    def test_what_is_refused_is_an_error(self, pool: ProcessPoolExecutor) -> None:
        *found, last = pool.submit(launch_wrongly).result()
        assert found == [
            "sum_partials: the grid (2, 70000, 1) is outside 1 to (2147483647, 65535, 65535)",
            "sum_partials: p_dw is *fp32, but the tensor is on the CPU",
        ]
        assert re.match(r"sum_partials_kernel: TypeError: .* missing 2 required", last)

    @pytest.mark.parametrize(
        ("kind", "value", "why"),
        [
            ("i32", 2**31, "2147483648 has more than 32 bits"),
            ("i32", 1.0, "1.0 is no integer"),
            ("u8", -1, "-1 has more than 8 bits"),
            ("fp32", "1", "'1' is no number"),
            ("*fp32", 7, "7 is no tensor"),
            ("*fp32", torch.empty(1), "the tensor is on the CPU"),
            ("i32", -(2**31), ""), ("i64", 2**62, ""), ("u1", True, ""), ("i1", False, ""),
            ("i1", True, ""), ("fp32", 1, ""), ("bf16", 1.5, ""), ("constexpr", None, ""),
            ("*fp32", torch.empty(1, device="meta"), ""),
        ],
    )  # fmt: skip
    def test_refusal(self, kind: str, value: object, why: str) -> None:
        assert dry_device.refusal(kind, value) == why


def launch_wrongly() -> list[str]:
    """Errors of a grid over the limits, of a tensor on the CPU, and of too few arguments."""
    from equiseg_fast.kernels._common import launch, sum_partials_kernel

    x, options = torch.empty(64, device="meta"), {"num_warps": 4, "num_stages": 1}
    options |= {"TAPS": 1, "BLOCK_N": 16, "BLOCK_C": 16}
    with dry_device.dry_device(compiling=False) as device:
        launch(sum_partials_kernel, (2, 70000), x, x, x, 1, 16, **options)
        launch(sum_partials_kernel, (2,), x, x.new_empty(64, device="cpu"), x, 1, 16, **options)
        launch(sum_partials_kernel, (2,), x, x, x, **options)
    return device.errors


class TestCommand:
    def test_interpreting_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), dry_device.dry_device():
            pass

    def test_exit_status(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = parse("--what", "core", "--op", "add_layer_norm", "--count", "--processes", "1")
        assert dry.main(args, Console(width=200)) == 0
        shown = capsys.readouterr().out
        assert "add_layer_norm b0 s1 512x512 B1 M4 bf16" in shown
        assert "0 problems" in shown

    def test_wrong_names(self) -> None:
        with pytest.raises(ValueError, match=r"--what must be among model, core, .*; got 'all'"):
            dry.main(parse("--what", "all"), Console())
        with pytest.raises(SystemExit):
            parse("--arch", "91")

    def test_a_cache_is_filled_once(self, tmp_path: Path) -> None:
        order = dry.Order(("core",), only=("add_layer_norm",))
        first = dry.survey(order, tmp_path)
        again = dry.survey(order, tmp_path)
        assert first.errors == again.errors == []
        assert first.hits == 0
        assert again.hits == len(again.binaries) == len(first.binaries) > 0


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    dry.add_arguments(parser)
    return parser.parse_args(arguments)

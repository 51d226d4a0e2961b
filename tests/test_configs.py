"""Launch configurations: the architectures that decide them, and the arithmetic of their tiles."""

import inspect
import itertools
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")
from equiseg_fast.kernels import (
    _tuned,
    add_layer_norm,
    attention,
    class_prototypes,
    depthwise_conv_gelu,
    query_hub,
)
from equiseg_fast.kernels._arch import (
    ARCHITECTURES,
    HALF,
    IEEE,
    INTERPRETER,
    PRECISIONS,
    TF32,
    Tile,
    architecture,
    precision_class,
)

ARCHS = tuple(row.number for row in ARCHITECTURES)
LIKE = {86: 89, 87: 89, 88: 89, 103: 100, 110: 100, 121: 120, 130: 120, 200: 120}
"""What has no row of its own, and the row that it is treated as."""
VALUES: dict[str, tuple[Any, ...]] = {
    "precision": PRECISIONS, "head_dim": (16, 32, 33, 64, 127, 128), "itemsize": (2, 4),
    "modalities": (1, 4, 8), "channels": (8, 33, 64, 160, 4096), "classes": (2, 25, 150),
    "num_classes": (2, 25, 150),
}  # fmt: skip

CONFIGS = {
    "fwd": attention.attention_fwd_config,
    "dkdv": attention.attention_dkdv_config,
    "dq": attention.attention_dq_config,
}


def arguments_of(function: str) -> list[tuple[Any, ...]]:
    """Examples of what follows the architecture."""
    _, *names = inspect.signature(_tuned._functions[function]).parameters
    return list(itertools.product(*(VALUES[name] for name in names)))


class TestArchitectures:
    def test_rows_are_in_order(self) -> None:
        begins = [row.since for row in ARCHITECTURES]
        assert begins == sorted(set(begins))
        for row in ARCHITECTURES:
            assert architecture(row.number) is row

    @pytest.mark.parametrize(("arch", "like"), [*LIKE.items(), (INTERPRETER, 80), (80, 80)])
    def test_what_has_no_row(self, arch: int, like: int) -> None:
        assert architecture(arch).number == like

    @pytest.mark.parametrize("arch", LIKE)
    def test_launches_are_those_of_the_row(self, arch: int) -> None:
        """Every choice, so that no kernel compares numbers for equality."""
        like = LIKE[arch]
        for name in _tuned._functions:
            for rest in arguments_of(name):
                choices = [_tuned.default((name, (a, *rest))) for a in (arch, like)]
                assert choices[0] == choices[1], (name, rest)
        for choose in (
            query_hub.query_hub_max_registers,
            lambda a: class_prototypes.padded_classes(a, 25),
            lambda a: attention._dots(None, a, HALF, Tile(block_m=32, block_n=64, num_warps=4)),
        ):
            assert choose(arch) == choose(like)

    def test_older_ones_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"arch must be 0 .* or at least 80; got 75"):
            architecture(75)
        with pytest.raises(ValueError, match=r"arch of attention_fwd_config must be .*; got 75"):
            attention.attention_fwd_config(75, HALF, 64)

    def test_needs_no_triton(self) -> None:
        code = (
            "import sys, equiseg_fast.kernels._arch, equiseg_fast.kernels._tuned;"
            "print('triton' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, check=True
        )
        assert done.stdout.strip() == "False"


class TestItemsizes:
    def test_precision_class(self) -> None:
        assert precision_class(2, allow_tf32=True) == HALF
        assert precision_class(4, allow_tf32=True) == TF32
        assert precision_class(4, allow_tf32=False) == IEEE

    @pytest.mark.parametrize("itemsize", [1, 8])
    @pytest.mark.parametrize("arch", [INTERPRETER, *ARCHS])
    def test_others_are_refused(self, arch: int, itemsize: int) -> None:
        """fp8 and fp64 are not fp32."""
        message = rf"itemsize must be 2 \(fp16, bf16\) or 4 \(fp32\); got {itemsize}"
        for allow_tf32 in (False, True):
            with pytest.raises(ValueError, match=message):
                precision_class(itemsize, allow_tf32)
        with pytest.raises(ValueError, match=message):
            depthwise_conv_gelu.depthwise_bwd_max_registers(itemsize)
        asked = 0
        for name, choose in _tuned._functions.items():
            rest = list(inspect.signature(choose).parameters)[1:]
            if "itemsize" in rest:
                given = [itemsize if n == "itemsize" else VALUES[n][0] for n in rest]
                module = sys.modules[choose.__module__]
                message = f"itemsize of {name} must be 2 or 4; got {itemsize}"
                with pytest.raises(ValueError, match=message):
                    getattr(module, name)(arch, *given)
                asked += 1
        assert asked >= 8


class TestTile:
    def test_has_what_it_was_given(self) -> None:
        tile = Tile(block_l=64, block_c=32, num_warps=4)
        assert tile.blocks == {"BLOCK_L": 64, "BLOCK_C": 32}
        assert tile.launch == {"num_warps": 4, "num_stages": 1}
        assert repr(tile) == "Tile(block_l=64, block_c=32, num_warps=4, num_stages=1)"


class TestConfigs:
    @pytest.mark.parametrize("choose", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("arch", [INTERPRETER, 80, 86, 89, 90, 100, 103, 120])
    def test_tiles_are_powers_of_two(self, choose, arch: int) -> None:
        widths = (*attention.HEAD_DIMS, 1, 33, 40, 127)
        for precision, head_dim in itertools.product(PRECISIONS, widths):
            config = choose(arch, precision, head_dim)
            assert config == choose(arch, precision, head_dim)
            for size in (config.block_m, config.block_n, config.num_warps):
                assert size.bit_count() == 1, config
            # tl.dot wants 16 at least on every side.
            assert min(config.block_m, config.block_n) >= 16, config
            assert 1 <= config.num_stages <= 4

    @pytest.mark.parametrize("head_dim", range(1, 129))
    def test_head_dims_are_padded_to_the_next_tile(self, head_dim: int) -> None:
        padded = attention.padded_head_dim(head_dim)
        assert padded in attention.HEAD_DIMS
        assert padded >= head_dim
        assert padded == 16 or padded < 2 * head_dim

    @pytest.mark.parametrize("head_dim", [0, 129])
    def test_head_dims_out_of_range(self, head_dim: int) -> None:
        with pytest.raises(ValueError, match=f"between 1 and 128, got {head_dim}"):
            attention.padded_head_dim(head_dim)

    @pytest.mark.parametrize("arch", ARCHS)
    def test_odd_widths_have_smaller_tiles(self, arch: int) -> None:
        """And whole ones the same whatever was done for odd ones."""
        for whole, odd in ((64, 63), (128, 127)):
            tiles = [query_hub.query_hub_dx_config(arch, 2, c) for c in (whole, odd)]
            assert tiles[1].block_l * tiles[1].block_c < tiles[0].block_l * tiles[0].block_c
            rows = [add_layer_norm.norm_bwd_config(arch, 2, c) for c in (whole, odd)]
            assert rows[1].block_l < rows[0].block_l
        assert attention.attention_width(40) == 40
        assert attention.attention_width(48) == 64
        for precision in PRECISIONS:
            assert attention.attention_fwd_config(arch, precision, 33).lean

    @pytest.mark.parametrize("num_sms", [1, 8, 132])
    @pytest.mark.parametrize("programs", [1, 2, 16, 64, 131, 132, 133, 1000])
    @pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 64, 100, 1024, 4099])
    def test_splits_cover_all_queries(self, programs: int, blocks: int, num_sms: int) -> None:
        splits, chunk = attention.query_splits(programs, blocks, num_sms)
        assert (splits, chunk) == attention.query_splits(programs, blocks, num_sms)
        assert 1 <= splits <= 64
        assert (splits - 1) * chunk < blocks <= splits * chunk

    def test_splits_fill_the_device(self) -> None:
        """Stage 1 of MiT at 1024 x 1024, batch 2, 4 modalities: 64 programs, 1024 query blocks."""
        splits, _ = attention.query_splits(64, 1024, 132)
        assert splits > 1
        waves = 64 * splits / 132
        assert waves / -(-64 * splits // 132) > 0.9

    def test_no_splits_without_need(self) -> None:
        assert attention.query_splits(132 * 8, 1024, 132)[0] == 1

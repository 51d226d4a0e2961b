"""What the compiled kernels cost, checked without a GPU, and the arithmetic of their tiles."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.offline import resources
from equiseg_fast.kernels._arch import architecture

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="compiling needs triton"
)

TABLE = Path(__file__).parent.parent / "benchmarks" / "results" / "resources" / "resources.json"
HOT = r"attention_fwd bf16 D64 "
HOT_ARCHS = (80, 100, 120)
"""What is compiled again on every run, beside what is on sm_90: the wider head dimension of the Mix
Transformer. sm_89 has the instructions of sm_80."""

HOT_ON_SM_90 = r"bf16 (C64 (gelu|du sums|save|64x64 )|K64 C64|M4 C64 \d|C256|u8 K32)"
HOT_ON_SM_90 += r"|attention_(fwd|bwd_dkdv|bwd_dq) bf16 D(32|64) "
"""And both head dimensions, and of the other kernels one of each that touches all features."""

# Ceilings of what is hot on sm_90: registers, KiB of shared memory, machine instructions per score.
# The larger of Triton 3.6 and 3.9, plus about 8 %. Two programs of eight warps share a
# SM up to 128 registers; the exponential alone takes 8 issue slots per score.
GATES = {
    ("attention_fwd", 32): (112, 44, 6.6),
    ("attention_fwd", 64): (128, 68, 7.0),
    ("attention_bwd_dkdv", 32): (200, 36, 13.5),
    ("attention_bwd_dkdv", 64): (236, 68, 14.6),
    ("attention_bwd_dq", 32): (120, 34, 8.6),
    ("attention_bwd_dq", 64): (140, 68, 9.8),
}

# Ceilings of the registers of the other kernels, on sm_80 and sm_90, for whole blocks of channels.
# 168 registers leave three programs of four warps on an SM, and 128 four.
REGISTERS = {
    r"depthwise_conv bf16": 168,
    r"depthwise_bwd bf16": 140,
    r"query_hub_\w+ bf16 C(32|64|128|160|320)": 208,
    r"pooling_mixer_\w+ bf16 C(160|256)": 168,
    r"guided_gate_fwd bf16": 168,
    r"guided_gate_bwd bf16": 128,
    r"class_sums bf16 K(64|128)": 228,
    r"class_sums bf16 K256": 248,
    r"class_gather bf16": 64,
    r"add_layer_norm_fwd bf16": 56,
    r"add_layer_norm_bwd bf16": 128,
    r"upsample_cross_entropy_fwd bf16": 128,
    r"upsample_cross_entropy_bwd bf16": 224,
}


@pytest.fixture(scope="module")
def table() -> list[resources.Resources]:
    """The committed table."""
    return list(resources.read(TABLE).values())


class TestCompiled:
    """Everything that the launchers can choose, on every architecture.

    Compiling all of it takes many minutes, so it is kept in a table (`python -m benchmarks
    resources`) under a fingerprint of code and options. The tests make sure that the table is
    good, that it is complete and up to date, and, by compiling a part again, that it is true.
    """

    def test_may_be_shipped(self, table: list[resources.Resources]) -> None:
        """Compiles, no spills, within shared memory, on the tensor cores of the architecture."""
        assert {r.arch for r in table} == set(resources.known_archs())
        assert {f"sm_{r.arch} {r.label}": r.problems() for r in table if r.problems()} == {}
        # sm_86 runs what sm_80 runs, with the shared memory of sm_89.
        assert max(r.shared for r in table if r.arch == 80) <= architecture(89).shared_limit

    @pytest.mark.parametrize("arch", resources.known_archs())
    def test_odd_widths_are_there(self, table: list[resources.Resources], arch: int) -> None:
        """Of every kernel, in half precision and in fp32; what has no entry may spill unseen."""
        found = [r for r in table if r.arch == arch]
        plain, odd = (
            {
                (r.label.split()[0], "bf16" in r.label)
                for r in found
                if ("unaligned" in r.label) is wanted
            }
            for wanted in (False, True)
        )
        assert plain == odd

    @pytest.mark.parametrize(("kernel", "head_dim"), GATES)
    def test_hot_configurations(
        self, table: list[resources.Resources], kernel: str, head_dim: int
    ) -> None:
        registers, shared, slots = GATES[kernel, head_dim]
        case = f"{kernel} bf16 D{head_dim} "
        found = [r for r in table if r.arch == 90 and r.label.startswith(case)]
        assert found
        for r in found:
            assert r.registers <= registers, r
            assert r.shared <= shared * resources.KIB, r
            assert r.slots is not None, r
            assert r.slots <= slots, r

    @pytest.mark.parametrize("entries", REGISTERS)
    def test_registers(self, table: list[resources.Resources], entries: str) -> None:
        found = [
            r
            for r in table
            if r.arch in (80, 90) and re.match(entries, r.label) and "unaligned" not in r.label
        ]
        assert found
        assert {f"sm_{r.arch} {r.label}": r.registers for r in found
                if r.registers > REGISTERS[entries]} == {}  # fmt: skip

    @needs_triton
    def test_table_is_complete_and_up_to_date(self) -> None:
        assert resources.not_in_table(TABLE) == []

    @pytest.mark.long
    @needs_triton
    def test_table_is_true(self, table: list[resources.Resources]) -> None:
        version = json.loads(TABLE.read_text())["triton"]
        if (installed := importlib.metadata.version("triton")) != version:
            pytest.skip(f"the table is of Triton {version}, {installed} is installed")
        compiled = resources.run(HOT_ARCHS, HOT)
        assert {r.arch for r in compiled} == set(HOT_ARCHS)
        others = resources.run([90], HOT_ON_SM_90)
        kernels = [r.label.split()[0] for r in others]
        assert len([name for name in kernels if name.startswith("attention")]) >= 6
        assert set(kernels) >= {r.split()[0] for r in REGISTERS if "\\" not in r}
        compiled += others
        known = {(r.arch, r.label): r for r in table}
        assert compiled == [known[r.arch, r.label] for r in compiled]


HELPER = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)
SHIFT = tl.constexpr(1)


@triton.jit
def scaled(x):
    """Three times x."""
    # Nothing else.
    return x * FACTOR
'''
KERNEL = """
import triton
import triton.language as tl

import HELPER as other
from HELPER import scaled


@triton.jit(do_not_specialize=["n"])
def _example_kernel(p_x, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(p_x + o, mask=o < n)
    tl.store(p_x + o, scaled(b) + other.SHIFT, mask=o < n)
"""
NUMBERS = itertools.count()
"""Of modules: a name is imported once."""


@needs_triton
class TestFingerprint:
    """Of a kernel that calls a function of another file."""

    @pytest.fixture
    def fingerprint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        """Writes both files with `new` for `old`; changes: of the options."""
        from equiseg_fast.kernels._common import OfflineEntry

        monkeypatch.syspath_prepend(tmp_path)

        def of(old: str = "", new: str = "", **changes: object) -> str:
            assert old in HELPER + KERNEL
            i = next(NUMBERS)
            helper, kernel = (text.replace(old, new) if old else text for text in (HELPER, KERNEL))
            (tmp_path / f"helper_{i}.py").write_text(helper)
            (tmp_path / f"kernel_{i}.py").write_text(kernel.replace("HELPER", f"helper_{i}"))
            module = importlib.import_module(f"kernel_{i}")
            entry = OfflineEntry(
                kernel=module._example_kernel, case="", types={"p_x": "*fp32", "n": "i32"},
                aligned=frozenset(["p_x"]), constexprs={"BLOCK": 16}, num_warps=4, num_stages=1,
                dots="none", scores=0, max_registers=None,
            )  # fmt: skip
            return resources.fingerprint(replace(entry, **changes))

        return of

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("# Nothing else.", "# Nothing more."),
            ("Three times x.", "x, three times."),
            ("    # Nothing else.\n", "\n\n"),
            ("(p_x + o, mask=o < n)", "(\n        p_x + o,\n        mask=o < n,\n    )"),
            ("@triton.jit\n", "UNUSED = 1\n\n\n@triton.jit\n"),
        ],
    )
    def test_text_does_not_count(self, fingerprint: Callable[..., str], old: str, new: str) -> None:
        assert fingerprint(old, new) == fingerprint()

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("o < n", "o <= n"),
            ("x * FACTOR", "x + FACTOR"),
            ("FACTOR = tl.constexpr(3)", "FACTOR = tl.constexpr(4)"),
            ("SHIFT = tl.constexpr(1)", "SHIFT = tl.constexpr(2)"),
            ("@triton.jit\n", "@triton.jit(noinline=True)\n"),
        ],
    )
    def test_code_counts(self, fingerprint: Callable[..., str], old: str, new: str) -> None:
        """Also that of what it calls."""
        assert fingerprint(old, new) != fingerprint()

    @pytest.mark.parametrize(
        "changes",
        [
            {"types": {"p_x": "*bf16", "n": "i32"}},
            {"aligned": frozenset()},
            {"constexprs": {"BLOCK": 32}},
            {"num_warps": 8},
            {"num_stages": 2},
            {"max_registers": 128},
        ],
    )
    def test_options_count(self, fingerprint: Callable[..., str], changes: dict) -> None:
        assert fingerprint(**changes) != fingerprint()


class TestTool:
    def resources(self, **changes: object) -> resources.Resources:
        good = {"label": "k D64", "dots": "half", "arch": 90, "path": "wgmma"}
        return resources.Resources(**(good | changes))

    def test_good_entry_has_no_problems(self) -> None:
        assert self.resources().problems() == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"stack": 8}, "spills 8 bytes"),
            ({"shared": 228 * 1024}, "228.0 KiB"),
            ({"path": "mma.sync"}, "expected wgmma"),
            ({"path": "wgmma+mma.sync"}, "expected wgmma"),
            ({"arch": 100}, "expected tcgen05"),
            ({"dots": "ieee"}, "expected fma"),
            ({"dots": "none"}, "expected none"),
            ({"error": "CompilationError: no"}, "CompilationError: no"),
        ],
    )
    def test_problems(self, changes: dict, words: str) -> None:
        assert words in "; ".join(self.resources(**changes).problems())

    def test_slots_are_those_of_the_shortest_loop_with_exponentials(self) -> None:
        outer = ["IADD3 R1, R1, 0x1, RZ", "MUFU.EX2 R2, R2", "FFMA R3, R3, R2, R1"]
        code = ["MOV R1, RZ", *outer, "@P0 BRA 0x0010", "LDG R5, R4", "@P1 BRA 0x0050", "EXIT"]
        sass = "\n".join(f"  /*{16 * i:04x}*/   {t} ;   /* 0x00 */" for i, t in enumerate(code))
        assert resources.slots_per_score(sass, 1) == 4
        assert resources.slots_per_score(sass, 0.5) == 8
        assert resources.slots_per_score(sass, 4) is None

    def test_tables(self, tmp_path: Path) -> None:
        results = [self.resources(slots=5.04), self.resources(arch=80, stack=16)]
        table = tmp_path / "new" / "resources.json"
        resources.write(results, table)
        assert list(resources.read(table).values()) == results
        record = json.loads(table.read_text())
        assert [e.get("stack", 0) for e in record["entries"]] == [0, 16]
        assert [e.get("slots") for e in record["entries"]] == [5.04, None]
        # One entry a line, so that a change of one shows as one.
        assert len(table.read_text().splitlines()) == 4

    @needs_triton
    def test_only_what_changed_is_compiled_again(self, tmp_path: Path) -> None:
        """One entry of the table is up to date, the other is not; wrong figures tell them apart."""
        choice = ([90], r"add_layer_norm_fwd bf16 C64 |class_gather bf16 C64 ")
        first = resources.run(*choice)
        assert len(first) == 2
        kept = replace(first[0], registers=1000)
        stale = replace(first[1], registers=1000, fingerprint="old")
        resources.write([kept, stale], tmp_path / "resources.json")
        second = resources.run(*choice, tmp_path)
        assert list(resources.read(tmp_path / "resources.json").values()) == second
        assert second == [kept, first[1]]

    def test_command_line(self) -> None:
        parser = argparse.ArgumentParser()
        resources.add_arguments(parser)
        assert parser.parse_args(["--arch", "80", "89"]).arch == [80, 89]
        with pytest.raises(SystemExit):
            parser.parse_args(["--arch", "80", "75"])

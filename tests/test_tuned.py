"""Tuned launch configurations: the file, its use, and the search that writes it."""

import importlib
import inspect
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main as benchmark_main
from benchmarks.cases import operations
from benchmarks.cases.common.problem import Shape
from benchmarks.command.options import kernel_stems
from benchmarks.machines import tune
from benchmarks.measure.timing import Timing
from equiseg_fast import add_layer_norm, guided_gate
from equiseg_fast.testing import random_normal

pytest.importorskip("triton", reason="needs triton")
from equiseg_fast.kernels import _arch, _common, _tuned, attention, query_hub
from equiseg_fast.kernels._arch import Tile
from tests.operations import DEVICE

KERNELS = [importlib.import_module(f"equiseg_fast.kernels.{stem}") for stem in kernel_stems()]
KEY = ("attention_fwd_config", (90, "half", 32))
ENTRY = {"function": KEY[0], "arguments": list(KEY[1]), "config": {"block_m": 64, "num_warps": 4}}
ANY = Timing(1.0, 1.0, 1.0, 1.0, 3, "wall")


def chosen() -> Any:
    return attention.attention_fwd_config(*KEY[1])


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"schema": 1, "configs": entries}))
    return path


class TestFile:
    def test_replaces_what_it_names_and_nothing_else(self, tmp_path: Path) -> None:
        default = chosen()
        other = attention.attention_fwd_config(80, "half", 32)
        with _tuned.use(_tuned.read(write(tmp_path / "t.json", ENTRY))):
            assert chosen() == replace(default, block_m=64, num_warps=4)
            assert attention.attention_fwd_config(80, "half", 32) == other
            with _tuned.use({}):
                assert chosen() == default
            assert chosen().block_m == 64
        assert chosen() == default

    def test_every_configuration_is_tunable(self) -> None:
        """Under a name of its own: it is the key in a file."""
        for module in KERNELS:
            for name in (n for n in vars(module) if n.endswith("_config")):
                assert _tuned._functions[name].__module__ == module.__name__, name

    def test_holds_in_other_threads(self) -> None:
        """The backward of a GPU runs on a thread of its own."""
        found: list[Any] = []
        config = replace(chosen(), num_warps=2)
        with _tuned.use({KEY: config}):
            thread = threading.Thread(target=lambda: found.append(chosen()))
            thread.start()
            thread.join()
        assert found == [config]

    def test_named_in_the_environment(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.json", ENTRY)
        code = (
            "from equiseg_fast.kernels import attention;"
            f"print(attention.attention_fwd_config{KEY[1]!r}.block_m)"
        )
        for variables, block_m in (({}, "128"), ({"EQUISEG_FAST_TUNED": str(path)}, "64")):
            done = subprocess.run(
                [sys.executable, "-c", code], env={**_environment(), **variables}, text=True,
                capture_output=True, check=True,
            )  # fmt: skip
            assert done.stdout.strip() == block_m

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"must name a file of `python -m benchmarks tune`; t\.json is none"),
            ("\xe9", r"t\.json is none \(UnicodeDecodeError"),
            ("[]", r"t\.json must be an object whose schema is 1"),
            ('{"schema": 9, "configs": []}', r"t\.json must be an object whose schema is 1"),
            ('{"schema": 1, "configs": {}}', r"t\.json: configs must be a list; got \{\}"),
            (
                '{"schema": 1, "configs": ["x"]}',
                r"t\.json entry 1: it must be an object with .*'x'",
            ),
            ('{"schema": 1, "configs": [{}]}', r"an object with function, arguments, config; got"),
        ],
    )
    def test_what_is_no_such_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "t.json"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            _tuned.read(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"t\.json is none \(FileNotFoundError: No such"):
            _tuned.read(tmp_path / "t.json")

    def test_without_triton(self, tmp_path: Path) -> None:
        """Only kernels know what may be tuned."""
        path = write(tmp_path / "t.json", ENTRY)
        code = (
            "import sys; sys.modules['triton'] = None;"
            "import pathlib; from equiseg_fast.kernels import _tuned;"
            f"_tuned.read(pathlib.Path({str(path)!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=_environment(), text=True, capture_output=True
        )
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ValueError: t.json is of no use without triton: ")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"function": "exec"}, r"function must be one of \[.*got 'exec'"),
            ({"function": None}, r"function must be one of \[.*got None"),
            ({"arguments": "90h"}, r"must be \['arch', 'precision', 'head_dim'\]; got '90h'"),
            ({"arguments": [90]}, r"must be \['arch', 'precision', 'head_dim'\]; got \[90\]"),
            ({"arguments": [9.0, "half", 32]}, "arch of attention_fwd_config .*; got 9.0"),
            ({"arguments": [75, "half", 32]}, "capability from 8.0 on; got 75"),
            ({"arguments": [True, "half", 32]}, "arch of attention_fwd_config .*; got True"),
            ({"arguments": [90, "bf16", 32]}, "must be one of half, tf32, ieee; got 'bf16'"),
            ({"arguments": [90, "half", 48]}, "no multiple of 16; got 48"),
            ({"config": []}, r"config must be an object; got \[\]"),
            ({"config": {"block_x": 1}}, "attention_fwd_config has .*got 'block_x'"),
            ({"config": {"block_m": "64"}}, "block_m must be a power of two; got '64'"),
            ({"config": {"block_m": None}}, "block_m must be a power of two; got None"),
            ({"config": {"block_m": [64]}}, r"block_m must be a power of two; got \[64\]"),
            ({"config": {"block_m": 0}}, "block_m must be a power of two; got 0"),
            ({"config": {"block_m": -64}}, "block_m must be a power of two; got -64"),
            ({"config": {"block_m": 96}}, "block_m must be a power of two; got 96"),
            ({"config": {"block_m": 64.0}}, "block_m must be a power of two; got 64.0"),
            ({"config": {"block_n": 8}}, "block_n must be at least 16; got 8"),
            ({"config": {"num_warps": 3}}, "num_warps must be one of 1, 2, 4, 8, 16; got 3"),
            ({"config": {"num_warps": True}}, "num_warps must be one of 1, 2, 4, 8, 16; got True"),
            ({"config": {"num_stages": 0}}, "num_stages must be a positive integer; got 0"),
            ({"config": {"lean": 1}}, "lean must be a bool; got 1"),
        ],
    )
    def test_bad_entries(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        good = {**ENTRY, "arguments": [80, "half", 32]}
        with pytest.raises(ValueError, match=message) as error:
            _tuned.read(write(tmp_path / "t.json", good, {**ENTRY, **changes}))
        assert str(error.value).startswith("t.json entry 2: ")

    @pytest.mark.parametrize(
        ("function", "arguments", "field", "least"),
        [
            ("norm_fwd_config", (90, 48), "block_c", 64),
            ("norm_bwd_config", (90, 2, 64), "block_c", 64),
            ("upsample_cross_entropy_fwd_config", (90, 25), "block_k", 32),
            ("class_sums_config", (90, 2, 25, 64), "block_l", 16),
            ("attention_dkdv_config", (90, "half", 64), "block_m", 16),
            ("attention_dq_config", (90, "half", 64), "block_n", 16),
        ],
    )
    def test_what_a_kernel_holds_whole(
        self, tmp_path: Path, function: str, arguments: tuple[Any, ...], field: str, least: int
    ) -> None:
        """Rows and classes that do not fit would be wrong without a word."""
        entry = {"function": function, "arguments": list(arguments)}
        path = tmp_path / "t.json"
        good = _tuned.read(write(path, entry | {"config": {field: least}}))
        assert getattr(good[function, arguments], field) == least
        message = rf"entry 1: {function}\[.*\]: {field} must be at least .*; got {least // 2}"
        with pytest.raises(ValueError, match=message):
            _tuned.read(write(path, entry | {"config": {field: least // 2}}))

    def test_no_entry_twice(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.json", ENTRY, ENTRY)
        with pytest.raises(ValueError, match=r"entry 2: .* must be there once"):
            _tuned.read(path)

    def test_every_default_passes(self) -> None:
        values = {
            "arch": (0, 80, 86, 89, 90, 100, 120), "precision": _arch.PRECISIONS,
            "head_dim": (1, 16, 17, 64, 100, 128), "itemsize": (2, 4), "modalities": (1, 3, 8),
            "channels": (1, 15, 32, 64, 160, 320, 4096), "classes": (1, 25, 256),
            "num_classes": (1, 25, 256),
        }  # fmt: skip
        for name, choose in _tuned._functions.items():
            names = inspect.signature(choose).parameters
            for arguments in itertools.product(*(values[n] for n in names)):
                _tuned.check_arguments(name, arguments)
                _tuned.check((name, arguments), _tuned.default((name, arguments)))


def _environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def gate_problem() -> dict[str, Any]:
    x = random_normal((2, 1, 200, 32), torch.float32, seed=0, device=DEVICE)
    return {"x": x, "logits": random_normal((2, 1, 32), torch.float32, seed=1, device=DEVICE)}


class TestUse:
    def test_what_a_table_holds_is_checked_too(self) -> None:
        for config, message in (
            (replace(chosen(), block_n=48), r"attention_fwd_config\[90, .*: block_n must"),
            (
                Tile(block_l=64, block_c=64, num_warps=4),
                r"must be a tile with block_m, block_n, .*lean; got Tile\(block_l=64, block_c=64, ",
            ),
            ((64, 64), r"must be a tile with .*; got \(64, 64\)"),
        ):
            with _tuned.use({KEY: config}), pytest.raises((TypeError, ValueError), match=message):
                chosen()

    def test_too_narrow_for_a_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Silently wrong before: half of a row was normalised."""
        arch = _common.device_facts(torch.device(DEVICE))[0]
        entry = {"function": "norm_fwd_config", "arguments": [arch, 32], "config": {"block_c": 16}}
        monkeypatch.setenv(_tuned.VARIABLE, str(write(tmp_path / "t.json", entry)))
        _tuned.from_environment.cache_clear()
        x = torch.randn(1, 8, 32, device=DEVICE)
        with pytest.raises(ValueError, match=r"t.json entry 1: norm.*at least 32; got 16"):
            add_layer_norm(x, x, x[0, 0], x[0, 1], backend="triton")
        _tuned.from_environment.cache_clear()

    def test_a_file_may_name_what_asks_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = {"function": "query_hub_dx_config", "arguments": [90, 2, 64]}
        path = write(tmp_path / "t.json", entry | {"config": {"block_l": 8}})
        monkeypatch.setenv(_tuned.VARIABLE, str(path))
        _tuned.from_environment.cache_clear()
        assert query_hub.query_hub_dx_config(90, 2, 64).block_l == 8
        _tuned.from_environment.cache_clear()

    def test_the_kernel_is_launched_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from equiseg_fast.kernels import guided_gate as kernels

        launched: list[int] = []
        launch: Callable[..., None] = kernels.launch
        monkeypatch.setattr(
            kernels, "launch", lambda *a, **k: (launched.append(k["BLOCK_L"]), launch(*a, **k))
        )
        inputs = gate_problem()
        expected = guided_gate(**inputs, backend="triton")
        arch = 0 if DEVICE == "cpu" else None
        if arch is None:
            pytest.skip("the arguments on a GPU depend on the GPU")
        key = ("guided_gate_fwd_config", (arch, 4, 2, 32))
        with _tuned.use({key: replace(_tuned.default(key), block_l=16)}):
            actual = guided_gate(**inputs, backend="triton")
        assert launched == [64, 16]
        torch.testing.assert_close(actual, expected)


def test_neighbours_are_one_step_away() -> None:
    """What no kernel can have is refused later, as it is in a file."""
    found = tune.neighbours(Tile(block_m=16, block_n=1, num_warps=16, lean=True))
    assert list(found) == [
        "block_m=32", "block_m=8", "block_n=2", "block_n=0", "num_warps=32", "num_warps=8",
        "num_stages=2", "num_stages=0",
    ]  # fmt: skip
    assert found["block_m=8"] == Tile(block_m=8, block_n=1, num_warps=16, lean=True)


needs_interpreter = pytest.mark.skipif(
    DEVICE == "cuda", reason="a GPU searches with real times; this rehearses in the interpreter"
)


@needs_interpreter
class TestSearch:
    def run(self, out: Path, *more: str, op: str = "guided_gate", status: int = 0) -> list[dict]:
        """The entries of the file."""
        command = ["tune", "--device", "cpu", "--op", op, "--out", str(out), *more]
        assert benchmark_main(command) == status
        return json.loads((out / "tuned.json").read_text())["configs"]

    def times(self, monkeypatch: pytest.MonkeyPatch, **faster: Timing) -> list[list[str]]:
        """Let trials be right and take a microsecond, but for some. Returns what had been decided
        at each."""
        decided: list[list[str]] = []

        def time(self: tune.Search, trials: dict[str, dict]) -> dict[str, Timing]:
            decided.append([function for function, _ in trials["default"]])
            return {n: faster.get(n.replace("=", "_"), ANY) for n in trials}

        monkeypatch.setattr(tune.Search, "time", time)
        monkeypatch.setattr(tune.Search, "refusal", lambda self, trial: "")
        return decided

    def test_the_fastest_correct_candidate_wins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        half, less = (replace(ANY, p20_us=t, p50_us=t, p80_us=t) for t in (0.5, 0.9))
        decided = self.times(monkeypatch, block_l_32=half, num_warps_8=less)
        # Twice the same: what is decided is not searched again.
        found = self.run(tmp_path, op="guided_gate,guided_gate")
        assert decided == [[], ["guided_gate_fwd_config"]]
        names = ["guided_gate_fwd_config", "guided_gate_bwd_config"]
        assert [(e["function"], e["config"]) for e in found] == [
            (n, {"block_l": 32}) for n in names
        ]
        assert (found[0]["us"]["default"], found[0]["us"]["block_l=32"]) == (1.0, 0.5)
        tuned = _tuned.read(tmp_path / "tuned.json")
        assert {name: config.block_l for (name, _), config in tuned.items()} == dict.fromkeys(
            names, 32
        )
        # Nor is it by the next process.
        assert self.run(tmp_path) == found
        assert len(decided) == 2

    @pytest.mark.parametrize(
        "faster",
        [replace(ANY, p20_us=0.97, p50_us=0.99, p80_us=0.99), replace(ANY, p20_us=0.5, p50_us=0.9)],
        ids=["less than 2 percent", "bands overlap"],
    )
    def test_noise_does_not_win(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: Timing
    ) -> None:
        self.times(monkeypatch, block_l_32=faster)
        found = self.run(tmp_path)
        assert [e["config"] for e in found] == [{}, {}]
        for key, config in _tuned.read(tmp_path / "tuned.json").items():
            assert config == _tuned.default(key)

    def test_wrong_candidates_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block that no longer holds whole rows makes another LayerNorm."""
        refusal, neighbours = tune.Search.refusal, tune.neighbours
        self.times(monkeypatch)
        monkeypatch.setattr(tune.Search, "refusal", refusal)
        few = ("block_c=16", "num_stages=0", "num_stages=2")
        monkeypatch.setattr(
            tune, "neighbours", lambda c: {n: x for n, x in neighbours(c).items() if n in few}
        )
        forward = self.run(tmp_path, op="add_layer_norm")[0]
        assert forward["function"] == "norm_fwd_config"
        assert list(forward["refused"]) == ["block_c=16", "num_stages=0"]
        assert "block_c must be at least 32" in forward["refused"]["block_c=16"]
        assert list(forward["us"]) == ["default", "num_stages=2"]

    def test_what_computes_something_else_is_refused(self) -> None:
        problem = operations()["guided_gate"].build(
            Shape("b0", 1, 64, 64, 1, 2), torch.float32, torch.device("cpu"), 0
        )
        problem.calls["triton"] = lambda: tuple(1.01 * x for x in problem.calls["torch"]())
        assert tune.Search(problem, {}).refusal({}).startswith("AssertionError")

    def test_really_measures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            tune, "neighbours", lambda config: {"num_warps=8": replace(config, num_warps=8)}
        )
        times = [t for entry in self.run(tmp_path) for t in entry["us"].values()]
        assert len(times) == len(set(times)) == 4
        assert min(times) > 100

    def test_goes_on_behind_an_error_of_the_device(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It ends the process; the next one skips what caused it."""
        self.times(monkeypatch)

        def breaks(self: tune.Search, trial: dict) -> str:
            broken = next(reversed(trial))[0] == "guided_gate_fwd_config"
            return "AcceleratorError: CUDA error: misaligned address" if broken else ""

        with monkeypatch.context() as patch:
            patch.setattr(tune.Search, "refusal", breaks)
            (entry,) = self.run(tmp_path, status=75)
        assert "misaligned" in entry["broken"]
        first, second = self.run(tmp_path)
        assert first == entry
        assert (second["function"], "broken" in second) == ("guided_gate_bwd_config", False)

    def test_of_another_source_is_not_overwritten(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path / "tuned.json", ENTRY)
        before = path.read_text()
        with pytest.raises(SystemExit):
            self.run(tmp_path)
        assert "tuned.json of an earlier run or of another source" in capsys.readouterr().err
        assert path.read_text() == before

    def test_nothing_is_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["tune", "--device", "cpu", "--out", str(tmp_path)]
        assert benchmark_main([*command, "--minutes", "0"]) == 0
        assert "0 choices searched" in capsys.readouterr().out
        assert benchmark_main([*command, "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "attention b0 s1 64x64 B1 M2 fp32"
        assert lines[-1] == f"{len(tune.HOTTEST)} cases; nothing was run"
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(SystemExit):
            benchmark_main([*command, "--op", "model"])
        assert "--op must be among attention, " in capsys.readouterr().err


class TestProvider:
    """`tuned` beside `triton` in a benchmark; pretend that a CPU is a GPU for kernels."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        entries = [
            {"function": "guided_gate_fwd_config", "arguments": [0, 4, 2, 64]},
            {"function": "guided_gate_bwd_config", "arguments": [0, 2, 64]},
        ]
        path = write(tmp_path / "t.json", *({**e, "config": {"block_l": 16}} for e in entries))
        monkeypatch.setenv("EQUISEG_FAST_TUNED", str(path))
        _tuned.from_environment.cache_clear()
        yield path
        _tuned.from_environment.cache_clear()

    @needs_interpreter
    def test_forward_and_backward_use_the_file_and_triton_does_not(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from benchmarks.measure.plan import Case, Options
        from benchmarks.measure.runner import Runner
        from benchmarks.providers import provider as providers
        from equiseg_fast.kernels import guided_gate as kernels

        found = {n: replace(p, gpu_only="") for n, p in providers.PROVIDERS.items()}
        monkeypatch.setattr(providers, "PROVIDERS", found)
        launched: list[tuple[str, int]] = []
        launch: Callable[..., None] = kernels.launch

        def record(kernel: Any, *args: Any, **options: Any) -> None:
            if "BLOCK_L" in options:
                launched.append((kernel.__name__, options["BLOCK_L"]))
            launch(kernel, *args, **options)

        monkeypatch.setattr(kernels, "launch", record)
        shape = Shape("b0", 2, 64, 64, 1, 2)
        for provider, block_l in (("tuned", 16), ("triton", 64)):
            launched.clear()
            case = Case(operations()["guided_gate"], shape, "fp32", ("step",), (provider,))
            (row,) = Runner(Options()).run(case)
            assert (row.status, row.reason) == ("ok", "")
            kernels_of = {"_guided_gate_fwd_kernel", "_guided_gate_bwd_kernel"}
            assert {name for name, _ in launched} == kernels_of
            assert {b for _, b in launched} == {block_l}

    def test_needs_a_file(self) -> None:
        from benchmarks.providers.provider import impossible

        assert impossible("tuned", torch.device("cuda")).startswith("no file is named, neither")

    def test_the_record_of_the_environment_has_its_hash(self, file: Path) -> None:
        from benchmarks.measure.record import environment

        with_file = environment(torch.device("cpu"))
        assert len(with_file["tuned"]) == 12
        file.write_text(file.read_text() + "\n")
        assert environment(torch.device("cpu"))["tuned"] != with_file["tuned"]

    def test_a_bad_file_is_refused_before_anything_runs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path / "t.json", {**ENTRY, "function": "f"})
        with pytest.raises(SystemExit, match="2"):
            benchmark_main(["run", "--dry-run", "--tuned", str(path)])
        assert "t.json entry 1: function must be one of" in capsys.readouterr().err

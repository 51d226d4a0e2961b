"""A run that ends in the middle: what it knows is kept, and another process goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import operations
from benchmarks.cases.common.cost import Limits
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.machines import calibrate
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options
from benchmarks.measure.record import DIED, UNTIMED, Record, Writer, read
from benchmarks.measure.resume import AGAIN, Again
from benchmarks.measure.runner import Runner

LIMITS = Limits(1e9, {"fp32": 1e9}, 1e9)

measure_cpu = timing.measure_cpu
ROOT = Path(__file__).resolve().parents[1]
CASE = Case(
    operations()["add_layer_norm"], Shape("b0", 2, 64, 64, 1, 2), "fp32", ("fwd", "step"),
    ("baseline", "torch"),
)  # fmt: skip
RUN = (
    "run", "--at", "stage=4,height=64,width=96,modalities=2", "--device", "cpu", "--threads", "1",
    "--op", "add_layer_norm,guided_gate", "--provider", "baseline,torch",
)  # fmt: skip


def spoiled(op: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider torch of an operation becomes this."""
    right = operations()[op]

    def build(*arguments: Any) -> Problem:
        problem = right.build(*arguments)
        problem.calls["torch"] = call
        return problem

    monkeypatch.setitem(operations(), op, replace(right, build=build))


def device_error() -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be measured."""
    monkeypatch.setattr(calibrate, "device_limits", lambda *_: LIMITS)


def test_an_error_of_the_device_ends_the_process_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path), "--resume", "--no-report")
    with monkeypatch.context() as broken:
        spoiled("guided_gate", device_error, broken)
        assert main([*RUN, *out]) == AGAIN
    rows = {(r.op, r.provider, r.mode): r for r in read(tmp_path)}
    assert {op for op, _, _ in rows} == {"add_layer_norm", "guided_gate"}
    assert rows["guided_gate", "torch", "fwd"].status == "error"
    assert "illegal memory access" in rows["guided_gate", "torch", "fwd"].reason
    untimed = rows["guided_gate", "baseline", "fwd"]
    assert (untimed.status, untimed.reason, untimed.p50_us) == ("ok", UNTIMED, None)
    assert untimed.peak_mib > 0
    before = rows["add_layer_norm", "torch", "fwd"]
    assert before.p50_us > 0

    assert main([*RUN, *out]) == 0
    rows = {(r.op, r.provider, r.mode): r for r in read(tmp_path)}
    assert all(row.final for row in rows.values())
    assert rows["guided_gate", "torch", "fwd"].status == "error"  # it is not asked again
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    assert rows["guided_gate", "baseline", "fwd"].p50_us > 0
    assert rows["add_layer_norm", "torch", "fwd"] == before
    assert not (tmp_path / "report.md").exists()
    # Without --resume it would be lost.
    with pytest.raises(SystemExit):
        main([*RUN, "--out", str(tmp_path), "--no-report"])
    assert read(tmp_path) == list(rows.values())


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    """Of a writer that was killed, or has not finished."""
    row = Record("core", "add_layer_norm", asdict(CASE.shape), "fwd", "torch", "fp32", p50_us=2.0)
    Writer(tmp_path).add([row])
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert read(tmp_path) == [row]
    other = replace(row, provider="baseline")
    Writer(tmp_path, resume=True).add([other])
    assert read(tmp_path) == [row, other]
    path.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(ValueError, match="line 1: Invalid control character"):
        read(tmp_path)


DIES = """
import signal, sys, time
from pathlib import Path
from benchmarks.cases.common.cost import Limits
from benchmarks.cases import operations
from benchmarks.machines import calibrate
from dataclasses import replace
calibrate.device_limits = lambda *_: Limits(1e9, {"fp32": 1e9}, 1e9)
right = operations()["guided_gate"]
def hang():
    assert signal.alarm(1) > 50  # the rest of its patience need not be waited for
    time.sleep(60)
def build(*arguments):
    problem = right.build(*arguments)
    problem.calls["torch"] = hang
    return problem
operations()["guided_gate"] = replace(right, build=build)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_what_hangs_is_not_tried_a_second_time(tmp_path: Path) -> None:
    arguments = (
        *RUN, "--op", "guided_gate", "--out", str(tmp_path), "--resume", "--no-report",
        "--patience", "60",
    )  # fmt: skip
    command = (sys.executable, "-c", DIES, *arguments)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGALRM
    assert main(arguments) == 0
    rows = {(r.provider, r.mode): r for r in read(tmp_path)}
    assert (rows["torch", "step"].status, rows["torch", "step"].reason) == ("error", DIED)
    assert rows["baseline", "step"].p50_us > 0


def test_only_what_remains_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        timing, "measure_cpu", lambda calls, **_: asked.extend(calls) or measure_cpu(calls, **_)
    )
    first = Runner(Options(), writer=Writer(tmp_path)).run(CASE)
    assert all(row.final for row in first)
    assert asked == 2 * ["baseline", "torch"]
    Writer(tmp_path, resume=True).add([replace(first[-1], p50_us=None, reason=UNTIMED)])
    again = Runner(Options(), writer=Writer(tmp_path, resume=True)).run(CASE)
    assert asked[4:] == ["torch"]
    assert again[:-1] == first[:-1]
    assert again[-1].final


def test_resume_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*RUN, "--resume"])
    assert "--resume needs --out" in capsys.readouterr().err


# ---- graphs, with stand-ins for what only a GPU has ---------------------------------------------


class Gpu:
    """A device on which captures of some providers fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Sequence[str] = ()) -> None:
        self.captures: list[int] = []
        self.failing: dict[int, str] = {}
        self.fails = fails
        monkeypatch.setattr(timing, "captured", self.captured)
        monkeypatch.setattr(timing, "measure_gpu", self.measure)
        monkeypatch.setattr(timing, "host_us", lambda call: 7.0)
        monkeypatch.setattr(timing, "input_sets", lambda *_: 1)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def measure(self, units: Mapping[str, Any], method: str, **_: Any) -> dict[str, timing.Timing]:
        us = {"graph": 1.0, "events": 2.0}[method]
        return {name: timing.Timing(us, us, us, us, 9, method) for name in units}

    def captured(self, sets: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
        self.captures.append(len(sets))
        if len(self.captures) in self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return sets[0], 8


def timed(case: Case, writer: Writer | None = None) -> list[Record]:
    """The case checked on the CPU, then timed as if on a GPU."""
    runner = Runner(Options(), writer=writer)
    prepared = runner.prepare(case)
    for provider in case.providers:
        prepared.check(provider)
    runner.device = torch.device("cuda")
    for mode in case.modes:
        prepared.time(mode)
    return list(prepared.rows.values())


def test_single_operations_are_timed_by_graph_and_networks_by_events_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpu(monkeypatch)
    for row in timed(CASE):
        assert (row.method, row.p50_us, row.graph_us, row.events_us) == ("graph", 1.0, 1.0, None)
        assert row.host_us == 7.0
    whole = Case(operations()["block"], CASE.shape, "fp32", ("fwd",), CASE.providers)
    for row in timed(whole):
        assert (row.method, row.p50_us, row.graph_us, row.events_us) == ("graph", 1.0, 1.0, 2.0)


def test_who_cannot_be_captured_sends_all_to_events_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others keep the time of their graph beside it."""
    Gpu(monkeypatch)
    case = replace(CASE, op=operations()["class_prototypes"])
    rows = {(r.provider, r.mode): r for r in timed(case)}
    waits, ours = rows["baseline", "fwd"], rows["torch", "fwd"]
    assert (waits.method, waits.graph_us, waits.events_us) == ("events", None, 2.0)
    assert waits.uncaptured == "it waits for the device"
    assert (ours.method, ours.p50_us, ours.graph_us, ours.uncaptured) == ("events", 2.0, 1.0, "")
    # So they are when who cannot be captured is not among them, but in another run.
    alone = timed(replace(case, providers=("torch",)))[0]
    assert (alone.method, alone.p50_us, alone.graph_us) == ("events", 2.0, 1.0)


def test_a_fault_while_timing_is_blamed_on_who_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all modes, and not on those who come after it in a process that is broken."""
    Gpu(monkeypatch)
    runner = Runner(Options())
    prepared = runner.prepare(CASE)
    for provider in CASE.providers:
        prepared.check(provider)
    runner.device = torch.device("cuda")
    prepared.problem.calls["torch"] = device_error
    with pytest.raises(Again, match="illegal memory access"):
        prepared.time("fwd")
    assert {row.status for row in prepared.rows.values() if row.provider == "torch"} == {"error"}
    baseline = prepared.rows["baseline", "fwd"]
    assert (baseline.status, baseline.reason, baseline.final) == ("ok", UNTIMED, False)


def test_a_broken_capture_says_what_broke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending it fails, too, with less to say."""

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        timing.captured([waits])
    with pytest.raises(RuntimeError, match="previous error during capture"):
        timing.captured([lambda: None])


def test_a_training_step_of_ours_can_be_captured() -> None:
    case = Case(operations()["training"], Shape("b0", 0, 32, 64, 1, 2), "fp32", (), ())
    problem = case.op.build(case.shape, torch.float32, torch.device("cpu"), 0)
    assert not problem.synchronising & {"torch", "triton", "reference"}


def test_a_failed_capture_is_on_record_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, fails=(2,))
    with pytest.raises(Again, match="torch fwd: no graph: RuntimeError: CUDA error: operation not"):
        timed(CASE, Writer(tmp_path))
    assert len(gpu.captures) == 2
    # Another process knows, tries it no more, and changes the method of that mode alone.
    rows = {(r.provider, r.mode): r for r in timed(CASE, Writer(tmp_path, resume=True))}
    assert rows["torch", "fwd"].method == rows["baseline", "fwd"].method == "events"
    assert "not permitted" in rows["torch", "fwd"].uncaptured
    assert rows["baseline", "fwd"].graph_us == 1.0
    assert rows["torch", "step"].method == rows["baseline", "step"].method == "graph"
    assert len(gpu.captures) == 5


class Stream:
    """What `torch.cuda` is asked for while times are taken: the order of everything enqueued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                stream.seen.append("event")

            def synchronize(self) -> None:
                stream.seen.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 0.016

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.seen.append("busy"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(timing, "_settle", lambda device: self.seen.append("settle"))
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: self)

    def zero_(self) -> None:
        self.seen.append("flush")


def test_replays_start_on_a_busy_stream_and_flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    graphs = {name: [(lambda: stream.seen.append("replay"), 8)] for name in "ab"}
    times = timing.measure_gpu(graphs, "graph", seconds=0.0, rounds=(2, 2))
    one = ["busy", "event", "replay", "event", "wait"]
    assert stream.seen == ["settle", *4 * one]
    assert (times["a"].p50_us, times["a"].n, times["a"].method) == (2.0, 2, "graph")


def test_single_calls_start_on_a_busy_stream_with_nothing_in_l2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(monkeypatch)
    calls = {"a": [(lambda i=i: stream.seen.append(f"set {i}"), 1) for i in range(2)]}
    times = timing.measure_gpu(calls, "events", seconds=0.0, rounds=(2, 2))
    assert stream.seen == [
        "settle",
        *("flush", "busy", "event", "set 0", "event", "wait"),
        *("flush", "busy", "event", "set 1", "event", "wait"),
    ]
    assert times["a"].p50_us == pytest.approx(16.0)

"""A run that ends in the middle: what it knows is kept, and another process goes on."""

from __future__ import annotations

import importlib
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
from benchmarks.cases.common.problem import Problem, Shape
from benchmarks.measure import timing
from benchmarks.measure.plan import Case, Options, remaining
from benchmarks.measure.record import UNTIMED, Record, Writer, read_jsonl
from benchmarks.measure.resume import AGAIN, Again, Journal
from benchmarks.measure.runner import Runner

runner_module = importlib.import_module("benchmarks.measure.runner")

ROOT = Path(__file__).resolve().parents[1]
CASE = Case(
    operations()["add_layer_norm"], Shape("b0", 2, 64, 64, 1, 2), "fp32", ("fwd", "step"),
    ("baseline", "torch"),
)  # fmt: skip
RUN = (
    "run", "--suite", "rehearsal", "--device", "cpu", "--threads", "1",
    "--op", "add_layer_norm,guided_gate", "--provider", "baseline,torch",
)  # fmt: skip
Spoil = Callable[[Callable[[], Any]], Callable[[], Any]]


def spoiled(op: str, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider torch of an operation becomes what `spoil` makes of it."""
    right = operations()[op]

    def build(*arguments: Any) -> Problem:
        problem = right.build(*arguments)
        problem.calls["torch"] = spoil(problem.calls["torch"])
        return problem

    monkeypatch.setitem(operations(), op, replace(right, build=build))


def device_error(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return run


def test_an_error_of_the_device_ends_the_process_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path), "--resume", "--no-report")
    with monkeypatch.context() as broken:
        spoiled("guided_gate", device_error, broken)
        assert main([*RUN, *out]) == AGAIN
    rows = {(r.op, r.provider, r.mode): r for r in read_jsonl(tmp_path)}
    assert {op for op, _, _ in rows} == {"add_layer_norm", "guided_gate"}
    assert rows["guided_gate", "torch", "fwd"].status == "error"
    assert "illegal memory access" in rows["guided_gate", "torch", "fwd"].reason
    untimed = rows["guided_gate", "baseline", "fwd"]
    assert (untimed.status, untimed.reason, untimed.p50_us) == ("ok", UNTIMED, None)
    assert untimed.peak_mib > 0
    before = rows["add_layer_norm", "torch", "fwd"]
    assert before.p50_us > 0

    assert main([*RUN, *out]) == 0
    rows = {(r.op, r.provider, r.mode): r for r in read_jsonl(tmp_path)}
    assert all(row.final for row in rows.values())
    assert rows["guided_gate", "torch", "fwd"].status == "error"  # it is not asked again
    assert rows["guided_gate", "baseline", "fwd"].p50_us > 0
    assert rows["add_layer_norm", "torch", "fwd"] == before
    assert not (tmp_path / "journal.jsonl").exists()
    assert not (tmp_path / "report.md").exists()
    # Without --resume it would be lost.
    with pytest.raises(SystemExit):
        main([*RUN, "--out", str(tmp_path), "--no-report"])
    assert read_jsonl(tmp_path) == list(rows.values())


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
from dataclasses import asdict, replace
from benchmarks.cases import operations
right = operations()["guided_gate"]
def build(*arguments):
    problem = right.build(*arguments)
    problem.calls["torch"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return problem
operations()["guided_gate"] = replace(right, build=build)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    """Of a writer that was killed, or has not finished."""
    row = Record("core", "add_layer_norm", asdict(CASE.shape), "fwd", "torch", "fp32", p50_us=2.0)
    Writer(tmp_path).add([row])
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert read_jsonl(tmp_path) == [row]
    other = replace(row, provider="baseline")
    Writer(tmp_path, resume=True).add([other])
    assert read_jsonl(tmp_path) == [row, other]
    path.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_jsonl(tmp_path)


def test_an_error_of_one_case_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Runner.run

    def run(self: Runner, case: Case, *others: Any) -> list[Record]:
        if case.op.name == "add_layer_norm":
            raise KeyError("a mistake of the harness")
        return right(self, case, *others)

    monkeypatch.setattr(Runner, "run", run)
    assert main([*RUN, "--out", str(tmp_path), "--no-report"]) == 1
    assert {row.op for row in read_jsonl(tmp_path)} == {"guided_gate"}
    shown = capsys.readouterr()
    assert "ended by an error of their own: add_layer_norm" in shown.out
    assert "a mistake of the harness" in shown.err


def test_patience(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from benchmarks.measure.resume import Journal\n"
        "with Journal(Path(sys.argv[1]), True, patience=1).attempt('case', 'hangs'): time.sleep(60)"
    )
    command = (sys.executable, "-c", code, str(tmp_path))
    ended = [subprocess.run(command, cwd=ROOT).returncode for _ in range(2)]
    assert ended == [-signal.SIGALRM, -signal.SIGALRM]
    assert Journal(tmp_path, resume=True).refused("case", "hangs")


def test_what_kills_its_process_twice_is_not_tried_a_third_time(tmp_path: Path) -> None:
    limits = tmp_path / "limits.json"  # which need not be measured three times
    limits.write_text('{"limits": {"bandwidth": 1e9, "peak": {"fp32": 1e9}, "exps": 1e9}}')
    arguments = (
        *RUN, "--op", "guided_gate", "--out", str(tmp_path), "--resume", "--no-report",
        "--calibration", str(limits),
    )  # fmt: skip
    command = (sys.executable, "-c", DIES.format(root=str(ROOT)), *arguments)
    ended = [subprocess.run(command, cwd=ROOT, capture_output=True).returncode for _ in range(3)]
    assert ended == [-signal.SIGKILL, -signal.SIGKILL, 0]
    rows = {(r.provider, r.mode): r for r in read_jsonl(tmp_path)}
    assert rows["torch", "step"].status == "error"
    assert rows["torch", "step"].reason == "RuntimeError: the process ended twice while it ran"
    assert rows["baseline", "step"].p50_us > 0


def test_records_come_provider_by_provider() -> None:
    seen: list[list[tuple[str, str, bool]]] = []
    Runner(Options()).run(
        CASE, emit=lambda rows: seen.append([(r.provider, r.mode, r.final) for r in rows])
    )
    assert seen == [
        [("baseline", "fwd", False), ("baseline", "step", False)],
        [("torch", "fwd", False), ("torch", "step", False)],
        [("baseline", "fwd", True), ("torch", "fwd", True)],
        [("baseline", "step", True), ("torch", "step", True)],
    ]


def test_what_remains(tmp_path: Path) -> None:
    rows = Runner(Options()).run(CASE)
    assert remaining([CASE], rows) == []
    rows[-1] = replace(rows[-1], p50_us=None, reason=UNTIMED)
    (left,) = remaining([CASE], rows)
    assert (left.modes, left.providers) == (("step",), (rows[-1].provider,))
    rows[-1] = replace(rows[-1], status="oom")
    assert remaining([CASE], rows) == []
    assert remaining([CASE], []) == [CASE]


def test_resume_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*RUN, "--resume"])
    assert "--resume needs --out" in capsys.readouterr().err


def test_largest_first(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "run",
        "--suite",
        "core",
        "--op",
        "attention,add_layer_norm",
        "--dry-run",
        "--largest-first",
    ]
    assert main([*command, "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "b2 s1" in lines[0]
    assert "b0 s4 512x512" in [line for line in lines if ": fwd, step:" in line][-1]


# ---- graphs, with stand-ins for what only a GPU has ---------------------------------------------


class Gpu:
    """A device on which captures of some providers fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Sequence[str] = ()) -> None:
        self.captures: list[int] = []
        self.failing: dict[int, str] = {}
        self.fails = fails
        monkeypatch.setattr(timing, "captured", self.captured)
        monkeypatch.setattr(timing, "measure_graphs", self.times("graph", 1.0))
        monkeypatch.setattr(timing, "measure_events", self.times("events", 2.0))
        monkeypatch.setattr(timing, "host_us", lambda call: 7.0)
        monkeypatch.setattr(timing, "input_sets", lambda *_: 1)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def times(self, method: str, us: float) -> Callable[..., dict[str, timing.Timing]]:
        def measure(calls: Mapping[str, Any], **_: Any) -> dict[str, timing.Timing]:
            return {name: timing.Timing(us, us, us, us, 9, method) for name in calls}

        return measure

    def captured(self, sets: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
        self.captures.append(len(sets))
        if len(self.captures) in self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return sets[0], 8


def timed(case: Case, journal: Journal | None, emit: Any = lambda rows: None) -> list[Record]:
    """The case checked on the CPU, then timed as if on a GPU."""
    runner = Runner(Options(), journal=journal)
    prepared = runner.prepare(case)
    for provider in case.providers:
        prepared.check(provider)
    runner.device = torch.device("cuda")
    for mode in case.modes:
        prepared.time(mode)
    return prepared.records()


def test_single_operations_are_timed_by_graph_and_networks_by_events_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpu(monkeypatch)
    for row in timed(CASE, None):
        assert (row.method, row.p50_us, row.graph_us, row.events_us) == ("graph", 1.0, 1.0, None)
        assert row.host_us == 7.0
    whole = Case(operations()["block"], CASE.shape, "fp32", ("fwd",), CASE.providers)
    for row in timed(whole, None):
        assert (row.method, row.p50_us, row.graph_us, row.events_us) == ("graph", 1.0, 1.0, 2.0)


def test_who_cannot_be_captured_sends_all_to_events_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others keep the time of their graph beside it."""
    Gpu(monkeypatch)
    case = replace(CASE, op=operations()["class_prototypes"])
    rows = {(r.provider, r.mode): r for r in timed(case, None)}
    waits, ours = rows["baseline", "fwd"], rows["torch", "fwd"]
    assert (waits.method, waits.graph_us, waits.events_us) == ("events", None, 2.0)
    assert waits.uncaptured == "it waits for the device"
    assert (ours.method, ours.p50_us, ours.graph_us, ours.uncaptured) == ("events", 2.0, 1.0, "")


FAULT = "Triton Error [CUDA]: an illegal memory access was encountered"


def test_a_fault_while_timing_is_blamed_on_who_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on those who come after it in a process that is broken; without a journal it is an error
    of the provider, and the others go on."""
    gpu = Gpu(monkeypatch)
    known = timing.call_in_mode

    def call_in_mode(forward: Any, *others: Any) -> Any:
        call = known(forward, *others)
        if faulty.get("now"):
            raise RuntimeError(FAULT)
        return call

    faulty: dict[str, bool] = {}
    right = runner_module.configured

    @contextmanager
    def configured(provider: str) -> Iterator[None]:
        faulty["now"] = provider == "torch" and faulty.get("timing", False)
        with right(provider):
            yield

    monkeypatch.setattr(runner_module, "configured", configured)
    monkeypatch.setattr(timing, "call_in_mode", call_in_mode)
    journal = Journal(tmp_path, resume=False)
    runner = Runner(Options(), journal=journal)
    prepared = runner.prepare(CASE)
    for provider in CASE.providers:
        prepared.check(provider)
    runner.device, faulty["timing"] = torch.device("cuda"), True
    with pytest.raises(Again, match="illegal memory access"):
        prepared.time("fwd")
    rows = {(r.provider, r.mode): r for r in prepared.records()}
    assert rows["torch", "fwd"].status == rows["torch", "step"].status == "error"
    assert (rows["baseline", "fwd"].status, rows["baseline", "fwd"].final) == ("ok", False)
    assert not gpu.captures
    assert not journal.uncaptured

    runner.journal = None
    prepared.time("fwd")
    rows = {(r.provider, r.mode): r for r in prepared.records()}
    assert rows["baseline", "fwd"].p50_us == 1.0


def test_when_nobody_is_left_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    runner = Runner(Options())
    prepared = runner.prepare(CASE)
    runner.device = torch.device("cuda")

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(timing, "call_in_mode", fails)
    prepared.time("fwd")
    assert {r.status for r in prepared.records(mode="fwd")} == {"error"}


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


def test_cotangents_are_drawn_once() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    known: dict[Any, torch.Tensor] = {}
    first = timing.call_in_mode(lambda: (2 * x,), [x], "step", 5, known)()[0]
    (drawn,) = known.values()
    drawn.fill_(3.0)
    again = timing.call_in_mode(lambda: (2 * x,), [x], "step", 5, known)()[0]
    assert not torch.equal(first, again)
    assert torch.equal(again, torch.full_like(x, 6.0))


def test_a_training_step_of_ours_can_be_captured() -> None:
    case = Case(operations()["training"], Shape("b0", 0, 32, 64, 1, 2), "fp32", (), ())
    problem = case.op.build(case.shape, torch.float32, torch.device("cpu"), 0)
    assert not problem.synchronising & {"torch", "triton", "reference"}


def test_a_failed_capture_is_on_record_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, fails=(2,))
    with pytest.raises(Again, match="torch fwd: no graph: RuntimeError: operation not permitted"):
        timed(CASE, Journal(tmp_path, resume=False))
    assert len(gpu.captures) == 2
    # Another process knows, tries it no more, and changes the method of that mode alone.
    rows = {(r.provider, r.mode): r for r in timed(CASE, Journal(tmp_path, resume=True))}
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
    graphs = {name: (lambda: stream.seen.append("replay"), 8) for name in "ab"}
    times = timing.measure_graphs(graphs, seconds=0.0, rounds=(2, 2))
    one = ["busy", "event", "replay", "event", "wait"]
    assert stream.seen == ["settle", *4 * one]
    assert (times["a"].p50_us, times["a"].n, times["a"].method) == (2.0, 2, "graph")


def test_single_calls_start_on_a_busy_stream_with_nothing_in_l2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream(monkeypatch)
    calls = {"a": [lambda i=i: stream.seen.append(f"set {i}") for i in range(2)]}
    times = timing.measure_events(calls, seconds=0.0, rounds=(2, 2))
    assert stream.seen == [
        "settle",
        *("flush", "busy", "event", "set 0", "event", "wait"),
        *("flush", "busy", "event", "set 1", "event", "wait"),
    ]
    assert times["a"].p50_us == pytest.approx(16.0)

"""A run that ends in the middle: what it knows is kept, and another process goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import registry, timing, tune
from benchmarks.__main__ import main
from benchmarks.plan import Case, Options, remaining
from benchmarks.record import UNTIMED, Record, read_jsonl
from benchmarks.registry import Problem, Shape, operations
from benchmarks.resume import AGAIN, Again, Journal
from benchmarks.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
CASE = Case(
    operations()["norm"], Shape("b0", 2, 64, 64, 1, 2), "fp32", ("fwd", "step"),
    ("baseline", "torch"),
)  # fmt: skip
RUN = (
    "run", "--suite", "rehearsal", "--device", "cpu", "--op", "norm,guided_gate", "--threads", "1",
    "--provider", "baseline,torch",
)  # fmt: skip
Spoil = Callable[[Callable[[], Any]], Callable[[], Any]]


def spoiled(op: str, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider torch of an operation becomes what `spoil` makes of it."""
    right = operations()[op]

    def build(*arguments: Any) -> Problem:
        problem = right.build(*arguments)
        problem.calls["torch"] = spoil(problem.calls["torch"])
        return problem

    monkeypatch.setitem(registry.operations(), op, replace(right, build=build))


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
    assert {op for op, _, _ in rows} == {"norm", "guided_gate"}
    assert rows["guided_gate", "torch", "fwd"].status == "error"
    assert "illegal memory access" in rows["guided_gate", "torch", "fwd"].reason
    untimed = rows["guided_gate", "baseline", "fwd"]
    assert (untimed.status, untimed.reason, untimed.p50_us) == ("ok", UNTIMED, None)
    assert untimed.peak_mib > 0
    before = rows["norm", "torch", "fwd"]
    assert before.p50_us > 0

    assert main([*RUN, *out]) == 0
    rows = {(r.op, r.provider, r.mode): r for r in read_jsonl(tmp_path)}
    assert all(row.final for row in rows.values())
    assert rows["guided_gate", "torch", "fwd"].status == "error"  # it is not asked again
    assert rows["guided_gate", "baseline", "fwd"].p50_us > 0
    assert rows["norm", "torch", "fwd"] == before
    assert not (tmp_path / "journal.jsonl").exists()
    assert not (tmp_path / "report.md").exists()
    # Without --resume everything is measured again.
    assert main([*RUN, "--out", str(tmp_path), "--no-report"]) == 0
    assert {row.status for row in read_jsonl(tmp_path)} == {"ok"}


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from benchmarks import registry
right = registry.operations()["guided_gate"]
def build(*arguments):
    problem = right.build(*arguments)
    problem.calls["torch"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return problem
registry.operations()["guided_gate"] = replace(right, build=build)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_what_kills_its_process_twice_is_not_tried_a_third_time(tmp_path: Path) -> None:
    arguments = (*RUN, "--op", "guided_gate", "--out", str(tmp_path), "--resume", "--no-report")
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
    command = ["run", "--suite", "core", "--op", "norm,attention", "--dry-run", "--largest-first"]
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
    case = replace(CASE, op=operations()["prototypes"])
    rows = {(r.provider, r.mode): r for r in timed(case, None)}
    waits, ours = rows["baseline", "fwd"], rows["torch", "fwd"]
    assert (waits.method, waits.graph_us, waits.events_us) == ("events", None, 2.0)
    assert waits.uncaptured == "it waits for the device"
    assert (ours.method, ours.p50_us, ours.graph_us, ours.uncaptured) == ("events", 2.0, 1.0, "")


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


def test_a_failed_capture_does_not_end_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is on record as broken, and the next process goes on behind it."""
    known = tune.Search.time
    failed: list[str] = []

    def time(self: tune.Search, trials: dict, mode: str) -> Any:
        if not failed:
            failed.append(mode)
            raise RuntimeError("operation not permitted when stream is capturing")
        return known(self, trials, mode)

    monkeypatch.setattr(tune.Search, "time", time)
    command = ["tune", "--device", "cpu", "--op", "guided_gate", "--out", str(tmp_path)]
    assert main([*command, "--minutes", "5"]) == AGAIN
    assert main([*command, "--minutes", "5"]) == 0
    entries = tune._earlier(tmp_path / "search.json", tune._made_on(torch.device("cpu"), True))
    assert "not permitted" in entries[0]["broken"]
    assert len(entries) == 2
    assert "broken" not in entries[1]


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

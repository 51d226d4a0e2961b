"""`python -m benchmarks compare`: what counts as a change, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure.record import Record, write_jsonl
from benchmarks.versions.compare import compare

CASE = {"variant": "b0", "stage": 1, "height": 64, "width": 96, "batch": 1, "modalities": 3}
ENV = {"device": "a chip", "torch": "2.11.0", "threads": 2, "tf32": False, "utc": "today"}


def record(p50: float, *, width: float = 0.0, **fields: object) -> Record:
    values = {"suite": "quick", "op": "attention", "case": CASE, "mode": "fwd"}
    row = Record(**(values | {"provider": "torch", "dtype": "fp32"} | fields))
    row.p20_us, row.p50_us, row.p80_us = p50 - width, p50, p50 + width
    row.min_us, row.n, row.method = p50 - width, 5, "wall"
    return row


def broken(row: Record, status: str = "incorrect") -> Record:
    return replace(row, status=status, reason="dx: error", p20_us=None, p50_us=None, p80_us=None)


def results(folder: Path, rows: list[Record], **env: object) -> str:
    folder.mkdir(parents=True)
    write_jsonl(rows, folder / "results.jsonl")
    (folder / "env.json").write_text(json.dumps(ENV | env))
    return str(folder)


@pytest.mark.parametrize(
    ("new", "width", "verdict"),
    [
        (1200.0, 10.0, "slower"),
        (800.0, 10.0, "faster"),
        (1040.0, 1.0, "same"),  # 4 % is below 5 %
        (1200.0, 150.0, "same"),  # the bands overlap
        (800.0, 150.0, "same"),
    ],
)
def test_verdict(new: float, width: float, verdict: str) -> None:
    base = record(1000.0, width=width)
    (change,) = compare([base], [record(new, width=width)], threshold=0.05, atol_us=30.0)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(new / 1000)


def test_the_absolute_threshold_must_be_exceeded_too() -> None:
    pair = [record(100.0)], [record(125.0)]
    assert compare(*pair, threshold=0.05, atol_us=30.0)[0].verdict == "same"
    assert compare(*pair, threshold=0.05, atol_us=20.0)[0].verdict == "slower"


@pytest.mark.parametrize(
    "other",
    [
        {"op": "upsample_cross_entropy"},
        {"case": CASE | {"batch": 2}},
        {"mode": "step"},
        {"provider": "baseline"},
        {"dtype": "bf16"},
    ],
)
def test_joins_on_everything_that_identifies_a_measurement(other: dict[str, object]) -> None:
    thresholds = {"threshold": 0.05, "atol_us": 30.0}
    assert compare([record(100.0)], [record(900.0, **other)], **thresholds) == []
    found = compare([record(800.0, **other), record(100.0)], [record(100.0)], **thresholds)
    assert [change.base.p50_us for change in found] == [100.0]


def test_what_is_lost_comes_first_and_fails() -> None:
    base = [record(1000.0), record(1000.0, mode="step"), record(1000.0, mode="bwd")]
    new = [record(1500.0), broken(base[1]), record(2000.0, mode="bwd")]
    changes = compare(base, new, threshold=0.05, atol_us=30.0)
    found = [(c.verdict, c.ratio) for c in changes]
    assert found == [("lost", math.inf), ("slower", 2), ("slower", 1.5)]
    # What base could not do either is nothing that was lost.
    assert compare([broken(base[0])], [broken(base[0])], threshold=0.05, atol_us=30.0) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record(1000.0, width=5.0), record(500.0, mode="step", width=100.0)]
    slow = [record(1300.0, width=5.0), record(510.0, mode="step", width=100.0)]
    base = results(tmp_path / "base", rows, utc="yesterday", variables={})
    new = results(tmp_path / "new", slow, torch="2.13.0", variables={"A": "1"})
    assert main(["compare", base, new]) == 0
    out = capsys.readouterr().out
    assert "not the same: torch: 2.11.0 -> 2.13.0" in out
    assert "not the same: variables: {} -> {'A': '1'}" in out
    assert "utc" not in out
    assert "+30.0 %" in out
    assert "+2.0 %" in out
    assert "2 bands p20 to p80 of what is the same are wider than 5 %" in out
    assert "2 compared: 1 slower, 1 same" in out.replace(", 0 lost, 0 faster", "")

    assert main(["compare", base, new, "--threshold", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "wider than" not in out
    assert "Busy machine" not in out
    assert main(["compare", base, new, "--fail"]) == 1
    busy = results(tmp_path / "busy", [replace(row, cpu_share=0.5) for row in rows])
    for pair, name in (((base, busy), "new"), ((busy, base), "base")):
        assert main(["compare", *pair]) == 0
        assert f"{name}: Busy machine: during 2 of 2 medians" in capsys.readouterr().out
    gone = results(tmp_path / "gone", [broken(row) for row in rows])
    for pair, status, name in (((base, gone), 1, "new"), ((gone, base), 0, "base")):
        assert main(["compare", *pair, "--fail"]) == status
        said = capsys.readouterr().out
        assert f"{name} has no attention fwd b0 s1 64x96 B1 M3 fp32 torch: incorrect, dx" in said
    assert main(["compare", new, base, "--fail"]) == 0
    assert main(["compare", base, new + "/results.jsonl", "--fail", "--atol-us", "400"]) == 0


@pytest.mark.parametrize(
    ("rows", "env", "message"),
    [
        ([record(1.0)], {"device": "another chip"}, "measured on a chip, new on another chip"),
        (
            [record(1.0, op="upsample_cross_entropy")],
            {},
            "no case, mode, provider and dtype was measured in both",
        ),
    ],
)
def test_refused(
    rows: list[Record],
    env: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = results(tmp_path / "base", [record(1.0)])
    new = results(tmp_path / "new", rows, **env)
    with pytest.raises(SystemExit) as error:
        main(["compare", base, new])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p50_us": float("nan")}, "line 2: p50_us must be finite and not negative; got nan"),
        ({"p50_us": -1000.0}, "line 2: p50_us must be finite and not negative; got -1000"),
        ({"p80_us": float("inf")}, "line 2: p80_us must be finite and not negative; got inf"),
        ({"p80_us": None}, "attention step b0 s1 64x96 B1 M3 fp32 torch: times must be p20_us <="),
        ({"p20_us": 2000.0}, "times must be p20_us <= p50_us <= p80_us"),
    ],
)
def test_what_is_no_time_is_no_success(
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NaN is not larger than anything: it would never be slower."""
    rows = [record(1000.0), record(1000.0, mode="step")]
    base = results(tmp_path / "base", rows)
    new = results(tmp_path / "new", rows)
    lines = [json.dumps(asdict(row)) for row in rows]
    path = tmp_path / "new" / "results.jsonl"
    path.write_text("\n".join((lines[0], json.dumps(asdict(rows[1]) | changes), "")))
    with pytest.raises(SystemExit, match="2"):
        main(["compare", base, new, "--fail"])
    error = capsys.readouterr().err
    assert message in error
    assert new in error


def test_half_a_line_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, new = (results(tmp_path / name, [record(1000.0)]) for name in ("base", "new"))
    path = tmp_path / "new" / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert main(["compare", base, new, "--fail"]) == 0
    assert f"{path} line 2: half a line, left out" in capsys.readouterr().err
    (tmp_path / "new" / "env.json").write_text('{"device":')
    with pytest.raises(SystemExit, match="2"):
        main(["compare", base, new])
    assert f"{tmp_path}/new/env.json: not JSON" in capsys.readouterr().err

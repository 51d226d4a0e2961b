"""The report, its pictures, and the split of the model's time."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.cases.common.problem import Shape
from benchmarks.measure import breakdown
from benchmarks.measure.record import Record, write_jsonl
from benchmarks.providers.provider import PROVIDERS
from benchmarks.reporting import plots, report

CPU = torch.device("cpu")


def record(ms: float, provider: str = "torch", op: str = "attention", **fields: object) -> Record:
    case = {"variant": "b0", "stage": 1, "height": 64, "width": 96, "batch": 1, "modalities": 3}
    case |= fields.pop("case", {})
    row = Record(
        "quick", op, case, fields.pop("mode", "fwd"), provider, fields.pop("dtype", "fp32")
    )
    row.p20_us, row.p50_us, row.p80_us = 980 * ms, 1000 * ms, 1030 * ms
    row.min_us, row.n, row.method = 970 * ms, 5, "wall"
    row.tflops, row.gbps, row.roofline_pct = 0.5 / ms, 20 / ms, 40 / ms
    row.peak_mib, row.budget = 10 * ms, 0.5
    return replace(row, **fields)


def some_records() -> list[Record]:
    wide = {"case": {"height": 128}}
    return [
        record(8, "baseline"),
        record(4, "compile"),
        record(2, "reference"),
        record(1, "torch"),
        record(12, "baseline_cl"),
        record(1, "baseline", "upsample_cross_entropy"),
        record(3, "torch", "upsample_cross_entropy"),
        record(9, "baseline", "upsample_cross_entropy", **wide),
        record(3, "torch", "upsample_cross_entropy", **wide),
        replace(record(1, "triton"), status="oom", reason="out of <memory>", p50_us=None),
    ]


# ---- what the numbers say -----------------------------------------------------------------------


def test_the_strongest_other_is_never_one_of_ours() -> None:
    first, second, third = report.contests(some_records())
    assert (first.ours.provider, first.other.provider) == ("torch", "reference")
    assert first.ratio == 2.0
    assert second.ratio == pytest.approx(1 / 3)
    assert third.ratio == 3.0
    rows = some_records()[:4]
    assert report.ratios(rows[3], rows) == [8.0, 2.0]
    assert report.ratios(rows[2], rows) == [4.0, 0.5]  # somebody else's: against all
    assert report.ratios(rows[1], rows) == [2.0, 0.25]
    assert report.ratios(rows[0], rows) == [None, 0.125]


def test_a_loss_against_the_reference_is_a_loss() -> None:
    rows = [record(2, "torch"), record(1, "reference"), record(3, "baseline")]
    assert report.losses(rows)[0].endswith("torch takes 2.00x the time of reference")
    assert report.contests(rows)[0].ratio == 0.5


def test_overlapping_bands_are_no_clear_win() -> None:
    ours, theirs = record(1.0), record(1.01, "baseline")
    assert not report.contests([ours, theirs])[0].clear
    assert report.contests([ours, record(2.0, "baseline")])[0].clear


def test_the_headline_counts_and_shows_the_first_shapes() -> None:
    headline = report.markdown(some_records(), {}).split("## Where")[0]
    assert "Of 3 comparisons with the strongest other provider ours is faster in 2" in headline
    assert "and slower in 1." in headline
    assert "| attention | b0 s1 64x96 B1 M3 fp32 | 2.00 reference | 1.00 | 2.00x |" in headline
    assert "| upsample_cross_entropy | b0 s1 64x96 B1 M3 fp32 | 1.00 | 3.00 | 0.333x |" in headline
    assert "128x96" not in headline
    alone = report.markdown([record(1.0)], {})
    assert "No case was measured both with ours and with somebody else's." in alone


@pytest.mark.parametrize(
    "flaw", [{"n": 2}, {"p80_us": 90_000.0}, {"cpu_us": 100.0}, {"cpu_share": 0.6}]
)
@pytest.mark.parametrize("whose", [2, 3])
def test_what_is_not_settled_counts_for_nobody(flaw: dict[str, float], whose: int) -> None:
    rows = [
        record(9, "baseline", "add_layer_norm"),
        record(3, "torch", "add_layer_norm"),
        record(8, "baseline"),
        record(2, "torch"),
    ]
    rows[whose] = replace(rows[whose], **flaw)
    headline = report.markdown(rows, {}).split("## Where")[0]
    assert "Of 2 comparisons with the strongest other provider ours is faster in 1" in headline
    assert "4.00x) †" in headline or "4.00x †" in headline
    assert "3.00x |" in headline


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_narrow_terminals_get_fewer_columns_and_whole_numbers(width: int) -> None:
    rows = [
        replace(r, cpu_us=1.9 * r.p50_us, cpu_share=1.0, saved_mib=1234.5)
        for r in some_records()[:5]
    ]
    console = Console(width=width, file=StringIO(), record=True)
    report.show(rows, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "..." not in text
    for ms in ("8.00", "4.00", "2.00", "1.00", "12.0"):
        assert f" {ms} " in text
    words = " ".join(text.split())
    names = list(filter(None, words.partition("not shown at this width: ")[2].split(", ")))
    assert names == list(report.COLUMNS[:3:-1][: len(names)])
    assert all(name in words for name in report.COLUMNS[2:])
    assert len(names) == {40: 9, 200: 0}.get(width, len(names))


def test_every_row_shows_its_distance_to_the_floor() -> None:
    text = report.markdown(some_records()[:5], {}).split("## All")[1].split("## ")[0]
    head, _, *rows = [line[2:-2].split(" | ") for line in text.splitlines() if line[:1] == "|"]
    floor, share = (head.index(name) for name in ("floor ms", "% roofline"))
    assert [row[floor] for row in rows] == ["0.4"] * 5
    assert [row[share] for row in rows] == ["5.00", "10.0", "20.0", "40.0", "3.33"]


def test_columns_without_numbers_are_left_out() -> None:
    rows = [replace(record(1), saved_mib=None, cpu_us=None), record(2, "baseline")]
    columns = report.markdown(rows, {}).split("## All")[1]
    assert "| median ms | vs eager |" in columns
    assert "saved MiB" not in columns
    assert "CPU ms" not in columns


def test_every_row_is_written_with_its_pictures(tmp_path: Path) -> None:
    report.write(some_records(), {"device": "a chip", "env_id": "abc"}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = [line.replace("**", "").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    assert sum(row[1:3] == ["torch", "1.00"] for row in rows) == 1
    assert any("oom" in row for row in rows)
    for name in ("latency", "memory"):
        assert f"![{name}](plots/{name}.png)" in text
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 10_000
    assert str(tmp_path) not in text
    assert '"device": "a chip"' in text


def test_every_provider_has_a_colour_of_its_own() -> None:
    assert len({provider.colour for provider in PROVIDERS.values()}) == len(PROVIDERS)


def test_of_many_cases_the_first_have_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_bars", lambda axis, y, group, field: drawn.append(group))
    rows = [record(i + 1, op=f"op{i % 2}", case={"height": 32 * (i // 2 + 1)}) for i in range(50)]
    plots.draw_times(report.grouped(rows), tmp_path / "latency.png")
    first = rows[: 2 * plots.GROUPS]
    assert drawn == [[row] for row in (*first[::2], *first[1::2])]


# ---- the split of the model's time --------------------------------------------------------------


@pytest.mark.parametrize("provider", ["baseline", "torch"])
def test_the_parts_of_the_model_are_those_that_run(provider: str) -> None:
    shape = Shape("b0", 0, 64, 64, 1, 2)
    found = breakdown.measure(shape, "fp32", CPU, [provider, "compile"])
    assert list(found["providers"]) == [provider]
    parts = found["providers"][provider]
    assert set(parts) == {
        "patch embedding", "self-attention", "Mix-FFN", "query hub", "pooling mixer",
        "cross-attention", "gate", "head", breakdown.REST,
    }  # fmt: skip
    assert all(seconds > 0 for seconds in parts.values())
    assert "64x64" in found["label"]


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (("run", Clockwork, "run"), ("tick", Clockwork, "tick"))
    monkeypatch.setattr(breakdown, "PARTS", parts)
    clock, tick = Clockwork(), Clockwork.tick

    def call() -> None:
        clock.run()  # with what runs inside
        sleep(0.02)
        clock.tick()

    begin = perf_counter()
    spent = breakdown.split(call, CPU)
    assert sum(spent.values()) <= perf_counter() - begin
    assert list(spent) == ["run", "tick", breakdown.REST]
    assert 0.01 <= spent["tick"] < spent["run"]
    assert spent["run"] >= 0.02
    assert spent[breakdown.REST] >= 0.02
    assert Clockwork.tick is tick


class Clockwork:
    def run(self) -> None:
        self.tick()
        self.tick()

    def tick(self) -> None:
        sleep(0.01)


def test_breakdown_of_a_run_is_part_of_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"stage": 0, "height": 64, "width": 64, "modalities": 2}
    rows = [record(2, name, "model", case=case) for name in ("baseline", "torch")]
    write_jsonl(rows, tmp_path / "results.jsonl")
    assert main(["breakdown", str(tmp_path), "--device", "cpu", "--threads", "1"]) == 0
    assert "ms of model fwd b0 64x64 B1 M2 fp32" in capsys.readouterr().out
    report.write(rows, {}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Time of model fwd b0 64x64 B1 M2 fp32 by part" in text
    assert "| ms | baseline | torch |" in text
    assert "| cross-attention | " in text
    write_jsonl([record(1)], tmp_path / "results.jsonl")
    with pytest.raises(SystemExit):
        main(["breakdown", str(tmp_path), "--device", "cpu"])
    assert "must have times of the operation model" in capsys.readouterr().err

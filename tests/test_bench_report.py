"""The report in its two renderings, its pictures, and the split of the model's time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.cases.common.problem import Shape
from benchmarks.measure import breakdown, host
from benchmarks.measure.launches import Row
from benchmarks.measure.record import Record, write_jsonl
from benchmarks.providers.provider import PROVIDERS
from benchmarks.reporting import analysis, document, html, plots, report, terminal
from benchmarks.reporting.document import Card, Cards, Cell, Document, Picture, Section, Table, Text
from benchmarks.reporting.plots import curves, style

CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LIMITS = {"bandwidth": 4e10, "peak": {"fp32": 2e11, "bf16": 5e10}, "exps": 1e9}


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
    first, second, third = analysis.contests(some_records())
    assert (first.ours.provider, first.other.provider) == ("torch", "compile")
    assert (first.ratio, first.eager) == (4.0, 8.0)
    assert second.ratio == pytest.approx(1 / 3)
    assert third.ratio == 3.0
    rows = some_records()[:4]
    assert analysis.ratios(rows[3], rows) == (8.0, 4.0)  # not 2.0, of the reference
    assert analysis.ratios(rows[2], rows) == (4.0, 2.0)
    assert analysis.ratios(rows[1], rows) == (2.0, 0.25)  # somebody else's: against all


def test_a_loss_against_the_reference_is_a_loss() -> None:
    rows = [record(2, "torch"), record(1, "reference"), record(3, "baseline")]
    assert analysis.losses(rows)[0].endswith("torch takes 2.00x the time of reference")
    assert analysis.contests(rows)[0].ratio == 1.5


def test_overlapping_bands_are_no_clear_win() -> None:
    ours, theirs = record(1.0), record(1.01, "baseline")
    assert not analysis.contests([ours, theirs])[0].clear
    assert analysis.contests([ours, record(2.0, "baseline")])[0].clear


def test_the_headline_shows_the_best_and_the_worst() -> None:
    text = document.markdown(report.build(some_records(), {}, []))
    headline = text.split("## Headline")[1].split("## ")[0]
    assert "**4.00x** best against the strongest other: attention fwd" in headline
    assert "**8.00x** best against eager: attention fwd" in headline
    assert "**0.333x** worst against the same: upsample_cross_entropy fwd b0 s1 64x96" in headline
    assert "**2 of 3** cases that ours wins" in headline
    numbers = "2 | 1 | 0.333x | 1.67x | 3.00x | 1.67x |"
    assert f"| upsample_cross_entropy | fwd | fp32 | baseline | {numbers}" in headline
    summary = report.build(some_records(), {}, []).sections[0].blocks[1]
    assert [[cell.text for cell in row if cell.warn] for row in summary.rows] == [[], ["0.333x"]]
    alone = document.markdown(report.build([record(1.0)], {}, []))
    assert "No case was measured both with ours and with somebody else's." in alone


@pytest.mark.parametrize(
    "flaw", [{"n": 2}, {"p80_us": 90_000.0}, {"cpu_us": 100.0}, {"cpu_share": 0.6}]
)
@pytest.mark.parametrize("whose", [3, 4])
def test_what_is_not_settled_is_no_headline(flaw: dict[str, float], whose: int) -> None:
    rows = [record(1, "baseline"), record(2, "torch"), record(9, "baseline", "add_layer_norm")]
    rows += [
        record(8, "baseline", "upsample_cross_entropy"),
        record(2, "torch", "upsample_cross_entropy"),
        record(3, "torch", "add_layer_norm"),
    ]
    rows[whose] = replace(rows[whose], **flaw)
    headline = document.markdown(report.build(rows, {}, [])).split("## Where")[0]
    assert "**3.00x** best against the strongest other: add_layer_norm fwd" in headline
    assert "**1 of 2** cases that ours wins" in headline
    assert "1 of 3 comparisons are left out here: fewer than 3 samples" in headline
    assert "upsample_cross_entropy" not in headline
    alone = [rows[3], rows[4]]
    headline = document.markdown(report.build(alone, {}, [])).split("## Where")[0]
    assert "1 of 1 comparisons are left out" in headline
    assert "best against" not in headline


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 165])
def test_narrow_terminals_get_fewer_columns_and_whole_numbers(width: int) -> None:
    rows = [
        replace(r, cpu_us=1.9 * r.p50_us, cpu_share=1.0, saved_mib=1234.5)
        for r in some_records()[:5]
    ]
    console = Console(width=width, file=StringIO(), record=True)
    terminal.show(rows, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "..." not in text
    for ms in ("8.00", "4.00", "2.00", "1.00", "12.0"):
        assert f" {ms} " in text
    words = " ".join(text.split())
    names = list(filter(None, words.partition("not shown at this width: ")[2].split(", ")))
    assert names == list(terminal.SPARE[: len(names)])
    assert (width == 40) <= (len(names) == len(terminal.SPARE))
    assert (width == 165) == (not names)
    assert all(name in words for name in terminal.SPARE)
    assert ("budget: the largest share" in words) == (not names)


def test_every_row_shows_its_distance_to_the_floor() -> None:
    table = next(
        block
        for section in report.build(some_records(), {}, []).sections
        if section.title == "attention"
        for block in section.blocks
        if isinstance(block, Table)
    )
    floor, share = (table.columns.index(name) for name in ("floor ms", "% roofline"))
    assert [row[floor].text for row in table.rows] == ["0.4"] * 5 + [""]
    assert [row[share].text for row in table.rows] == ["5.00", "10.0", "20.0", "40.0", "3.33", ""]


def test_columns_without_numbers_are_left_out() -> None:
    rows = [replace(record(1), saved_mib=None, cpu_us=None), record(2, "baseline")]
    columns = document.markdown(report.build(rows, {}, [])).split("## attention")[1]
    assert "| n | vs eager |" in columns
    assert "saved MiB" not in columns
    assert "CPU ms" not in columns
    assert "Minimum: bytes: q + k + v + out" in columns


# ---- HTML ---------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Refuses a page with tags that do not match; keeps texts of cells, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"{tag} has an attribute twice"
        self.addresses += [values[name] for name in ("src", "href", "action") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page_of(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text()
    return text, Page(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    env = {"device": "a <chip>", "torch": "2.11", "limits": LIMITS, "env_id": "abc"}
    report.write(some_records(), env, folder)
    return folder


def test_the_page_needs_nothing_from_anywhere(written: Path) -> None:
    text, page = page_of(written)
    inside = [a for a in page.addresses if a.startswith("data:image/")]
    assert len(inside) == 3  # latency, memory, roofline
    anchors = [a[1:] for a in page.addresses if a not in inside]
    assert sorted(anchors) == sorted(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    without_pictures = re.sub(r"data:image/[^\"]*", "", text)
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link|<iframe|src=\"[^\"]", without_pictures
    )
    assert str(written) not in text


def test_both_renderings_have_every_row(written: Path) -> None:
    _, page = page_of(written)
    lines = (written / "report.md").read_text().splitlines()
    rows = [
        [cell.strip().replace("**", "").replace("`", "") for cell in line[1:-1].split("|")]
        for line in lines
        if line.startswith("|") and not line.startswith("|---")
    ]
    assert page.rows == rows
    assert sum(row[3:5] == ["torch", "1.00"] for row in rows) == 1
    assert any("oom" in row for row in rows)


def test_what_is_in_records_cannot_become_markup(written: Path) -> None:
    text, _ = page_of(written)
    assert "<memory>" not in text
    assert "out of &lt;memory&gt;" in text
    assert "a &lt;chip&gt;" in text


def test_blocks_render(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG small")
    blocks = [
        Text("**a** and *b* and `c < d`"),
        Cards([Card("2x", "title", "note", "bad")]),
        Table(("n", "v"), [[Cell("k"), Cell("1", 1.5, best=True)]], names=1),
        Picture("x.png"),
    ]
    built = Document("t", [], [Section("A & b", blocks)])
    assert "| n | v |\n|---|--:|\n| k | **1** |" in document.markdown(built)
    text = html.page(built, tmp_path)
    Page(text)
    assert "<strong>a</strong> and <em>b</em> and <code>c &lt; d</code>" in text
    assert '<div class="card bad"><b>2x</b>' in text
    assert '<td class="name">k</td><td class="best" data-value="1.5">1</td>' in text
    assert '<h2 id="a-b">A &amp; b</h2>' in text
    assert "data:image/png;base64,iVBORyBzbWFsbA==" in text


def test_photographs_are_embedded_smaller(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which matplotlib needs, is missing")
    noise = torch.randint(0, 255, (400, 400, 3), dtype=torch.uint8).numpy()
    path = tmp_path / "photo.png"
    image.fromarray(noise).save(path)
    uri = html.data_uri(path)
    assert path.stat().st_size > html.LARGE
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < path.stat().st_size


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here that could show the page")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page(written: Path, tmp_path: Path, width: int) -> None:
    """The script sorts and no table is wider than the window, which scrolls inside."""
    text, _ = page_of(written)
    probe = """<script>
      const head = [...document.querySelectorAll("#attention ~ .wide th")]
        .find(h => h.textContent === "p20 to p80");
      head.click();
      const cells = [...head.closest("table").tBodies[0].rows].map(
        r => r.cells[head.cellIndex - 1].textContent);
      document.title = [document.documentElement.scrollWidth <= window.innerWidth,
        [...document.images].every(i => i.naturalWidth > 100), cells.join(" ")].join(";");
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", probe + "</body>"))
    picture = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200",
    ]  # fmt: skip
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], **options)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-1000:]
    assert title[1] == "true;true;1.00 2.00 4.00 8.00 12.0 oom"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], **options)
    assert picture.stat().st_size > 20_000


# ---- pictures -----------------------------------------------------------------------------------


def test_every_provider_has_a_colour_of_its_own() -> None:
    assert set(PROVIDERS) <= set(style.COLOURS)
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)


def sweep_records(sizes: tuple[int, ...], op: str = "attention") -> list[Record]:
    return [
        record(size / 64 * factor, provider, op, case={"height": size, "width": size})
        for size in sizes
        for provider, factor in (("baseline", 2), ("torch", 1))
    ]


def test_three_sizes_make_a_line_and_two_do_not() -> None:
    assert curves.sweeps(sweep_records((64, 128))) == []
    (sweep,) = curves.sweeps(sweep_records((64, 128, 256)))
    assert (sweep.variable, sweep.op, len(sweep.records)) == ("tokens", "attention", 6)
    modalities = [record(m, case={"modalities": m}) for m in (1, 2, 3)]
    (sweep,) = curves.sweeps(modalities)
    assert sweep.variable == "modalities"
    sizes = (("b0", 1, 256), ("b0", 2, 512), ("b2", 2, 512))
    channels = [
        record(1, case={"variant": v, "stage": s, "height": n, "width": n}) for v, s, n in sizes
    ]
    (sweep,) = curves.sweeps(channels)
    assert sweep.variable == "channels"


def test_networks_of_other_depth_are_other_lines() -> None:
    models = [("b1", 64), ("b2", 128), ("b3", 256)]
    rows = [record(1, op="model", case={"variant": v, "stage": 0, "height": n}) for v, n in models]
    assert curves.sweeps(rows) == []
    same = [replace(r, case=r.case | {"variant": "b2"}) for r in rows]
    assert len(curves.sweeps(same)) == 1


def test_pictures_of_a_sweep(tmp_path: Path) -> None:
    names = plots.draw(sweep_records((64, 128, 256)), tmp_path, LIMITS)
    assert set(names) == {
        "latency.png", "memory.png", "latency-over-tokens.png", "memory-over-tokens.png",
        "roofline.png",
    }  # fmt: skip
    for name in names:
        assert (tmp_path / name).stat().st_size > 10_000


def test_many_panels_get_pages(tmp_path: Path) -> None:
    from benchmarks.reporting.plots import bars

    rows = [record(i + 1, op=f"op{i % 2}", case={"height": 32 * (i // 2 + 1)}) for i in range(220)]
    pages = bars.pages("latency", rows, "p50_us")
    assert list(pages) == ["latency-op0-1", "latency-op0-2", "latency-op1-1", "latency-op1-2"]
    assert sum(len(groups) for panels in pages.values() for _, groups in panels) == 220


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


def test_watching_a_part_counts_all_of_it_and_stops() -> None:
    class Slow(breakdown.MixFFN):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self) -> None:
            sleep(0.02)

    watch = breakdown.Stopwatch(CPU)
    slow = watch.watched(Slow.forward, lambda _: "part")
    outer = watch.watched(lambda x: (slow(x), sleep(0.01)), lambda _: "outer")
    outer(Slow())
    ((name, begin, end),) = watch.spans
    assert name == "outer"
    assert watch.seconds(begin, end) >= 0.03
    before = breakdown.MixFFN.forward
    with watch.on():
        assert breakdown.MixFFN.forward is not before
    assert breakdown.MixFFN.forward is before


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "WATCHED", ((Clockwork, "tick", lambda _: "tick"),))
    clock = Clockwork()
    begin = perf_counter()
    parts = breakdown.split(clock.run, CPU)
    assert sum(parts.values()) <= perf_counter() - begin
    assert set(parts) == {"tick", breakdown.REST}
    assert parts["tick"] >= 0.03
    assert parts[breakdown.REST] >= 0.02


class Clockwork:
    def run(self) -> None:
        self.tick(0.01)
        sleep(0.02)
        self.tick(0.02)

    def tick(self, seconds: float) -> None:
        sleep(seconds)


def test_breakdown_is_part_of_the_report(tmp_path: Path) -> None:
    parts = {"self-attention": 0.2, "Mix-FFN": 0.1, breakdown.REST: 0.05}
    found = {"label": "model fwd", "providers": {"baseline": parts, "torch": parts}}
    (tmp_path / "breakdown.json").write_text(json.dumps(found))
    rows = [record(2, "baseline"), record(1)]
    write_jsonl(rows, tmp_path / "results.jsonl")
    report.write(rows, {}, tmp_path)
    assert (tmp_path / "plots" / "breakdown.png").stat().st_size > 10_000
    assert "![breakdown](plots/breakdown.png)" in (tmp_path / "report.md").read_text()


def test_launches_are_a_section_of_their_own() -> None:
    rows = [Row(1, "block", "ours", 5, 26)]
    built = report.build([record(1.0)], {}, [], rows)
    assert "Kernels per cross-modal block" in [section.title for section in built.sections]
    assert "| 1 | block | ours | 5 | 26 | 31 |" in document.markdown(built)


def test_host_times_beside_the_records_are_a_section(tmp_path: Path) -> None:
    times = [
        host.HostTime("add_layer_norm", "fwd", 12.4, 10.2, 1.1, 1.0, 4.0, False, {"checks": 6.0}),
        host.HostTime("mix_ffn", "bwd", 300.0, 280.0, 2.2, 2.0, None, False),
    ]
    content = {"times": host.as_records(times)}
    (tmp_path / host.FILE).write_text(json.dumps(content))
    assert host.read(tmp_path / host.FILE) == times
    report.write(some_records(), {}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Host time of a call, without Triton's launcher" in text
    assert "| add_layer_norm fwd | checks 6 | 12 | 10 | 10 | 4 |" in text
    assert "| mix_ffn bwd |  | 300 | 280 | 140 |  |" in text

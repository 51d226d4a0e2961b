"""The numbers of README.md and docs/ are those of the committed results, and the commands exist."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.__main__ import COMMANDS, _parser, main
from benchmarks.machines import gpus, roofline
from benchmarks.measure.record import Record
from benchmarks.readme import PAGES, REGION, REGIONS, Folder, folders, rewritten

ROOT = Path(__file__).resolve().parent.parent
CASE = {"variant": "b0", "stage": 1, "height": 512, "width": 512, "batch": 1, "modalities": 4}


def record(provider: str, p50_ms: float, width_ms: float = 0.0, **fields: object) -> Record:
    values = {"suite": "core", "op": "attention", "case": CASE, "mode": "fwd", "dtype": "bf16"}
    values |= {"n": 20}
    us, width = 1e3 * p50_ms, 1e3 * width_ms
    times = {"p20_us": us - width, "p50_us": us, "p80_us": us + width, "peak_mib": 10 * p50_ms}
    return Record(**(values | {"provider": provider} | times | fields))


def on_a_gpu(records: list[Record]) -> Folder:
    env = {"device": "NVIDIA H200", "torch": "2.11.0", "capability": "9.0", "threads": 16}
    return Folder("h200", env, records)


def pages() -> dict[Path, str]:
    return {path: path.read_text() for path in PAGES}


def test_pages_are_what_the_results_say() -> None:
    assert rewritten(pages(), folders()) == pages(), "run `python -m benchmarks readme`"


def test_headline_by_hand() -> None:
    path = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(r["op"], r["mode"], r["provider"]): r for r in rows}
    text = " ".join((ROOT / "README.md").read_text().split())

    def pair(op: str, mode: str) -> list[dict[str, Any]]:
        """The faster of two ways to write it in plain PyTorch, and ours."""
        plain = [found[op, mode, provider] for provider in ("baseline", "reference")]
        return [min(plain, key=lambda row: row["p50_us"]), found[op, mode, "torch"]]

    plain, ours = pair("training", "step")
    share = round(100 * ours["peak_mib"] / plain["peak_mib"])
    for op, mode, format_ in (
        ("model", "fwd", "takes {:.0f} ms in plain PyTorch and {:.0f} ms here"),
        (
            "training",
            "step",
            "a training step takes {:.0f} ms and {:.0f} ms, with " + f"{share} % of the memory",
        ),
    ):
        ms = [row["p50_us"] / 1e3 for row in pair(op, mode)]
        assert format_.format(*ms) in text


def test_table() -> None:
    rows = [
        record("baseline", 4.0), record("sdpa_flash", 1.5), record("triton", 1.0),
        record("torch", 2.0), record("reference", 2.5),
        record("baseline", 9.0, 1.0, mode="step"), record("triton", 10.0, 1.0, mode="step"),
        record("baseline", 8.0, op="training", mode="step", case=CASE | {"stage": 0}),
        record("triton", 2.0, op="training", mode="step", case=CASE | {"stage": 0}, n=2),
        record("baseline", 7.7, case=CASE | {"height": 1024}),
        record("triton", 7.7, case=CASE | {"height": 1024}),
    ]  # fmt: skip
    text = REGIONS["gpu"]([on_a_gpu(rows)])
    assert (
        "NVIDIA H200, torch 2.11.0, suite core ([report](benchmarks/results/h200/report.md)):"
        in text
    )
    # The strongest other, the best of ours, what is lost, and what only seems so.
    assert "| 1.50 sdpa_flash | 1.00 | 1.50x | 9.00 | 10.0 | (0.9x) | 90.0 | 100 |" in text
    assert (
        "| model | b0 512x512 B1 M4 bf16 |  |  |  | 8.00 | 2.00 | 4.00x † | 80.0 | 20.0 |" in text
    )
    assert "7.7" not in text
    assert "predictions" not in text
    assert REGIONS["cpu"]([on_a_gpu(rows)]) == ""


def test_without_a_gpu_there_are_predictions_called_that() -> None:
    text = REGIONS["gpu"]([])
    assert text.startswith("No GPU has been measured yet.")
    assert "predictions, not measurements" in text
    # The bytes alone take this long.
    works = roofline.model_works(readme.Shape("b0", 0, 1024, 1024, 1, 4), "bf16", "fwd")
    moved = sum(w.bytes for w in works)
    row = next(line for line in text.splitlines() if line.startswith("| EQUISeg-B0, forward"))
    predicted = [float(cell) for cell in row.split("|")[2:-1]]
    assert len(predicted) == len(readme.PREDICTED)
    for name, ms in zip(readme.PREDICTED, predicted, strict=True):
        assert 1e3 * moved / gpus.GPUS[name].limits.bandwidth <= ms * 1.01


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<!-- numbers: gpu -->", ""),
        lambda text: text.replace("<!-- /numbers -->", "", 1),
        lambda text: text.replace("numbers: gpu", "numbers: tpu"),
        lambda text: text + "\n<!-- numbers: cpu -->\n<!-- /numbers -->\n",
    ],
)
def test_regions_must_be_there(change) -> None:
    changed = {path: change(text) if path == PAGES[0] else text for path, text in pages().items()}
    with pytest.raises(ValueError, match="have the regions cpu, gpu, headline, miniature, quick"):
        rewritten(changed, folders())


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    copies = {tmp_path / path.relative_to(ROOT): text for path, text in pages().items()}
    old = {"gpu", "miniature"}  # in README and in docs
    outdated = {
        path: REGION.sub(lambda m: f"{m[1]}old\n{m[4]}" if m[2] in old else m[0], text)
        for path, text in copies.items()
    }
    for path, text in outdated.items():
        path.write_text(text)
    monkeypatch.setattr(readme, "PAGES", tuple(copies))
    assert main(["readme", "--check"]) == 1
    names = ["stale: README.md", "stale: failing-sensors.md"]
    assert capsys.readouterr().out.splitlines() == names
    assert {path: path.read_text() for path in copies} == outdated
    assert main(["readme"]) == 0
    assert {path: path.read_text() for path in copies} == copies
    assert main(["readme", "--check"]) == 0


def test_other_results_are_other_numbers() -> None:
    found = folders()
    times = ("p20_us", "p50_us", "p80_us", "min_us", "cpu_us")

    def regions(found: list[Folder]) -> dict[str, str]:
        text = "".join(rewritten(pages(), found).values())
        return {match[2]: match[3] for match in REGION.finditer(text)}

    def slowed(*which: int) -> list[str]:
        changed = list(found)
        for i in which:
            rows = [
                replace(r, **{name: 3 * getattr(r, name) for name in times})
                if r.provider == "torch" and r.p50_us
                else r
                for r in found[i].records
            ]
            changed[i] = found[i]._replace(records=rows)
        new = regions(changed)
        return [name for name, text in before.items() if new[name] != text]

    before = regions(found)
    assert slowed(0) == ["headline", "quick"]
    assert slowed(1) == ["cpu"]
    assert slowed(0, 1) == ["headline", "quick", "cpu"]


def test_commands_of_the_page_are_understood() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"^\| `((?!python)[a-z].*?)` \|", text, flags=re.MULTILINE)
    names = [command.split()[0] for command in commands]
    assert sorted(names) == sorted(COMMANDS)
    for name, command in zip(names, commands, strict=True):
        _parser(name).parse_args(shlex.split(command))


def test_headline_compares_peaks_of_memory() -> None:
    found = folders()
    doubled = [
        replace(r, peak_mib=2 * r.peak_mib)
        if (r.op, r.provider) == ("training", "torch") and r.peak_mib
        else r
        for r in found[0].records
    ]
    rows = {r.provider: r for r in doubled if r.op == "training"}
    plain = min(rows["baseline"], rows["reference"], key=lambda r: r.p50_us)
    share = 100 * rows["torch"].peak_mib / plain.peak_mib
    text = readme.headline([found[0]._replace(records=doubled)])
    assert f"{share:.0f} % of the memory" in text

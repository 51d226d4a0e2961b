"""What came out of a visit: a table for the terminal, and `summary.md`, which needs nothing beside
it to be understood."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from benchmarks.cases import operations
from benchmarks.command.table import (
    FittedTable,
    markdown_table,
    milliseconds,
    significant,
    times,
)
from benchmarks.machines import judgement
from benchmarks.measure import host, record
from benchmarks.measure.record import Key, Record
from benchmarks.reporting.analysis import contests, grouped
from benchmarks.visiting.outcomes import Outcomes
from benchmarks.visiting.tasks import RUNS, Task

States = Mapping[str, Mapping[str, Any]]
"""What became of tasks, by name; see `visit.State`."""


def failed(values: Mapping[str, Any]) -> bool:
    """Whether a task ended by itself, and badly."""
    return values.get("state") == "done" and values.get("rc") != 0


def brought(task: Task, values: Mapping[str, Any], folder: Path) -> str:
    """What a task has brought, in words; empty if nothing."""
    if task.name.startswith("parity/"):
        found = Outcomes.read(folder / f"{task.name}.jsonl")
        counts = Counter(line["outcome"] for line in found.ended.values())
        shown = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        late = f", {len(found.started)} under way" if found.started else ""
        return f"{shown}{late} on {found.device}" if counts else ""
    if task.name in RUNS:
        rows = _measured(folder / task.name)
        counts = Counter(row.status if row.final else "not timed" for row in rows)
        wrong = {f"{r.op} {r.provider}: {r.status}" for r in rows if _wrong(r)}
        return "; ".join([*(f"{n} {status}" for status, n in counts.items()), *sorted(wrong)])
    if task.name == "prepare/environment":
        env = _environment(folder)
        return env and "{device}, torch {torch}, triton {triton}, python {python}".format(**env)
    if task.name == "report":
        made = [p for p in (folder / "results").rglob("*") if p.suffix in (".md", ".png")]
        return ", ".join(sorted(path.relative_to(folder).as_posix() for path in made))
    lines = _log(task, folder)
    if said := [line for line in lines if "SUMMARY: " in line]:
        return said[-1].partition("SUMMARY: ")[2]
    # The last line of what has failed or was cut off is no result.
    return "".join(lines[-1:]) if values.get("rc") == 0 else ""


def _wrong(row: Record) -> bool:
    return row.status in ("incorrect", "error", "oom")


def _log(task: Task, folder: Path) -> list[str]:
    path = folder / task.log
    text = path.read_text(errors="replace") if path.is_file() else ""
    return [line.strip() for line in text.split("\n") if line.strip()]


COLUMNS = ("task", "state", "exit status", "seconds", "what came out")


def _rows(tasks: Sequence[Task], states: States, folder: Path) -> Iterator[tuple[str, ...]]:
    for task in tasks:
        values = states.get(task.name, {})
        bad = "".join(_log(task, folder)[-1:]) if failed(values) else ""
        out = [values.get("reason"), brought(task, values, folder), bad and f"failed: {bad}"]
        state = "failed" if failed(values) else values.get("state", "waiting")
        rc, seconds = (str(values.get(name, "")) for name in ("rc", "seconds"))
        yield task.name, state, rc, seconds, "; ".join(filter(None, out))


def table(tasks: Sequence[Task], states: States, folder: Path) -> FittedTable:
    whole = FittedTable(COLUMNS, words=(*COLUMNS[:2], COLUMNS[4]), spare=("exit status",))
    for *cells, out in _rows(tasks, states, folder):
        style = {"failed": "red", "cut off": "yellow"}.get(cells[1], "")
        whole.add_row(*cells, escape(out), style=style)
    return whole


def write_summary(tasks: Sequence[Task], states: States, folder: Path) -> None:
    """`summary.md`, and all records in the folder `results`, for `report` and `compare`."""
    records = merge(folder)
    lines = ["# Visit", "", markdown_table(COLUMNS, _rows(tasks, states, folder), words=2)]
    networks, single = (
        [r for r in records if (operations()[r.op].scope == "operation") is small]
        for small in (False, True)
    )
    if networks:
        lines += ["", "## Networks", ""]
        lines += [
            "Milliseconds: by replays of a CUDA graph, and by events around single calls, launches",
            "included (on a CPU by wall clock). Ratios are within one method.",
            "",
            markdown_table(NETWORK, _networks(networks), words=2),
        ]
    if found := contests(single):
        rows = [
            (c.label, c.other.provider, milliseconds(c.other.p50_us), c.ours.provider,
             milliseconds(c.ours.p50_us), times(c.ratio) if c.clear else f"({times(c.ratio)})")
            for c in found
        ]  # fmt: skip
        columns = ("case", "strongest other", "ms", "ours", "ms", "ratio")
        lines += ["", "## Operations", "", markdown_table(columns, rows, words=2)]
    if records:
        comparison = judgement.compare(records, _environment(folder).get("device", ""))
        lines += ["", "## Predicted and measured", "", *judgement.markdown(comparison)]
    if (folder / host.FILE).is_file():
        measured = host.read(folder / host.FILE)
        rows = map(host.cells, measured)
        lines += ["", f"## {host.title(measured)}", "", markdown_table(host.COLUMNS, rows, words=2)]
    lines += _trouble(records, folder)
    # It is read elsewhere: what commands said of files is said relative to the folder.
    text = "\n".join(lines).replace(f"{folder}/", "") + "\n"
    (folder / "summary.md").write_text(text)


NETWORK = ("case", "provider", "graph", "events", "eager / this", "peak MiB", "saved MiB", "note")


def _networks(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Provider by provider: both ways of timing, and memory."""
    for group in grouped(records):
        base = next((r for r in group if r.provider == "baseline"), None)
        for row in (r for r in group if r.status != "unsupported"):
            uncaptured = f"no graph: {row.uncaptured}" if row.uncaptured else ""
            ratio = ""
            for name in ("p50_us", "events_us", "graph_us"):  # the last that both have
                if base and getattr(base, name) and getattr(row, name):
                    ratio = times(getattr(base, name) / getattr(row, name))
            yield (
                f"{row.op} {row.mode} {row.shape.label} {row.dtype}", row.provider,
                milliseconds(row.graph_us), milliseconds(row.events_us or row.p50_us), ratio,
                significant(row.peak_mib), significant(row.saved_mib),
                "; ".join(filter(None, [row.reason, uncaptured])),
            )  # fmt: skip


def merge(folder: Path) -> list[Record]:
    """The records of all runs, also written to the folder `results`."""
    best: dict[Key, Record] = {}
    env = ""
    for name in RUNS:
        for row in _measured(folder / name):
            known = best.get(row.key)
            if known is None or (known.p50_us is None and row.p50_us is not None):
                best[row.key] = row
        path = folder / name / "env.json"
        env = env or (path.read_text() if path.is_file() else "")
    if best and env:
        (folder / "results").mkdir(exist_ok=True)
        if (folder / host.FILE).is_file():
            (folder / "results" / host.FILE).write_text((folder / host.FILE).read_text())
        record.write_jsonl(best.values(), folder / "results" / "results.jsonl")
        (folder / "results" / "env.json").write_text(env)
    return list(best.values())


def _measured(folder: Path) -> list[Record]:
    return record.read(folder) if (folder / "results.jsonl").is_file() else []


def _environment(folder: Path) -> dict[str, Any]:
    """What `env` has printed, whatever warnings were printed around it; empty if nothing."""
    try:
        text = (folder / "logs" / "prepare-environment.log").read_text()
        return json.JSONDecoder().raw_decode(text[re.search(r"^\{", text, re.M).start() :])[0]  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return {}


def _trouble(records: Sequence[Record], folder: Path) -> Iterator[str]:
    """Records without numbers, failed and skipped tests."""
    tests = [
        line
        for path in sorted((folder / "parity").glob("*.jsonl"))
        for line in Outcomes.read(path).ended.values()
    ]
    skipped = Counter(x["reason"] for x in tests if x["outcome"] == "skipped")
    reasons = Counter(f"{r.op} {r.provider} {r.status} {r.reason}" for r in records if _wrong(r))
    for title, found in (
        ("Records without numbers", [f"{what} ({n})" for what, n in reasons.items()]),
        ("Failed tests", [
            f"`{x['test']}`: {x['reason']}" for x in tests if x["outcome"] == "failed"
        ]),
        ("Skipped tests", [f"{n}: {why}" for why, n in skipped.items()]),
    ):  # fmt: skip
        if found:
            yield from ("", f"## {title}", "", *(f"- {line}" for line in found))

"""What came out of a visit: a table for the terminal, and `summary.md`, which needs nothing beside
it to be understood."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from benchmarks.cases import operations
from benchmarks.command.table import FittedTable, milliseconds, significant, times
from benchmarks.machines import judgement
from benchmarks.measure import host, record
from benchmarks.measure.record import Key, Record
from benchmarks.reporting.analysis import contests, grouped
from benchmarks.visiting.budget import State, Step, Task
from benchmarks.visiting.outcomes import merged
from benchmarks.visiting.steps import ENVIRONMENT

RUNS = ("headline", "operations", "compilers")
"""Folders of records; of one measurement the first that has numbers counts."""


def failed(state: State, task: Task) -> bool:
    return state.of(task).get("state") == "done" and state.of(task).get("rc") != 0


def unfinished(state: State, task: Task) -> bool:
    return state.of(task).get("state") in ("cut off", "not started", "running")


def brought(step: Step, state: State, folder: Path) -> str:
    """What a step has brought, in words; empty if nothing."""
    if step.name in OUTCOMES:
        return OUTCOMES[step.name](step.tasks, folder)
    # The last line of what has failed or was cut off is no result.
    return _last_lines([t for t in step.tasks if state.of(t).get("rc") == 0], folder)


def _rows(planned: Sequence[Step], state: State, folder: Path) -> list[tuple[str, str, str, str]]:
    """(step, state, seconds, what came out)."""
    rows = []
    for step in planned:
        found = [state.of(task) for task in step.tasks]
        states = Counter(
            "failed" if failed(state, task) else state.of(task).get("state", "waiting")
            for task in step.tasks
        )
        shown = ", ".join(f"{n} {s}" if len(step.tasks) > 1 else s for s, n in states.items())
        seconds = sum(values.get("seconds", 0.0) for values in found)
        reasons = [values["reason"] for values in found if "reason" in values]
        bad = _last_lines([task for task in step.tasks if failed(state, task)], folder)
        what = [*reasons, brought(step, state, folder), bad and f"failed: {bad}"]
        out = step.impossible or "; ".join(filter(None, what))
        rows.append((step.name, shown, f"{seconds:.0f}", out))
    return rows


def table(planned: Sequence[Step], state: State, folder: Path) -> FittedTable:
    columns = ("step", "state", "seconds", "what came out")
    whole = FittedTable(columns, words=("step", "state", "what came out"))
    for step, shown, seconds, out in _rows(planned, state, folder):
        style = "red" if "failed" in shown else "yellow" if "cut off" in shown else ""
        whole.add_row(step, shown, seconds, escape(out), style=style)
    return whole


def write_summary(planned: Sequence[Step], state: State, folder: Path) -> None:
    """`summary.md`, and all records in the folder `results`, for `report` and `compare`."""
    records = merge(folder)
    lines = ["# Visit", "", _environment(folder) or "no environment yet", ""]
    lines += ["| step | state | seconds | what came out |", "|---|---|--:|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(planned, state, folder)]
    lines += _networks(records)
    lines += _operations(records)
    if records:
        comparison = judgement.compare(records, _device(folder))
        lines += ["", "## Predicted and measured", "", *judgement.markdown(comparison)]
    lines += _host(folder)
    lines += _trouble(records, folder)
    lines += ["", "## Commands", ""]
    lines += ["| command | state | exit status | seconds | log |", "|---|---|--:|--:|---|"]
    for step in planned:
        for task in step.tasks:
            values = state.of(task)
            cells = [str(values.get(name, "")) for name in ("state", "rc", "seconds")]
            lines.append(f"| {task.name} | {' | '.join(cells)} | {task.output} |")
    # It is read elsewhere: what commands said of files is said relative to the folder.
    text = "\n".join(lines).replace(f"{folder}/", "") + "\n"
    (folder / "summary.md").write_text(text)


def merge(folder: Path) -> list[Record]:
    """The records of all runs, also written to the folder `results`."""
    best: dict[Key, Record] = {}
    env = None
    for name in RUNS:
        for row in _measured(folder / name):
            known = best.get(row.key)
            if known is None or (known.p50_us is None and row.p50_us is not None):
                best[row.key] = row
        path = folder / name / "env.json"
        env = env or (path.read_text() if path.is_file() else None)
    if best and env:
        (folder / "results").mkdir(exist_ok=True)
        if (folder / host.FILE).is_file():
            (folder / "results" / host.FILE).write_text((folder / host.FILE).read_text())
        record.write_jsonl(best.values(), folder / "results" / "results.jsonl")
        (folder / "results" / "env.json").write_text(env)
    return list(best.values())


def _measured(folder: Path) -> list[Record]:
    return record.read_jsonl(folder) if (folder / "results.jsonl").is_file() else []


def _device(folder: Path) -> str:
    return _json(folder / ENVIRONMENT).get("device", "")


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, whatever warnings were printed around it; empty if none."""
    try:
        text = path.read_text()
        return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
    except (OSError, ValueError):
        return {}


def _environment(folder: Path) -> str:
    env = _json(folder / ENVIRONMENT)
    if not env:
        return ""
    triton = env["triton"] or "not installed"
    return f"{env['device']}, torch {env['torch']}, triton {triton}, python {env['python']}"


def _networks(records: Sequence[Record]) -> Iterator[str]:
    """Whole networks, provider by provider: both ways of timing, and memory."""
    groups = [g for g in grouped(records) if operations()[g[0].op].scope != "operation"]
    if not groups:
        return
    yield from ("", "## Networks", "")
    yield "Milliseconds: by replays of a CUDA graph, and by events around"
    yield "single calls, launches included (on a CPU by wall clock). Ratios are within one method."
    yield ""
    yield "| case | provider | graph | events | eager / this | peak MiB | saved MiB | note |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    for group in groups:
        base = next((r for r in group if r.provider == "baseline"), None)
        for row in group:
            if row.status == "unsupported":
                continue
            note = "; ".join(filter(None, [row.reason, _no_graph(row)]))
            yield (
                f"| {row.op} {row.mode} {row.shape.label} {row.dtype} | {row.provider} "
                f"| {milliseconds(row.graph_us)} | {milliseconds(row.events_us or row.p50_us)} "
                f"| {_ratio(base, row)} | {significant(row.peak_mib)} "
                f"| {significant(row.saved_mib)} | {note} |"
            )


def _no_graph(row: Record) -> str:
    return f"no graph: {row.uncaptured}" if row.uncaptured else ""


def _ratio(base: Record | None, row: Record) -> str:
    """Of graphs where both have one, else of events."""
    if base is None:
        return ""
    for name in ("graph_us", "events_us", "p50_us"):
        one, other = getattr(base, name), getattr(row, name)
        if one and other:
            return times(one / other)
    return ""


def _operations(records: Sequence[Record]) -> Iterator[str]:
    found = [c for c in contests(records) if operations()[c.ours.op].scope == "operation"]
    if not found:
        return
    yield from ("", "## Operations", "", "| case | strongest other | ms | ours | ms | ratio |")
    yield "|---|---|--:|---|--:|--:|"
    for c in found:
        ratio = times(c.ratio) if c.clear else f"({times(c.ratio)})"
        other, ours = milliseconds(c.other.p50_us), milliseconds(c.ours.p50_us)
        yield f"| {c.label} | {c.other.provider} | {other} | {c.ours.provider} | {ours} | {ratio} |"


def _host(folder: Path) -> Iterator[str]:
    if not (folder / host.FILE).is_file():
        return
    found = host.read(folder / host.FILE)
    yield from ("", f"## {host.title(found)}", "", f"| {' | '.join(host.COLUMNS)} |")
    yield f"|---|---|{'--:|' * (len(host.COLUMNS) - 2)}"
    yield from (f"| {' | '.join(host.cells(time))} |" for time in found)


def _trouble(records: Sequence[Record], folder: Path) -> Iterator[str]:
    """Records without numbers, failed and skipped tests."""
    wrong = [r for r in records if r.status in ("incorrect", "error", "oom")]
    if wrong:
        yield from ("", "## Records without numbers", "")
        reasons = Counter((r.op, r.provider, r.status, r.reason) for r in wrong)
        yield from (f"- {' '.join(what)} ({n})" for what, n in reasons.items())
    outcomes = merged(sorted((folder / "parity").glob("*.jsonl")))
    bad = [line for line in outcomes.ended.values() if line["outcome"] == "failed"]
    if bad:
        yield from ("", "## Failed tests", "", *(f"- `{x['test']}`: {x['reason']}" for x in bad))
    skipped = Counter(x["reason"] for x in outcomes.ended.values() if x["outcome"] == "skipped")
    if skipped:
        yield from ("", "## Skipped tests", "", *(f"- {n}: {why}" for why, n in skipped.items()))


def _last_lines(tasks: Sequence[Task], folder: Path) -> str:
    """The last line that each task has printed."""
    found = []
    for task in tasks:
        path = folder / task.output
        lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
        found += [line.strip() for line in lines if line.strip()][-1:]
    return "; ".join(found)


def _prepared(tasks: Sequence[Task], folder: Path) -> str:
    cache = [task for task in tasks if task.name == "prepare/cache"]
    return "; ".join(filter(None, [_environment(folder), _last_lines(cache, folder)]))


def _tested(tasks: Sequence[Task], folder: Path) -> str:
    found = merged(sorted((folder / "parity").glob("*.jsonl")))
    counts = found.counts()
    shown = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    late = f", {len(found.started)} under way" if found.started else ""
    return f"{shown}{late} on {found.device}" if counts else ""


def _timed(tasks: Sequence[Task], folder: Path) -> str:
    rows = [row for task in tasks for row in _measured(folder / task.name)]
    counts = Counter(row.status if row.final else "not timed" for row in rows)
    wrong = {f"{r.op} {r.provider}: {r.status}" for r in rows if r.status in ("incorrect", "error")}
    shown = ", ".join(f"{n} {status}" for status, n in counts.items())
    return "; ".join(filter(None, [shown, *sorted(wrong)]))


def _reported(tasks: Sequence[Task], folder: Path) -> str:
    results = folder / "results"
    made = [*results.glob("report.*"), *(results / "plots").glob("*.png")]
    return ", ".join(sorted(path.relative_to(folder).as_posix() for path in made))


def _checked(tasks: Sequence[Task], folder: Path) -> str:
    found = []
    for task in tasks:
        path = folder / task.output
        text = path.read_text(errors="replace") if path.is_file() else ""
        found += [f"{task.name.split('/')[1]}: {x}" for x in re.findall(r"SUMMARY: (.*)", text)]
    return "; ".join(found) or _last_lines(tasks, folder)


OUTCOMES = {
    "prepare": _prepared,
    "headline": _timed,
    "parity": _tested,
    "operations": _timed,
    "memcheck": _checked,
    "compilers": _timed,
    "report": _reported,
}

"""What came out of a visit: a table for the terminal, and `summary.md`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks import record
from benchmarks.record import Key, Record
from benchmarks.visiting.budget import State, Step, Task
from benchmarks.visiting.outcomes import merged


def failed(state: State, task: Task) -> bool:
    return state.done(task) and state.of(task)["rc"] != 0


def unfinished(state: State, task: Task) -> bool:
    return state.of(task).get("state") in ("cut off", "not started", "running")


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
        out = step.impossible or OUTCOMES.get(step.name, _last_lines)(step, folder)
        rows.append((step.name, shown, f"{seconds:.0f}", out))
    return rows


def table(planned: Sequence[Step], state: State, folder: Path) -> Table:
    whole = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in ("step", "state", "seconds", "what came out"):
        whole.add_column(name, overflow="fold", justify="right" if name == "seconds" else "left")
    for step, shown, seconds, out in _rows(planned, state, folder):
        style = "red" if "failed" in shown else "yellow" if "cut off" in shown else ""
        whole.add_row(step, shown, seconds, escape(out), style=style)
    return whole


def write_summary(planned: Sequence[Step], state: State, folder: Path) -> None:
    """`summary.md`, and the results of the core suite in one file."""
    for name in ("core", "compiled"):
        _merge(folder / name)
    lines = ["# Visit", "", "| step | state | seconds | what came out |", "|---|---|--:|---|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(planned, state, folder)]
    lines += ["", "| command | state | exit status | seconds | log |", "|---|---|--:|--:|---|"]
    for step in planned:
        for task in step.tasks:
            values = state.of(task)
            cells = [values.get(name, "") for name in ("state", "rc", "seconds")]
            shown = ["" if cell is None else str(cell) for cell in cells]
            lines.append(f"| {task.name} | {' | '.join(shown)} | {task.output} |")
    outcomes = merged(sorted((folder / "parity").glob("*.jsonl")))
    bad = [line for line in outcomes.ended.values() if line["outcome"] == "failed"]
    if bad:
        lines += ["", "## Failed tests", "", *(f"- `{x['test']}`: {x['reason']}" for x in bad)]
    skipped = Counter(x["reason"] for x in outcomes.ended.values() if x["outcome"] == "skipped")
    if skipped:
        lines += ["", "## Skipped tests", "", *(f"- {n}: {why}" for why, n in skipped.items())]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")


def _merge(core: Path) -> None:
    """One folder that `report` and `compare` can read, from those of operations and attempts."""
    rows = _measured(core)
    if rows:
        record.write_jsonl(rows, core / "results.jsonl")
        env = next(core.rglob("*/env.json"))
        (core / "env.json").write_text(env.read_text())


def _measured(folder: Path) -> list[Record]:
    """The records of all attempts in `folder`; of one measurement the latest that has numbers."""
    paths = [path for path in folder.rglob("results.jsonl") if path.parent.name.isdecimal()]
    paths.sort(key=lambda path: int(path.parent.name))
    best: dict[Key, Record] = {}
    for row in (row for path in paths for row in record.read_jsonl(path)):
        if row.status == "ok" or row.key not in best or best[row.key].status != "ok":
            best[row.key] = row
    return list(best.values())


def _last_lines(step: Step, folder: Path) -> str:
    """The last line that each task has printed."""
    found = []
    for task in step.tasks:
        path = folder / task.output
        lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
        found += [line.strip() for line in lines if line.strip()][-1:]
    return "; ".join(found)


def _environment_outcome(step: Step, folder: Path) -> str:
    try:
        text = (folder / "environment.json").read_text()
        env = json.loads(text[text.index("{") :])  # warnings may come first
    except (OSError, ValueError):
        return ""
    triton = env["triton"] or "not installed"
    return f"{env['device']}, torch {env['torch']}, triton {triton}, python {env['python']}"


def _parity_outcome(step: Step, folder: Path) -> str:
    found = merged(sorted((folder / "parity").glob("*.jsonl")))
    counts = found.counts()
    shown = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    late = f", {len(found.started)} under way" if found.started else ""
    return f"{shown}{late} on {found.device}" if found.device else ""


def _measured_outcome(step: Step, folder: Path) -> str:
    rows = _measured(folder / step.name)
    counts = Counter(row.status for row in rows)
    wrong = {f"{r.op} {r.provider}: {r.status}" for r in rows if r.status in ("incorrect", "error")}
    shown = ", ".join(f"{n} {status}" for status, n in counts.items())
    return "; ".join([shown, *sorted(wrong)])


def _report_outcome(step: Step, folder: Path) -> str:
    made = [*(folder / "core").glob("report.*"), *(folder / "core" / "plots").glob("*.png")]
    return ", ".join(sorted(str(path.relative_to(folder)) for path in made))


def _sanitizer_outcome(step: Step, folder: Path) -> str:
    found = []
    for task in step.tasks:
        path = folder / task.output
        text = path.read_text(errors="replace") if path.is_file() else ""
        found += [f"{task.name.split('/')[1]}: {x}" for x in re.findall(r"SUMMARY: (.*)", text)]
    return "; ".join(found) or _last_lines(step, folder)


OUTCOMES = {
    "environment": _environment_outcome,
    "parity": _parity_outcome,
    "core": _measured_outcome,
    "compiled": _measured_outcome,
    "memory": _measured_outcome,
    "sanitizer": _sanitizer_outcome,
    "report": _report_outcome,
}

"""What is timed, one file per operation or part of the model, declared in its `OPS`."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.cases.common.op import SCOPES, Op


@cache
def operations() -> dict[str, Op]:
    """Every declaration in this folder by name, operations by their rank before larger parts."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    found = [op for stem in stems for op in load(stem).values()]
    scopes = list(SCOPES)
    return {op.name: op for op in sorted(found, key=lambda op: (scopes.index(op.scope), op.rank))}


def load(stem: str) -> dict[str, Op]:
    """The declarations of one file by name."""
    module = importlib.import_module(f"{__name__}.{stem}")
    return {op.name: replace(op, stem=stem) for op in module.OPS}

"""What is timed: operations, and the parts of the model, each file's in its `OPS`."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.cases.common.op import SCOPES, Op


@cache
def operations() -> dict[str, Op]:
    """Every declaration in this folder by name, operations before larger parts."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    found = {name: op for stem in stems for name, op in load(stem).items()}
    return dict(sorted(found.items(), key=lambda item: list(SCOPES).index(item[1].scope)))


def load(stem: str) -> dict[str, Op]:
    """The declarations of one file by name."""
    module = importlib.import_module(f"{__name__}.{stem}")
    return {op.name: replace(op, stem=stem) for op in module.OPS}

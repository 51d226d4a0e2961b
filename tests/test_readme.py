"""The README's Python blocks run, and its commands are those that CI takes from it."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PARTS = re.findall(r"(.*?)```python\n(.*?)```", README, flags=re.DOTALL)
BLOCKS = [block for _, block in PARTS]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[1][:40])
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(("before", "block"), PARTS, ids=range(len(PARTS)))
def test_what_a_block_needs_is_named_before_it(before: str, block: str) -> None:
    """The first installation brings no more than `[bench]`."""
    assert ("transformers" in block) == ("[hf]" in before)


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(
    "command",
    [
        'pip install -c constraints.txt -e ".[bench]" && python -m benchmarks run --suite quick',
        'pip install -c constraints.txt -e ".[test]" && python -m pytest -n auto --dist worksteal',
    ],
)
def test_command_stands_alone_on_its_line(command: str) -> None:
    assert command in README.splitlines()

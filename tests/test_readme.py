"""The README's Python blocks run, and its commands are those that CI takes from it."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[1][:40])
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


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

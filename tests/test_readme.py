"""The README's Python blocks run, so do its commands for training, and CI takes its own from it."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PARTS = re.findall(r"(.*?)```python\n(.*?)```", README, flags=re.DOTALL)
BLOCKS = [block for _, block in PARTS]
OWN_SENSORS = README.partition("## Train on your own sensors")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"```bash\n(.*?)```", OWN_SENSORS, flags=re.DOTALL)

SMALL = {
    "train": "--model.variant nano --steps 2 --crop 32,64 --batch_size 2 --workers 0 --device cpu",
    "evaluate": "--protocols masked --limit 1 --sheet 1 --device cpu",
    "predict": "--workers 0 --device cpu",
}
"""What makes the commands of the README quick on images of 32 x 64."""


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


def run(line: str, more: str = "") -> None:
    """A command of the README, in this process, with options that make it quick."""
    python, _, module, *arguments = shlex.split(line)
    assert python == "python"
    options = shlex.split(SMALL[module.removeprefix("equiseg_fast.")] + more)
    assert import_module(module).main([*arguments, *options]) == 0, line


def test_training_on_own_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout, the YAML and the commands that the README shows."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", OWN_SENSORS, flags=re.DOTALL)
    (name,) = re.findall(r"Describe them in `(.*?)`", OWN_SENSORS)
    Path(name).write_text(text)
    classes = yaml.safe_load(text)["data"]["classes"]
    random = np.random.default_rng(0)
    layout = list(map(Path, re.findall(r"data/\S+\.\w+", OWN_SENSORS)))
    assert len(layout) == 6
    for path in layout:
        path.parent.mkdir(parents=True)
        for i in range(2):
            pixels = {
                "rgb": random.integers(0, 256, (32, 64, 3), np.uint8),
                "thermal": random.integers(0, 2**16, (32, 64), np.uint16),
                "labels": random.choice([*range(len(classes)), 255], (32, 64)).astype(np.uint8),
            }[path.parent.name]
            Image.fromarray(pixels).save(path.with_stem(f"{path.stem}_{i}"))

    lines = COMMANDS[0].splitlines()
    assert [line.split()[2] for line in lines] == [f"equiseg_fast.{name}" for name in SMALL]
    for line in lines:
        run(line)
    names = [path.name for path in sorted(Path(lines[-1].split()[-1], "labels").iterdir())]
    assert names == ["0002_0.png", "0002_1.png"]


def test_a_first_try_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    echo, train, evaluate = COMMANDS[1].splitlines()
    text, path = re.fullmatch(r'echo "(.*)" > (\S+)', echo).groups()
    Path(path).write_text(f"{text}\ndata: {{size: [32, 64], length: 4, held_out: 2}}\n")
    run(train)
    run(evaluate)

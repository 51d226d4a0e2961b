"""README and docs: their Python runs, so do the commands for training, links lead somewhere, and CI
takes its own commands from README.md."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from equiseg_fast import ops

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        README,
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
PARTS = [
    (page, before, block)
    for page, text in PAGES.items()
    for before, block in re.findall(r"(.*?)```python\n(.*?)```", text, flags=re.DOTALL)
]
TRAINING = PAGES["docs/training.md"]
COMMANDS = re.findall(r"```bash\n(.*?)```", TRAINING, flags=re.DOTALL)

SMALL = {
    "train": "--model.variant nano --steps 2 --crop 32,64 --batch_size 2 --workers 0 --device cpu",
    "evaluate": "--protocols masked --limit 1 --sheet 1 --device cpu",
    "predict": "--workers 0 --device cpu",
}
"""What makes the commands for training quick on images of 32 x 64."""


@pytest.mark.parametrize(
    ("page", "before", "block"), PARTS, ids=[f"{page}-{i}" for i, (page, *_) in enumerate(PARTS)]
)
def test_python_block_runs(page: str, before: str, block: str) -> None:
    """With nothing but `[bench]`, the first installation, if nothing else was named before it."""
    assert ("transformers" in block) == ("[hf]" in before)
    exec(compile(block, page, "exec"), {})


def test_there_is_something_to_run_in_a_readme_that_is_short() -> None:
    assert len([page for page, *_ in PARTS if page == "README.md"]) == 3
    assert len(PARTS) >= 8
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(
    "command",
    [
        'pip install -c constraints.txt -e ".[bench]" && python -m benchmarks run --suite quick',
        'pip install -c constraints.txt -e ".[test]" && python -m pytest -n auto --dist worksteal',
    ],
)
def test_command_stands_alone_on_its_line(command: str) -> None:
    assert command in PAGES["README.md"].splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = PAGES[page]
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target
    for named in re.findall(r"`((?:tests|examples|docs|kernels|benchmarks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("name", ops.__all__)
def test_every_operation_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", PAGES["docs/operations.md"])


def run(line: str, more: str = "") -> None:
    """A command of the page, in this process, with options that make it quick."""
    python, _, module, *arguments = shlex.split(line)
    assert python == "python"
    options = shlex.split(SMALL[module.removeprefix("equiseg_fast.")] + more)
    assert import_module(module).main([*arguments, *options]) == 0, line


def test_training_on_own_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout, the YAML and the commands that the page shows."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", TRAINING, flags=re.DOTALL)
    (name,) = re.findall(r"Describe them in `(.*?)`", TRAINING)
    Path(name).write_text(text)
    classes = yaml.safe_load(text)["data"]["classes"]
    random = np.random.default_rng(0)
    layout = list(map(Path, re.findall(r"data/\S+\.\w+", TRAINING)))
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

"""What is shipped, and what importing it costs and needs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

from equiseg_fast._command import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train", "evaluate", "predict")


def python(code: str, *args: str, cwd: Path = ROOT, path: tuple[Path, ...] = (ROOT,)) -> str:
    """Standard output of a fresh interpreter that sees exactly `path` besides what is installed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds, symbolic links kept."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    skip = shutil.ignore_patterns(
        ".git", "__pycache__", "*.egg-info", "build", "*-results", ".*_cache"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def built(sources: Path) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    out = sources.parent / "dist"
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sources.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class TestImport:
    def test_imports_no_triton_and_is_quick(self) -> None:
        code = (
            "import sys, time, torch; start = time.process_time(); import equiseg_fast; "
            "assert 'triton' not in sys.modules; print(time.process_time() - start)"
        )
        seconds = min(float(python(code)) for _ in range(3))
        assert seconds < 0.5, f"equiseg_fast takes {seconds:.2f} s beyond torch"

    def test_works_without_triton(self) -> None:
        code = (
            "import sys; sys.modules['triton'] = None; "
            "import torch, equiseg_fast; q = torch.randn(1, 4, 1, 16); "
            "print(equiseg_fast.attention(q, q, q).shape)\n"
            "try: equiseg_fast.attention(q, q, q, backend='triton')\n"
            "except ValueError as error: print(error)"
        )
        shape, error = python(code).splitlines()
        assert shape == "torch.Size([1, 4, 1, 16])"
        assert "triton is not installed" in error

    def test_models_are_reachable_from_the_top(self) -> None:
        code = "import equiseg_fast as e; print(all(hasattr(e, n) for n in e.__all__))"
        assert python(code).strip() == "True"

    def test_needs_no_library_of_the_commands(self) -> None:
        """Nor does the package of datasets; what they lack is said before they begin."""
        code = (
            "import contextlib, sys\n"
            f"for name in {LIBRARIES}: sys.modules[name] = None\n"
            "import equiseg_fast.data\n"
            "from equiseg_fast import EQUISeg, train, evaluate, predict\n"
            "print(len(EQUISeg.from_name('nano').state_dict()) > 100)\n"
            "with contextlib.redirect_stderr(sys.stdout):\n"
            "    print(train.main(['a.yaml']), evaluate.main(['a', 'b']))\n"
            "    print(predict.main(['a', 'b', 'c']))\n"
        )
        works, *lines = python(code).splitlines()
        assert works == "True"
        install = 'must be installed: pip install "equiseg-fast[train]"'
        said = [f"error: {', '.join(LIBRARIES)} {install}"] * 3
        assert [line.partition(": ")[2] for line in lines if ":" in line] == said
        assert [line for line in lines if ":" not in line] == ["2 2", "2"]

    def test_environment_report(self) -> None:
        code = "import runpy; runpy.run_module('equiseg_fast.env', run_name='__main__')"
        report = python(code)
        for part in ("equiseg_fast: 0.", "torch: 2.", "cpu: ", "triton: ", "reference: usable"):
            assert part in report
        assert str(ROOT) not in report

    def test_unknown_default_backend_is_refused(self) -> None:
        code = (
            "import os; os.environ['EQUISEG_FAST_BACKEND'] = 'cuda'\n"
            "try: import equiseg_fast\n"
            "except ValueError as error: print(error)"
        )
        assert "EQUISEG_FAST_BACKEND must be one of triton" in python(code)


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_fits_a_screen(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert import_module(f"equiseg_fast.{name}").main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"usage: python -m equiseg_fast.{name} ")
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 80

    def test_what_they_ask_for_is_what_the_extra_installs(self) -> None:
        extra = (ROOT / "pyproject.toml").read_text().partition("\ntrain = [")[2].partition("]")[0]
        imports = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
        names = re.findall(r'"([a-z-]+)>=', extra)
        assert sorted(imports.get(name, name) for name in names) == sorted(LIBRARIES)


class TestFolderKernels:
    """The import name `kernels` belongs to another project; ours is `equiseg_fast.kernels`."""

    def test_is_a_link_without_init(self) -> None:
        assert not (ROOT / "kernels" / "__init__.py").exists()
        assert os.readlink(ROOT / "equiseg_fast" / "kernels") == os.path.join("..", "kernels")

    @pytest.mark.parametrize("ours_first", [True, False])
    def test_a_regular_package_of_that_name_wins(self, tmp_path: Path, ours_first: bool) -> None:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("owner = 'theirs'\n")
        path = (ROOT, tmp_path) if ours_first else (tmp_path, ROOT)
        code = "import kernels, equiseg_fast.kernels._arch; print(kernels.owner)"
        assert python(code, path=path).strip() == "theirs"

    def test_a_checkout_without_symbolic_links_works(self, sources: Path) -> None:
        copy = sources.parent / "windows"
        shutil.copytree(sources, copy, symlinks=True)
        link = copy / "equiseg_fast" / "kernels"
        link.unlink()
        link.write_text("../kernels")
        code = "import equiseg_fast.kernels._arch as c; print(c.__file__)"
        assert python(code, cwd=copy, path=(copy,)).strip().startswith(str(copy))


class TestDistributions:
    def test_setup_imports_only_setuptools(self) -> None:
        tree = ast.parse((ROOT / "setup.py").read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert [n.module for n in imports if isinstance(n, ast.ImportFrom)] == ["setuptools"]
        assert len(imports) == 1

    def test_wheel(self, built: Path) -> None:
        (wheel,) = built.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert {n.split("/")[0].split("-")[0] for n in names} == {"equiseg_fast"}
        expected = {
            str(p.relative_to(ROOT))
            for folder in ("equiseg_fast", "equiseg_fast/kernels")
            for p in (ROOT / folder).rglob("*.py")
            if "__pycache__" not in p.parts
        }
        assert expected | {"equiseg_fast/py.typed"} <= set(names)
        assert "equiseg_fast/kernels/attention.py" in expected
        (path,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = ConfigParser()
        scripts.read_string(zipfile.ZipFile(wheel).read(path).decode())
        assert dict(scripts["console_scripts"]) == {
            f"equiseg-{name}": f"equiseg_fast.{name}:main" for name in COMMANDS
        }

    def test_sdist(self, built: Path) -> None:
        (sdist,) = built.glob("*.tar.gz")
        names = {n.partition("/")[2] for n in tarfile.open(sdist).getnames()}
        assert {
            "equiseg_fast/kernels/attention.py",
            "equiseg_fast/py.typed",
            "kernels/attention.py",
            "benchmarks/__main__.py",
            "tests/test_packaging.py",
            "constraints.txt",
            "LICENSE",
        } <= names

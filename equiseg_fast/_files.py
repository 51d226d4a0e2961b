"""Files that are there whole or not at all, and what YAML and JSON hold."""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def beside(path: Path) -> Path:
    """Where `replace_file` writes first, and a kill leaves what was written so far."""
    return path.with_name(f".{path.name}.new")


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside `path`, then put it in its place. Raises OSError naming the path."""
    new = beside(path)
    try:
        with new.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields and values in a YAML file.

    Raises ValueError naming a file that holds anything else, or says something twice, of which
    PyYAML would drop the first; OSError if there is none, ImportError without pyyaml.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f'{path} needs pyyaml: pip install "equiseg-fast[train]"') from error

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise yaml.YAMLError(f"{twice[0]} is there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    _take_numbers(Loader)
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold fields and values; got {type(content).__name__}")
    return dict(content)


def to_yaml(content: Mapping[str, Any]) -> str:
    """Plain values as text that `read_yaml` reads."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    _take_numbers(Dumper)
    return str(yaml.dump(dict(content), Dumper=Dumper, sort_keys=False))


def _take_numbers(cls: Any) -> None:
    """Make numbers of 1e-3, which PyYAML takes for a string, because it has no dot."""
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    cls.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))


def as_json(x: Any) -> Any:
    """A value as JSON and YAML have it: lists for tuples, None for NaN and infinity."""
    if isinstance(x, Mapping):
        return {name: as_json(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [as_json(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x

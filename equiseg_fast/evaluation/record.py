"""What an evaluation has found so far, in a file: so that it can be stopped, and go on."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from equiseg_fast._files import as_json, replace_file
from equiseg_fast.data.folder import SceneFiles
from equiseg_fast.robustness import PROTOCOLS, Condition, Conditioned, summary

FORMAT = 1
METRICS = ("miou", "miou_absent_as_zero")

Result = dict[str, Any]


class Record:
    """The file of results, which holds those of the conditions that are finished.

    what: what results depend on, by name. Raises ValueError for a file of something else.
    """

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self.path, self.what = path, what
        self.facts: dict[str, Any] = {}
        self.results: dict[Condition, Result] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']}")
            theirs = dict(content["what"])
            for result in content["results"]:
                self.results[Condition(**result.pop("condition"))] = {
                    k: _nan_for_none(v) for k, v in result.items()
                }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no evaluation of this version, or damaged ({error}); move it away, or "
                "choose another --out"
            ) from error
        if other := [name for name in what if theirs.get(name) != what[name]]:
            raise ValueError(
                f"{path} is an evaluation with other {', '.join(other)}; choose another --out, or "
                "move it away"
            )

    def add(self, condition: Condition, result: Result) -> None:
        """Keep a result, also if this process is killed right after."""
        self.results[condition] = result
        self.write()

    def write(self) -> None:
        """Write the file so that a kill leaves the old one or the new one."""
        names = self.facts["sensors"]
        # In the order of a whole evaluation, whichever came first.
        order = {protocol: i for i, protocol in enumerate(PROTOCOLS)}
        self.results = dict(sorted(self.results.items(), key=lambda x: order[x[0].protocol]))
        content = {
            "format": FORMAT,
            **self.facts,
            "summary": {
                metric: summary({c: r[metric] for c, r in self.results.items()}, names)
                for metric in METRICS
            },
            "results": [{"condition": c.to_dict(), **r} for c, r in self.results.items()],
            "what": self.what,
        }
        text = json.dumps(as_json(content), indent=1, allow_nan=False) + "\n"
        replace_file(self.path, lambda file: file.write(text.encode()))


def _nan_for_none(x: Any) -> Any:
    if isinstance(x, list):
        return [_nan_for_none(value) for value in x]
    return math.nan if x is None else x


def digest_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of_samples(dataset: Conditioned) -> str:
    """Changes with the number of samples, with what is in the first one, and with any file."""
    sample = dataset.raw(0)
    digest = hashlib.sha256(f"{len(dataset)} {sample.name}".encode())
    for x in (*sample.images.values(), sample.labels):
        if x is not None:
            digest.update(x.contiguous().numpy().tobytes())
    if isinstance(dataset.dataset, SceneFiles):
        for scene in dataset.dataset.scenes:
            for path in (*scene.files.values(), scene.labels):
                if path is not None:
                    facts = path.stat()
                    digest.update(f"{scene.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()

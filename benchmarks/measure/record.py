"""What a run leaves behind: one JSON line per measurement, and the environment it was made in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import equiseg_fast
from benchmarks.cases.common.problem import Shape
from benchmarks.command.outputs import NotWritten, read_json, write
from benchmarks.measure.resume import drop_half_a_line
from benchmarks.measure.timing import FEWEST, WIDEST
from benchmarks.providers.provider import TUNED
from equiseg_fast.models.config import VARIANTS

SCHEMA = 1
UNTIMED = "not timed: the run ended before"
STATUSES = ("ok", "unsupported", "incorrect", "oom", "error")
ENVIRONMENT_VARIABLES = (
    "EQUISEG_FAST_BACKEND",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING",
)
Key = tuple[str, str, str, str, str]


@dataclass
class Record:
    """One provider on one case in one mode. Without status "ok" there are no numbers; with it there
    are no times as long as the reason is `UNTIMED`.

    Times are per call, in microseconds; method is how they were taken. tflops and gbps come from
    the declared minimal FLOPs and bytes, roofline_pct from those and what the device was seen to
    do. For calls timed by wall clock, cpu_us: CPU time of all threads; cpu_share: how much of the
    CPU time of all threads the process got beside them (`timing.cpu_share`). host_us: what the host
    needs to enqueue a call on a GPU. peak_mib: allocated above the state before the call;
    saved_mib: kept for the backward by the forward, nothing in "fwd". first_call_s: the first
    forward without a graph, or else the first step, compilation included. graph_us, events_us:
    medians by replays of a CUDA graph and by events around single calls, of which method is one;
    uncaptured: why there is no graph.
    rms_ratio, max_ratio, budget: see `parity.Accuracy`. config: of earlier versions.
    """

    suite: str
    op: str
    case: dict[str, Any]
    mode: str
    provider: str
    dtype: str
    status: str = "ok"
    reason: str = ""
    method: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    min_us: float | None = None
    n: int = 0
    noisy: bool = False
    tflops: float | None = None
    gbps: float | None = None
    roofline_pct: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    first_call_s: float | None = None
    host_us: float | None = None
    graph_us: float | None = None
    events_us: float | None = None
    uncaptured: str = ""
    cpu_us: float | None = None
    cpu_share: float | None = None
    rms_ratio: float | None = None
    max_ratio: float | None = None
    budget: float | None = None
    config: str = ""
    env_id: str = ""
    schema: int = field(default=SCHEMA)

    @property
    def shape(self) -> Shape:
        return Shape(**self.case)

    @property
    def final(self) -> bool:
        """Whether nothing more will come: timed, or out."""
        return self.p50_us is not None or self.status != "ok"

    @property
    def contended(self) -> bool:
        """Whether others had the CPU: seen beside the call, or in it, which only computes and so
        uses no less CPU than wall time."""
        if self.cpu_share is not None and self.cpu_share < 0.9:
            return True
        return self.cpu_us is not None and self.cpu_us < 0.9 * self.p50_us

    @property
    def settled(self) -> bool:
        """Whether its median may stand alone: enough samples that agree, on a quiet machine."""
        band = self.p80_us - self.p20_us
        return self.n >= FEWEST and band <= WIDEST * self.p50_us and not self.contended

    @property
    def group(self) -> Key:
        """What is compared with one another: everything but the provider."""
        return (self.op, self.shape.label, self.dtype, self.mode, "")

    @property
    def key(self) -> Key:
        """What identifies the measurement between runs."""
        return (self.op, self.shape.label, self.dtype, self.mode, self.provider)


FILE = "results.jsonl"
MACHINE_INFO = "equiseg_fast"
"""Where a `--benchmark-json` file has the environment record, in its `machine_info`."""

_FIELDS = {f.name: f for f in fields(Record)}
_REQUIRED = ("suite", "op", "case", "mode", "provider", "dtype", "status")
_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    "str": ("a string", (str,)),
    "int": ("an integer", (int,)),
    "bool": ("true or false", (bool,)),
    "float | None": ("a number or null", (int, float, type(None))),
    "dict[str, Any]": ("an object", (dict,)),
}
_TIMES = ("p20_us", "p50_us", "p80_us", "min_us")
_SHAPE = tuple(f.name for f in fields(Shape))


class Writer:
    """`results.jsonl` in a folder, growing as rows come; of one measurement the last line counts.

    resume: keep what is there; else it is gone.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.path = folder / FILE
        if not resume or not self.path.is_file():
            self.path.write_text("")
        drop_half_a_line(self.path)

    def add(self, records: Iterable[Record]) -> None:
        """Raises NotWritten."""
        try:
            with self.path.open("a") as file:
                file.write(_lines(records))
        except OSError as error:
            raise NotWritten(error.errno, error.strerror, str(self.path)) from error


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in records)


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    write(path, _lines(records))


def read(path: Path) -> list[Record]:
    """Records of a `results.jsonl`, of the folder of one, or of a `--benchmark-json` file of the
    benchmarks under pytest, told apart by what is in it.

    Raises ValueError naming the file, the place in it, and what is wrong there; FileNotFoundError
    if there is no such file.
    """
    path = _results(path)
    whole = _benchmark_json(path)
    if whole is None:
        return read_jsonl(path, said=partial(print, file=sys.stderr))
    records = []
    for i, entry in enumerate(whole["benchmarks"]):
        entry = entry if isinstance(entry, dict) else {}
        where = f"{path} benchmark {i + 1} ({entry.get('name')})"
        values = entry.get("extra_info")
        if not isinstance(values, dict) or "schema" not in values:
            raise ValueError(f"{where}: extra_info has no record; was it made by another project?")
        records.append(_record(values, where))
    return records


def read_jsonl(path: Path, said: Callable[[str], object] = lambda text: None) -> list[Record]:
    """Records of a `results.jsonl`, or of a folder that holds one, of one measurement the last;
    raises as `read`. said: is told of half a line at the end, which is left out."""
    path = _results(path)
    records: dict[Key, Record] = {}
    text = _text(path)
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            # Whoever wrote it is under way or was killed; an editor may have ended the line.
            half = not text.endswith("\n") or line.startswith('{"suite"')
            if number == len(lines) and half:
                said(f"{where}: half a line, left out")
                break
            raise ValueError(f"{where}: not JSON: {error}") from error
        record = _record(values, where)
        records[record.key] = record
    return list(records.values())


def read_environment(path: Path) -> dict[str, Any]:
    """The environment that the records of `read(path)` were made in: of the `env.json` beside them,
    or of a `--benchmark-json` file itself; empty if it is not known."""
    path = _results(path)
    if whole := _benchmark_json(path):
        return whole.get("machine_info", {}).get(MACHINE_INFO, {})
    beside = path.parent / "env.json"
    return read_json(beside) if beside.is_file() else {}


def _results(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text: {error}") from error


def _benchmark_json(path: Path) -> dict[str, Any] | None:
    """The content of a file of pytest-benchmark; None for any other."""
    try:
        whole = json.loads(_text(path))
    except json.JSONDecodeError:
        return None  # lines of JSON, or none at all
    return whole if isinstance(whole, dict) and isinstance(whole.get("benchmarks"), list) else None


def _record(values: Any, where: str) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be an object; got {type(values).__name__}")
    if wrong := _wrong(values):
        raise ValueError(f"{where}: {wrong}")
    return Record(**values)


def _wrong(values: dict[str, Any]) -> str:
    """What is wrong with the fields of a record; empty if nothing is."""
    if values.get("schema") != SCHEMA:
        return f"schema must be {SCHEMA}; got {values.get('schema')!r}"
    if missing := [name for name in _REQUIRED if name not in values]:
        return f"field {missing[0]!r} is missing"
    if unknown := sorted(set(values) - set(_FIELDS)):
        return f"unknown field {unknown[0]!r}"
    for name, value in values.items():
        allowed, kinds = _KINDS[_FIELDS[name].type]
        if type(value) not in kinds:
            return f"{name} must be {allowed}; got {value!r}"
        if type(value) in (int, float) and not 0 <= value < math.inf:
            return f"{name} must be finite and not negative; got {value}"
        if name in _TIMES and value == 0:
            return f"{name} must be positive; got {value}"
    case = values["case"]
    if values["status"] not in STATUSES:
        return f"status must be one of {', '.join(STATUSES)}; got {values['status']!r}"
    if set(case) != set(_SHAPE):
        return f"case must have {', '.join(_SHAPE)}; got {case!r}"
    if case["variant"] not in VARIANTS:
        return f"variant must be one of {', '.join(VARIANTS)}; got {case['variant']!r}"
    for name in _SHAPE[1:]:
        if not (type(case[name]) is int and case[name] >= (name != "stage")):
            return f"{name} must be a positive integer; got {case[name]!r}"
    return ""


def environment(device: torch.device, limits: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a number depends on, without names of hosts, users or folders.

    limits: what `calibrate.device_limits` measured. load: average number of runnable processes in
    the last minute. `env_id` is a hash of what does not change from run to run.
    """
    env: dict[str, Any] = {
        "package": equiseg_fast.__version__,
        "git_sha": (sha := _git("rev-parse", "HEAD")),
        # Without a repository nobody knows.
        "git_dirty": bool(_git("status", "--porcelain")) if sha else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "variables": {v: os.environ[v] for v in ENVIRONMENT_VARIABLES if v in os.environ},
        "tuned": _tuned_hash(),
        "device": _cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _nvidia_smi(device),
        }
    if limits:
        env["limits"] = limits
    stable = {key: value for key, value in env.items() if key not in ("limits", "load")}
    env["env_id"] = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:12]
    env["utc"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return env


def _tuned_hash() -> str:
    """Of the file of launch configurations; its name would name folders."""
    path = os.environ.get(TUNED)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(Path(__file__).resolve().parent), *arguments)


def _nvidia_smi(device: torch.device) -> str:
    """Driver, clocks, power limit and MIG mode, as the driver's tool prints them."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,mig.mode.current"
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={index}")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""What a run leaves behind: one JSON line per measurement, and the environment it was made in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import equiseg_fast
from benchmarks.cases.common.problem import Shape
from benchmarks.command.outputs import read_json, write
from benchmarks.measure.resume import drop_half_a_line
from benchmarks.measure.timing import FEWEST, WIDEST
from benchmarks.providers.provider import TUNED

FILE = "results.jsonl"
SCHEMA = 1
UNTIMED = "not timed: the run ended before"
DIED = "the process ended while it ran"
NOISY = 0.10
VARIABLES = (
    "EQUISEG_FAST_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip
Key = tuple[str, str, str, str, str]


@dataclass
class Record:
    """One provider on one case in one mode. status: "ok", "unsupported", "incorrect", "oom" or
    "error"; only with the first there are times, unless the reason is `UNTIMED`.

    Times are per call, in microseconds; method is how they were taken. tflops and gbps come from
    the declared minimal FLOPs and bytes, roofline_pct from those and what the device was seen to
    do. For calls timed by wall clock, cpu_us: CPU time of all threads; cpu_share: how much of the
    CPU time of all threads the process got beside them (`timing.cpu_share`). host_us: what the host
    needs to enqueue a call on a GPU. peak_mib: allocated above the state before the call;
    saved_mib: kept for the backward by the forward, nothing in "fwd". graph_us, events_us: medians
    by replays of a CUDA graph and by events around single calls, of which method is one;
    uncaptured: why there is no graph. budget: the largest share of its tolerance that an error of
    an output or gradient used.
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
    tflops: float | None = None
    gbps: float | None = None
    roofline_pct: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    host_us: float | None = None
    graph_us: float | None = None
    events_us: float | None = None
    uncaptured: str = ""
    cpu_us: float | None = None
    cpu_share: float | None = None
    budget: float | None = None
    env_id: str = ""
    schema: int = SCHEMA

    @property
    def shape(self) -> Shape:
        return Shape(**self.case)

    @property
    def final(self) -> bool:
        """Whether nothing more will come: timed, or out."""
        return self.p50_us is not None or self.status != "ok"

    @property
    def band(self) -> float:
        """Of p20 to p80, over the median."""
        return (self.p80_us - self.p20_us) / self.p50_us

    @property
    def noisy(self) -> bool:
        return self.band > NOISY

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
        return self.n >= FEWEST and self.band <= WIDEST and not self.contended

    @property
    def group(self) -> Key:
        """What is compared with one another: everything but the provider."""
        return (self.op, self.shape.label, self.dtype, self.mode, "")

    @property
    def key(self) -> Key:
        """What identifies the measurement between runs."""
        return (self.op, self.shape.label, self.dtype, self.mode, self.provider)


class Writer:
    """`results.jsonl` in a folder, growing as rows come; of one measurement the last line counts.

    resume: keep what is there, which is then `known`; else it is gone. patience: seconds after
    which an attempt ends the process; 0 for any time.
    """

    def __init__(
        self, folder: Path, resume: bool = False, *, env_id: str = "", patience: int = 0
    ) -> None:
        self.path, self.env_id, self.patience = folder / FILE, env_id, patience
        if not resume or not self.path.is_file():
            self.path.write_text("")
        drop_half_a_line(self.path)
        self.known = {row.key: row for row in read(self.path)}

    def add(self, records: Iterable[Record]) -> None:
        """What is not known from before."""
        new = [row for row in records if self.known.get(row.key) is not row]
        for row in new:
            row.env_id = self.env_id
        with self.path.open("a") as file:
            file.write(_lines(new))

    @contextmanager
    def attempt(self, records: Sequence[Record]) -> Iterator[None]:
        """Around what may take the process along or hang: until it is over these records are
        errors, so that whoever goes on does not try it again."""
        self.add(replace(row, status="error", reason=DIED) for row in records)
        if self.patience:
            signal.alarm(self.patience)  # SIGALRM ends also what hangs in a driver
        try:
            yield
        finally:
            if self.patience:
                signal.alarm(0)
            self.add(records)


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in records)


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    write(path, _lines(records))


def read(path: Path) -> list[Record]:
    """Records of a `results.jsonl`, or of the folder of one; of one measurement the last.

    Raises ValueError naming the file, the line, and what is wrong there; FileNotFoundError.
    """
    path = path / FILE if path.is_dir() else path
    records: dict[Key, Record] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(True), start=1):
        try:
            record = _record(json.loads(line))
            records[record.key] = record
        except (TypeError, ValueError) as error:
            where = f"{path} line {number}"
            if line.endswith("\n"):
                raise ValueError(f"{where}: {error}") from error
            # Whoever writes it is under way, or was killed.
            print(f"{where}: half a line, left out", file=sys.stderr)
    return list(records.values())


def _record(values: Any) -> Record:
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}; got {schema!r}")
    for name in ("p20_us", "p50_us", "p80_us"):
        us = values.get(name)
        if us is not None and not 0 <= us < math.inf:
            raise ValueError(f"{name} must be finite and not negative; got {us}")
    names = {field.name for field in fields(Record)}  # results of earlier versions have more
    return Record(**{name: value for name, value in values.items() if name in names})


def read_environment(path: Path) -> dict[str, Any]:
    """Of the `env.json` beside the records that `read(path)` reads; empty without one."""
    beside = (path if path.is_dir() else path.parent) / "env.json"
    return read_json(beside) if beside.is_file() else {}


def environment(device: torch.device, limits: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a number depends on, without names of hosts, users or folders.

    limits: what `calibrate.device_limits` measured. `env_id` is a hash of what does not change from
    run to run.
    """
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    sha = _output(*git, "rev-parse", "HEAD")
    tuned = os.environ.get(TUNED)  # the name of a file, which would name folders
    env: dict[str, Any] = {
        "package": equiseg_fast.__version__,
        "git_sha": sha,
        # Without a repository nobody knows.
        "git_dirty": bool(_output(*git, "status", "--porcelain")) if sha else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "tuned": hashlib.sha256(Path(tuned).read_bytes()).hexdigest()[:12] if tuned else "",
        "device": _cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    if device.type == "cuda":
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        index = torch.cuda.current_device() if device.index is None else device.index
        env |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _output(
                "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={index}"
            ),
        }
    env["env_id"] = hashlib.sha256(json.dumps(env, sort_keys=True).encode()).hexdigest()[:12]
    if limits:
        env["limits"] = limits
    return env | {"utc": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

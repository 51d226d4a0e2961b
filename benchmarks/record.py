"""What a run leaves behind: one JSON line per measurement, and the environment it was made in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import equiseg_fast
from benchmarks.registry import Shape

SCHEMA = 1
STATUSES = ("ok", "unsupported", "incorrect", "oom", "error")
ENVIRONMENT_VARIABLES = (
    "EQUISEG_FAST_BACKEND",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING",
)
Key = tuple[str, str, str, str, str]


@dataclass
class Record:
    """One provider on one case in one mode. Without status "ok" there are no numbers.

    Times are per call, in microseconds; method is how they were taken. tflops and gbps come from
    the declared minimal FLOPs and bytes, roofline_pct from those and what the device was seen to
    do. cpu_us: CPU time of all threads, for calls timed by wall clock; host_us: what the host needs
    to enqueue a call on a GPU. peak_mib: allocated above the state before the call; saved_mib: kept
    for the backward by the forward. first_call_s: the first call for this case, compilation
    included.
    rms_ratio, max_ratio, budget: see `parity.Accuracy`.
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
    cpu_us: float | None = None
    rms_ratio: float | None = None
    max_ratio: float | None = None
    budget: float | None = None
    env_id: str = ""
    schema: int = field(default=SCHEMA)

    @property
    def shape(self) -> Shape:
        return Shape(**self.case)

    @property
    def contended(self) -> bool:
        """Whether others had the CPU: a call that only computes uses no less CPU than wall time."""
        return self.cpu_us is not None and self.cpu_us < 0.9 * self.p50_us

    @property
    def group(self) -> Key:
        """What is compared with one another: everything but the provider."""
        return (self.op, self.shape.label, self.dtype, self.mode, "")

    @property
    def key(self) -> Key:
        """What identifies the measurement between runs."""
        return (self.op, self.shape.label, self.dtype, self.mode, self.provider)


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    lines = [json.dumps(asdict(record), separators=(",", ":")) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def read_jsonl(path: Path) -> list[Record]:
    """Records of a `results.jsonl`, or of a folder that holds one. Raises ValueError naming the
    line on a schema or field this version does not know."""
    if path.is_dir():
        path = path / "results.jsonl"
    known = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        values = json.loads(line)
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"{path.name} line {number}: schema must be {SCHEMA}; got {values.get('schema')!r}"
            )
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path.name} line {number}: unknown field {unknown[0]!r}")
        if values["status"] not in STATUSES:
            raise ValueError(
                f"{path.name} line {number}: status must be one of {', '.join(STATUSES)}; "
                f"got {values['status']!r}"
            )
        records.append(Record(**values))
    return records


def environment(device: torch.device, limits: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a number depends on, without names of hosts, users or folders.

    limits: what `calibrate.device_limits` measured. load: average number of runnable processes in
    the last minute. `env_id` is a hash of what does not change from run to run.
    """
    env: dict[str, Any] = {
        "package": equiseg_fast.__version__,
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "variables": {v: os.environ[v] for v in ENVIRONMENT_VARIABLES if v in os.environ},
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


def _version(package: str) -> str:
    """Version of an installed package without importing it."""
    from importlib.metadata import version

    return version(package) if find_spec(package) else ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

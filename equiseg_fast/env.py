"""`python -m equiseg_fast.env`: versions, devices, usable backends; for bug reports."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from equiseg_fast._version import __version__
from equiseg_fast.ops import _backend

PACKAGES = ("torch", "triton", "numpy", "einops", "transformers")
VARIABLES = ("EQUISEG_FAST_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def package_versions() -> dict[str, str]:
    """Version of each package that matters, "not installed" where there is none."""
    found = {"equiseg_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """One line per device: the CPU, then every CUDA device."""
    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, "
            f"{p.multi_processor_count} SMs, {p.total_memory / 2**30:.1f} GiB"
        )
    return lines


def backends() -> dict[str, str]:
    """Backend -> "usable", or why it is not on the best device here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = _backend.triton_reasons(torch.empty(0, device=device))
    return {
        "triton": f"not usable: {'; '.join(reasons)}" if reasons else "usable",
        "torch": "usable",
        "reference": "usable",
    }


def report() -> str:
    """The whole report as text."""
    lines = ["versions"]
    lines += [f"  {name}: {number}" for name, number in package_versions().items()]
    lines += [f"  cuda (of torch): {torch.version.cuda or 'none'}", "devices"]
    lines += [f"  {line}" for line in devices()]
    lines += ["backends"]
    lines += [f"  {name}: {state}" for name, state in backends().items()]
    lines += ["environment"]
    lines += [f"  {name}: {os.environ.get(name, 'not set')}" for name in VARIABLES]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")

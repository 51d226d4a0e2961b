"""Who is compared: the implementations by name, what each needs, and those every operation has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

TUNED = "EQUISEG_FAST_TUNED"
"""The environment variable that names a file of `python -m benchmarks tune`."""

KERNELS = "kernels are timed on a GPU only"
BACKEND = "PyTorch has this backend on a GPU only"
HALF = "this backend takes fp16 and bf16 only"


@dataclass(frozen=True)
class Provider:
    """One implementation of operations.

    colour: in pictures. package: what must be installed. gpu_only, half_only: why not on a CPU, or
    on a GPU in fp32.
    """

    name: str
    colour: str
    what: str
    package: str = ""
    gpu_only: str = ""
    half_only: str = ""


_SDPA = "scaled_dot_product_attention"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("baseline", "#8c8c8c", "eager PyTorch as public models write it (baselines.py)"),
        Provider("baseline_cl", "#b8b09a", "the baseline with NCHW maps in channels-last memory"),
        Provider("reference", "#4c72b0", "equiseg_fast.reference, the mathematics in PyTorch"),
        Provider("torch", "#dd8452", "backend 'torch', the fastest of stock operators"),
        Provider(
            "triton", "#2a9d4e",
            "backend 'triton'; for models the kernels that exist, stock operators elsewhere",
            "triton", KERNELS,
        ),
        Provider(
            "tuned", "#8bd17c",
            f"triton with the launch configurations of a file (--tuned, {TUNED})",
            "triton", KERNELS,
        ),
        Provider("compile", "#8172b3", "torch.compile of the torch backend"),
        Provider("compile_max", "#b9a7e0", "the same, mode max-autotune-no-cudagraphs"),
        Provider("sdpa_math", "#d9b38c", f"{_SDPA}, written out in matrix products"),
        Provider("sdpa_flash", "#c44e52", f"{_SDPA}, FlashAttention backend", "", "", HALF),
        Provider("sdpa_efficient", "#937860", f"{_SDPA}, memory-efficient backend", "", BACKEND),
        Provider("sdpa_cudnn", "#da8bc3", f"{_SDPA}, cuDNN backend", "", BACKEND, HALF),
        Provider(
            "flex", "#ccb974", "FlexAttention of PyTorch, compiled",
            gpu_only="FlexAttention has no backward on a CPU",
        ),
        Provider("transformers", "#64b5cd", "SegformerModel of transformers", "transformers"),
    )
}  # fmt: skip
OURS = ("torch", "triton", "tuned")
"""What a user of the package gets; everybody else is somebody to be faster than, the reference too:
anybody may write the formula down."""
SDPA = ("sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
"""Backends of PyTorch's attention; a CPU has the first two."""
COMPILED = {"compile": None, "compile_max": "max-autotune-no-cudagraphs"}
"""Providers that `torch.compile` makes, and its mode."""
EVERYWHERE = ("baseline", "reference", *OURS, *COMPILED)
"""Those that every operation has; it names its others."""


def impossible(name: str, device: torch.device, dtype: str = "") -> str:
    """Why a provider is out on every machine with such a device, or on this one for what is not
    installed; empty if it is not. dtype: its short name, "" if it does not matter."""
    provider = PROVIDERS[name]
    if device.type != "cuda" and provider.gpu_only:
        return f"{provider.gpu_only}; the device is {device.type!r}"
    if provider.package and not find_spec(provider.package):
        return f"{provider.package} is not installed"
    if name == "tuned" and not os.environ.get(TUNED):
        return f"no file is named, neither by --tuned nor by {TUNED}"
    return provider.half_only if device.type == "cuda" and dtype == "fp32" else ""


@contextmanager
def configured(provider: str) -> Iterator[None]:
    """Around everything that a provider does, its backward too: whose launch configurations."""
    # Without a file everybody has the default configurations: nothing is to be changed, nor timed.
    if provider not in ("triton", "tuned") or not os.environ.get(TUNED):
        yield
        return
    from equiseg_fast.kernels import _tuned

    with _tuned.use(_tuned.from_environment() if provider == "tuned" else {}):
        yield


def backends(function: Callable[..., Any], baseline: Callable[..., Any]) -> dict[str, Any]:
    """The providers of `EVERYWHERE` for an operation of `equiseg_fast.ops`."""

    def on(backend: str) -> Callable[..., Any]:
        return lambda **inputs: function(**inputs, backend=backend)

    own = {name: on("triton" if name == "tuned" else name) for name in ("reference", *OURS)}
    compiled = {name: _compiled(function, mode) for name, mode in COMPILED.items()}
    return {"baseline": baseline, **own, **compiled}


@cache
def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # One wrapper per function: a new one for every input set would be compiled every time.
    return lazily_compiled(lambda **inputs: function(**inputs, backend="torch"), mode)


def lazily_compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """`torch.compile` of it at the first call; importing the compiler takes seconds."""
    compiled = cache(lambda: torch.compile(function, dynamic=False, mode=mode))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)

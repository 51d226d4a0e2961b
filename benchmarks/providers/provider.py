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
ITS_KERNELS = "its kernels run on a GPU only"
FLASH = "FlashAttention takes fp16 and bf16 only"


@dataclass(frozen=True)
class Provider:
    """One implementation of operations.

    colour: in pictures. everywhere: whether every operation has it; the others are named by the
    operations that have them. ours: whether it is of this package; everybody else is somebody to be
    faster than. package: what must be installed. gpu_only, half_only: why not on a CPU, or on a GPU
    in fp32.
    """

    name: str
    what: str
    colour: str
    everywhere: bool = False
    ours: bool = False
    package: str = ""
    gpu_only: str = ""
    half_only: str = ""


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "baseline", "eager PyTorch as public models write it (providers/baselines.py)",
            "#8c8c8c", everywhere=True,
        ),
        Provider(
            "baseline_cl", "the baseline with its NCHW maps in channels-last memory", "#b8b09a"
        ),
        Provider(
            "reference", "equiseg_fast.reference, the mathematics in plain PyTorch", "#4c72b0",
            everywhere=True, ours=True,
        ),
        Provider(
            "torch", "backend 'torch', the fastest composition of stock operators", "#dd8452",
            everywhere=True, ours=True,
        ),
        Provider(
            "triton",
            "backend 'triton'; for models the kernels that exist, stock operators elsewhere",
            "#2a9d4e", everywhere=True, ours=True, package="triton", gpu_only=KERNELS,
        ),
        Provider(
            "tuned", f"triton with the launch configurations of a file (--tuned, {TUNED})",
            "#8bd17c", everywhere=True, ours=True, package="triton", gpu_only=KERNELS,
        ),
        Provider(
            "compile", "torch.compile of the torch backend", "#8172b3", everywhere=True
        ),
        Provider(
            "compile_max", "torch.compile of the torch backend, mode max-autotune-no-cudagraphs",
            "#b9a7e0", everywhere=True,
        ),
        Provider(
            "sdpa_math", "scaled_dot_product_attention, written out in matrix products", "#d9b38c"
        ),
        Provider(
            "sdpa_flash", "scaled_dot_product_attention, FlashAttention backend", "#c44e52",
            half_only=FLASH,
        ),
        Provider(
            "sdpa_efficient", "scaled_dot_product_attention, memory-efficient backend", "#937860",
            gpu_only="PyTorch has this backend on a GPU only",
        ),
        Provider(
            "sdpa_cudnn", "scaled_dot_product_attention, cuDNN backend", "#da8bc3",
            gpu_only="PyTorch has this backend on a GPU only",
            half_only="cuDNN's attention takes fp16 and bf16 only",
        ),
        Provider(
            "flex", "FlexAttention of PyTorch, compiled", "#ccb974",
            gpu_only="FlexAttention has no backward on a CPU",
        ),
        Provider(
            "flash_attn", "flash_attn_func of the package flash_attn", "#8b1e2b",
            package="flash_attn", gpu_only=ITS_KERNELS, half_only=FLASH,
        ),
        Provider(
            "xformers", "memory_efficient_attention of xformers", "#1f6f8b", package="xformers",
            gpu_only=ITS_KERNELS,
        ),
        Provider(
            "liger", "the kernel of liger_kernel, stock operators around it", "#e377c2",
            package="liger_kernel", gpu_only=ITS_KERNELS,
        ),
        Provider(
            "transformers", "SegformerModel of transformers, eager", "#64b5cd",
            package="transformers",
        ),
    )
}  # fmt: skip
EVERYWHERE = tuple(p.name for p in PROVIDERS.values() if p.everywhere)
OURS = tuple(p.name for p in PROVIDERS.values() if p.ours)
COMPILED = {"compile": None, "compile_max": "max-autotune-no-cudagraphs"}
"""Providers that `torch.compile` makes, and its mode."""


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
    if provider not in ("triton", "tuned"):
        yield
        return
    try:
        from equiseg_fast.kernels import _tuned
    except ImportError:  # `against` an older revision, which has its defaults only
        yield
        return
    with _tuned.use(_tuned.from_environment() if provider == "tuned" else {}):
        yield


def backends(function: Callable[..., Any], baseline: Callable[..., Any]) -> dict[str, Any]:
    """The providers of `EVERYWHERE` for an operation of `equiseg_fast.ops`."""

    def on(backend: str) -> Callable[..., Any]:
        return lambda **inputs: function(**inputs, backend=backend)

    ours = {name: on("triton" if name == "tuned" else name) for name in OURS}
    compiled = {name: _compiled(function, mode) for name, mode in COMPILED.items()}
    return {"baseline": baseline, **ours, **compiled}


@cache
def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # One wrapper per function: a new one for every input set would be compiled every time.
    return lazily_compiled(lambda **inputs: function(**inputs, backend="torch"), mode)


def lazily_compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """`torch.compile` of it at the first call; importing the compiler takes seconds."""
    compiled = cache(lambda: torch.compile(function, dynamic=False, mode=mode))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)

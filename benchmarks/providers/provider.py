"""Who is compared: the implementations by name, what each needs, and those every operation has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

PROVIDERS = {
    "baseline": "eager PyTorch as public models write it (benchmarks/providers/baselines.py)",
    "baseline_cl": "the baseline with its NCHW maps in channels-last memory",
    "reference": "equiseg_fast.reference, the mathematics in plain PyTorch",
    "torch": "backend 'torch', the fastest composition of stock operators",
    "triton": "backend 'triton'; for models the kernels that exist, stock operators elsewhere",
    "tuned": "triton with the launch configurations of a file (--tuned, EQUISEG_FAST_TUNED)",
    "compile": "torch.compile of the torch backend",
    "compile_max": "torch.compile of the torch backend, mode max-autotune-no-cudagraphs",
    "sdpa_math": "scaled_dot_product_attention, written out in matrix products",
    "sdpa_flash": "scaled_dot_product_attention, FlashAttention backend",
    "sdpa_efficient": "scaled_dot_product_attention, memory-efficient backend",
    "sdpa_cudnn": "scaled_dot_product_attention, cuDNN backend",
    "flex": "FlexAttention of PyTorch, compiled",
    "flash_attn": "flash_attn_func of the package flash_attn",
    "xformers": "memory_efficient_attention of xformers",
    "liger": "the kernel of liger_kernel, stock operators around it",
    "transformers": "SegformerModel of transformers, eager",
}

TUNED = "EQUISEG_FAST_TUNED"
"""The environment variable that names a file of `python -m benchmarks tune`."""

OURS = ("reference", "torch", "triton", "tuned")
"""What this package is; everybody else is somebody to be faster than."""

EVERYWHERE = ("baseline", "reference", "torch", "triton", "tuned", "compile", "compile_max")
"""What every operation has. The others are named by the operations that have them."""

COMPILED = {"compile": None, "compile_max": "max-autotune-no-cudagraphs"}
"""Providers that `torch.compile` makes, and its mode."""

_PACKAGES = {
    "triton": "triton",
    "tuned": "triton",
    "flash_attn": "flash_attn",
    "xformers": "xformers",
    "liger": "liger_kernel",
    "transformers": "transformers",
}
_GPU_ONLY = {
    "triton": "kernels are timed on a GPU only",
    "tuned": "kernels are timed on a GPU only",
    "sdpa_efficient": "PyTorch has this backend on a GPU only",
    "sdpa_cudnn": "PyTorch has this backend on a GPU only",
    "flex": "FlexAttention has no backward on a CPU",
    "flash_attn": "its kernels run on a GPU only",
    "xformers": "its kernels run on a GPU only",
    "liger": "its kernels run on a GPU only",
}
_HALF_ON_GPU = {
    "sdpa_flash": "FlashAttention takes fp16 and bf16 only",
    "sdpa_cudnn": "cuDNN's attention takes fp16 and bf16 only",
    "flash_attn": "FlashAttention takes fp16 and bf16 only",
}


def impossible(provider: str, device: torch.device, dtype: str = "") -> str:
    """Why a provider is out on every machine with such a device, or on this one for what is not
    installed; empty if it is not. dtype: its short name, "" if it does not matter."""
    package = _PACKAGES.get(provider)
    if device.type != "cuda" and provider in _GPU_ONLY:
        return f"{_GPU_ONLY[provider]}; the device is {device.type!r}"
    if package and not find_spec(package):
        return f"{package} is not installed"
    if provider == "tuned" and not os.environ.get(TUNED):
        return f"no file is named, neither by --tuned nor by {TUNED}"
    if device.type == "cuda" and dtype == "fp32":
        return _HALF_ON_GPU.get(provider, "")
    return ""


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

    return {
        "baseline": baseline,
        "reference": on("reference"),
        "torch": on("torch"),
        "triton": on("triton"),
        "tuned": on("triton"),
        **{name: _compiled(function, mode) for name, mode in COMPILED.items()},
    }


@cache
def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # One wrapper per function: a new one for every input set would be compiled every time.
    return lazily_compiled(lambda **inputs: function(**inputs, backend="torch"), mode)


def lazily_compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile` of it at the first call; importing the compiler takes seconds."""
    compiled = cache(lambda: torch.compile(function, dynamic=False, mode=mode))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)

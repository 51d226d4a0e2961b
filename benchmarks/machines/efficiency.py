"""How well kernels are assumed to do on a GPU: every assumption behind a predicted time, by name.

A kernel takes the longest of what it needs from each unit of the GPU, at the share of the unit's
rate that its kind is assumed to reach, and a gap before the next. Nothing here was measured on the
kernels themselves; `judgement` says after a run what the shares should have been.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.machines import gpus
from benchmarks.measure.kernel_work import Kernel


@dataclass(frozen=True)
class Rates:
    """What a GPU can sustain, per second. products: FLOPs of a large bf16 product, fp32: without
    tensor cores. tensor, exps, issue: FLOPs, exponentials and instructions of all lanes at the
    clock under load. origin: of bandwidth and products."""

    bandwidth: float
    products: float
    fp32: float
    tensor: float
    exps: float
    issue: float
    num_sms: int
    origin: str


LANES = 128
"""Instructions that an SM can issue per clock, counted for every lane."""
CLOCK_UNDER_LOAD = 0.96
SEEN = {"h200": (4.3e12, 790e12), "h100": (3.0e12, 798e12)}
"""Bytes per second of a copy and FLOP/s of a bf16 product that such machines have shown."""
ATTAINABLE = (0.895, 0.80)
"""The same as shares of the datasheet, for a GPU that nobody has seen: those of the two above."""


def rates(name: str) -> Rates:
    """Of one of `gpus.GPUS`. Raises ValueError listing them for another name."""
    gpu = gpus.by_name(name)
    clock = CLOCK_UNDER_LOAD * gpu.clock
    bandwidth, products = (
        share * peak
        for share, peak in zip(ATTAINABLE, (gpu.bandwidth, gpu.peak["bf16"]), strict=True)
    )
    origin = "shares of the datasheet"
    if name.lower() in SEEN:
        (bandwidth, products), origin = SEEN[name.lower()], "seen on such a machine"
    return Rates(
        bandwidth, products, CLOCK_UNDER_LOAD * gpu.peak["fp32"],
        gpu.tensor * gpu.num_sms * clock, CLOCK_UNDER_LOAD * gpu.exps,
        LANES * gpu.num_sms * clock, gpu.num_sms, origin,
    )  # fmt: skip


@dataclass(frozen=True)
class Assumption:
    """unit: what the share is of: "memory" (bandwidth), "products" (tensor cores as a large product
    sustains them, or FP32 lanes), "issue" (instruction slots), "scores" (the slower of tensor
    cores and exponentials at their peak), or "gap", where `value` is no share but microseconds."""

    unit: str
    value: float

    @property
    def text(self) -> str:
        return self.show(self.value)

    def show(self, value: float) -> str:
        if self.unit == "gap":
            return f"{value:.2g} us"
        return f"{100 * value:.0f} % of {_UNITS[self.unit]}"


_UNITS = {
    "memory": "copy bandwidth",
    "products": "a large product",
    "issue": "the issue slots",
    "scores": "its bound",
}

GAP = "launch gap"
ASSUMPTIONS = {
    "HBM of our kernels": Assumption("memory", 0.80),
    "issue slots of our kernels": Assumption("issue", 0.75),
    "attention forward D=32": Assumption("scores", 0.56),
    "attention forward D=64": Assumption("scores", 0.44),
    "attention backward D=32": Assumption("scores", 0.31),
    "attention backward D=64": Assumption("scores", 0.31),
    "SDPA forward D=32": Assumption("scores", 0.41),
    "SDPA forward D=64": Assumption("scores", 0.34),
    "SDPA backward": Assumption("scores", 0.26),
    "GEMM, memory": Assumption("memory", 0.80),
    "GEMM, tensor cores": Assumption("products", 0.70),
    "weight-gradient GEMM, memory": Assumption("memory", 0.70),
    "weight-gradient GEMM, tensor cores": Assumption("products", 0.55),
    "convolution, memory": Assumption("memory", 0.50),
    "convolution, tensor cores": Assumption("products", 0.50),
    "stock stencil, memory": Assumption("memory", 0.40),
    "stock stencil, issue slots": Assumption("issue", 1.0),
    "stock pointwise": Assumption("memory", 0.85),
    "stock reduction": Assumption("memory", 0.75),
    "transposing copy": Assumption("memory", 0.55),
    "LayerNorm forward": Assumption("memory", 0.80),
    "LayerNorm backward": Assumption("memory", 0.55),
    "BatchNorm": Assumption("memory", 0.60),
    "bilinear backward": Assumption("memory", 0.25),
    GAP: Assumption("gap", 1.5),
}

KINDS: dict[str, tuple[str, ...]] = {
    "ours": ("HBM of our kernels", "issue slots of our kernels"),
    "GEMM": ("GEMM, memory", "GEMM, tensor cores"),
    "weight-gradient GEMM": ("weight-gradient GEMM, memory", "weight-gradient GEMM, tensor cores"),
    "convolution": ("convolution, memory", "convolution, tensor cores"),
    "stencil": ("stock stencil, memory", "stock stencil, issue slots"),
    "pointwise": ("stock pointwise",),
    "interpolation": ("stock pointwise",),
    "reduction": ("stock reduction",),
    "transposing copy": ("transposing copy",),
    "LayerNorm forward": ("LayerNorm forward",),
    "LayerNorm backward": ("LayerNorm backward",),
    "BatchNorm": ("BatchNorm",),
    "bilinear backward": ("bilinear backward",),
    **{
        name: (name, "HBM of our kernels" if name.startswith("attention") else "stock pointwise")
        for name, a in ASSUMPTIONS.items()
        if a.unit == "scores"
    },
}
"""What limits each kind of kernel; products and exponentials of attention have kinds of their own.
"""


def needed(kernel: Kernel, unit: str, rates: Rates) -> float:
    """Seconds that a unit needs at its full rate."""
    if unit == "memory":
        return kernel.bytes / rates.bandwidth
    if unit == "products":
        return kernel.matrix / rates.products + kernel.vector / rates.fp32
    if unit == "issue":
        return kernel.slots / rates.issue
    # A grid with fewer programs than there are SMs leaves some of them idle.
    idle = max(1.0, rates.num_sms / kernel.programs) if kernel.programs else 1.0
    products = kernel.matrix / rates.tensor + kernel.vector / rates.fp32
    return idle * max(products, kernel.exps / rates.exps)


def limit(kernel: Kernel, rates: Rates) -> tuple[str, float]:
    """The assumption that decides how long a kernel takes, and seconds without the gap."""
    times = {
        name: needed(kernel, ASSUMPTIONS[name].unit, rates) / ASSUMPTIONS[name].value
        for name in KINDS[kernel.kind]
    }
    longest = max(times, key=lambda name: times[name])
    return longest, times[longest]


def predict(kernels: Iterable[Kernel], rates: Rates) -> dict[str, float]:
    """Microseconds of kernels one after the other, by assumption; the sum is the time."""
    spent: dict[str, float] = {}
    for kernel in kernels:
        name, seconds = limit(kernel, rates)
        spent[name] = spent.get(name, 0.0) + 1e6 * seconds
        spent[GAP] = spent.get(GAP, 0.0) + ASSUMPTIONS[GAP].value
    return spent

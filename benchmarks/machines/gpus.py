"""Peaks of NVIDIA GPUs as published: dense, not with sparsity; tensor cores accumulate in FP32.

Figures are the vendor's, checked against public copies of the documents named in `source`; what
such copies do not agree on is None or named in `unconfirmed`. Exponentials: 16 per clock and SM on
all of them (CUDA C++ Programming Guide, throughput of arithmetic instructions; the papers of
FlashAttention-3 and -4 count the same for H100 and B200), at the clock of the tensor peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.cases.common.cost import Limits

EXPS_PER_CLOCK = 16


@dataclass(frozen=True)
class Gpu:
    """device: a part of the name that PyTorch gives it, in lower case. capability: of CUDA. clock:
    Hz behind the tensor peak. bandwidth: bytes per second. peak: FLOP/s by name, "tf32" is FP32
    inputs on tensor cores and "fp32" without them. l2: bytes. tensor: FLOPs per clock and SM, bf16.
    """

    title: str
    device: tuple[str, ...]
    capability: int
    num_sms: int
    clock: float
    bandwidth: float
    tensor: int
    peak: dict[str, float] = field(hash=False)
    source: str = ""
    l2: float | None = None
    unconfirmed: str = ""

    @property
    def exps(self) -> float:
        """Exponentials per second."""
        return EXPS_PER_CLOCK * self.num_sms * self.clock

    @property
    def limits(self) -> Limits:
        return Limits(self.bandwidth, dict(self.peak), self.exps)


def _peak(half: float, tf32: float, fp32: float) -> dict[str, float]:
    """From TFLOP/s."""
    return {"bf16": half * 1e12, "fp16": half * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


_HOPPER = _peak(989.4, 494.7, 66.9)
_AMPERE = _peak(312, 156, 19.5)
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021) and architecture whitepaper (2020)"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper (2022)"
MB, TB = 1e6, 1e12

GPUS = {
    "h200": Gpu(
        "H200 SXM", ("h200",), 90, 132, 1.83e9, 4.8 * TB, 4096, _HOPPER,
        "NVIDIA H200 Tensor Core GPU datasheet (2023); compute as H100 SXM",
    ),
    "h100": Gpu(
        "H100 SXM", ("h100 80gb hbm3", "h100 sxm"), 90, 132, 1.83e9, 3.35 * TB, 4096, _HOPPER,
        _H100, 50 * MB,
    ),
    "h100-pcie": Gpu(
        "H100 PCIe", ("h100 pcie",), 90, 114, 1.62e9, 2.0 * TB, 4096, _peak(756, 378, 51.2),
        _H100, 50 * MB,
    ),
    "a100": Gpu(
        "A100 SXM 80 GB", ("a100-sxm4-80gb",), 80, 108, 1.41e9, 2.039 * TB, 2048, _AMPERE, _A100,
        40 * MB,
    ),
    "a100-pcie": Gpu(
        "A100 PCIe 80 GB", ("a100 80gb pcie",), 80, 108, 1.41e9, 1.935 * TB, 2048, _AMPERE, _A100,
        40 * MB,
    ),
    "a100-40": Gpu(
        "A100 40 GB", ("a100-sxm4-40gb", "a100-pcie-40gb"), 80, 108, 1.41e9, 1.555 * TB, 2048,
        _AMPERE, _A100, 40 * MB,
    ),
    "b200": Gpu(
        "B200 SXM (HGX, 1000 W)", ("b200",), 100, 148, 1.86e9, 8.0 * TB, 8192,
        _peak(2250, 1100, 80), "NVIDIA Blackwell HGX B200 datasheet (2024)", None,
        "bandwidth (7.7 TB/s in HGX systems by some sources), FP32 (75 from SMs and clock)",
    ),
    "l40s": Gpu(
        "L40S", ("l40s",), 89, 142, 2.49e9, 0.864 * TB, 1024, _peak(362.05, 183, 91.6),
        "NVIDIA L40S datasheet (2023)",
    ),
    "rtx4090": Gpu(
        "GeForce RTX 4090", ("rtx 4090",), 89, 128, 2.52e9, 1.008 * TB, 512,
        _peak(165.2, 82.6, 82.6), "NVIDIA Ada GPU architecture whitepaper (2022)", 72 * MB,
    ),
    "rtx5090": Gpu(
        "GeForce RTX 5090", ("rtx 5090",), 120, 170, 2.407e9, 1.792 * TB, 512,
        _peak(209.5, 104.8, 104.8), "NVIDIA RTX Blackwell GPU architecture whitepaper (2025)",
        96 * MB, "TF32 and dense bf16 (a quarter of the published sparse FP16 figure)",
    ),
}  # fmt: skip


def by_name(name: str) -> Gpu:
    """Raises ValueError listing the names for one that does not exist."""
    if name.lower() not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}; got {name!r}")
    return GPUS[name.lower()]


def of_device(device_name: str) -> Gpu | None:
    """The GPU that PyTorch calls so, e.g. "NVIDIA A100-SXM4-80GB"; None if it is not listed."""
    words = device_name.lower()
    return next((gpu for gpu in GPUS.values() if any(part in words for part in gpu.device)), None)

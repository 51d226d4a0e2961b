"""Peaks of NVIDIA GPUs as published: dense, not with sparsity; tensor cores accumulate in FP32.

Figures are the vendor's, checked against public copies of the documents named in `source`.
Exponentials: 16 per clock and SM on all of them (CUDA C++ Programming Guide, throughput of
arithmetic instructions; the papers of FlashAttention-3 and -4 count the same for H100 and B200).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases.common.cost import Limits


@dataclass(frozen=True)
class Gpu:
    """device: parts of the names that PyTorch gives it, in lower case. capability: of CUDA. clock:
    Hz behind the tensor peak. bandwidth: bytes per second. peak: FLOP/s by dtype, "fp32" without
    tensor cores."""

    title: str
    device: tuple[str, ...]
    capability: int
    num_sms: int
    clock: float
    bandwidth: float
    peak: dict[str, float]
    source: str

    @property
    def limits(self) -> Limits:
        return Limits(self.bandwidth, self.peak, 16 * self.num_sms * self.clock)


def _peak(half: float, fp32: float) -> dict[str, float]:
    """From TFLOP/s."""
    return {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": fp32 * 1e12}


_HOPPER, _AMPERE = _peak(989.4, 66.9), _peak(312, 19.5)
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021) and architecture whitepaper (2020)"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper (2022)"

GPUS = {
    "h200": Gpu(
        "H200 SXM", ("h200",), 90, 132, 1.83e9, 4.8e12, _HOPPER,
        "NVIDIA H200 Tensor Core GPU datasheet (2023); compute as H100 SXM",
    ),
    "h100": Gpu(
        "H100 SXM", ("h100 80gb hbm3", "h100 sxm"), 90, 132, 1.83e9, 3.35e12, _HOPPER, _H100
    ),
    "h100-pcie": Gpu(
        "H100 PCIe", ("h100 pcie",), 90, 114, 1.62e9, 2.0e12, _peak(756, 51.2), _H100
    ),
    "a100": Gpu(
        "A100 SXM 80 GB", ("a100-sxm4-80gb",), 80, 108, 1.41e9, 2.039e12, _AMPERE, _A100
    ),
    "b200": Gpu(
        "B200 SXM (HGX, 1000 W)", ("b200",), 100, 148, 1.86e9, 8.0e12, _peak(2250, 80),
        "NVIDIA Blackwell HGX B200 datasheet (2024); unconfirmed: bandwidth (7.7 TB/s in HGX "
        "systems by some sources), FP32 (75 from SMs and clock)",
    ),
    "l40s": Gpu(
        "L40S", ("l40s",), 89, 142, 2.49e9, 0.864e12, _peak(362.05, 91.6),
        "NVIDIA L40S datasheet (2023)",
    ),
    "rtx4090": Gpu(
        "GeForce RTX 4090", ("rtx 4090",), 89, 128, 2.52e9, 1.008e12, _peak(165.2, 82.6),
        "NVIDIA Ada GPU architecture whitepaper (2022)",
    ),
    "rtx5090": Gpu(
        "GeForce RTX 5090", ("rtx 5090",), 120, 170, 2.407e9, 1.792e12, _peak(209.5, 104.8),
        "NVIDIA RTX Blackwell GPU architecture whitepaper (2025); unconfirmed: dense bf16 (a "
        "quarter of the published sparse FP16 figure)",
    ),
}  # fmt: skip


def of_device(device_name: str) -> Gpu | None:
    """The GPU that PyTorch calls so, e.g. "NVIDIA A100-SXM4-80GB"; None if it is not listed."""
    words = device_name.lower()
    return next((gpu for gpu in GPUS.values() if any(part in words for part in gpu.device)), None)

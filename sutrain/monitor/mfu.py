"""Model FLOP/s utilisation, and what it is measured against.

MFU = FLOPs the model needs for a token x tokens/s / peak FLOP/s (arXiv 2204.02311, appendix B). The peak is
the *dense* bf16 rate (vendors like to print the rate with 2:4 sparsity, twice as high). A device not in
the table, a CPU above all or a slice of a GPU (MIG), is measured instead: the ratio is then relative to a large
matrix product in torch on this very device, and `Peak.source` says so wherever the number is shown.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

# Dense bf16 matrix TFLOP/s (fp16 where a chip has no bf16), and the vendor's document.  The first entry whose
# words all stand in the device's name wins, so variants come before the plain name.
PEAK_TFLOPS: tuple[tuple[str, float, str], ...] = (
    ("GB200", 2500, "NVIDIA GB200 NVL72 data sheet, 5000 with sparsity"),
    ("B200", 2250, "NVIDIA DGX B200 data sheet, 36000 with sparsity for 8"),
    ("GH200", 989.4, "NVIDIA GH200 data sheet, 1979 with sparsity"),
    ("H200 NVL", 835.5, "NVIDIA H200 data sheet, 1671 with sparsity"),
    ("H200", 989.4, "NVIDIA H200 data sheet, 1979 with sparsity"),
    ("H100 NVL", 835.5, "NVIDIA H100 data sheet, 1671 with sparsity"),
    ("H100 PCIe", 756.5, "NVIDIA H100 data sheet, 1513 with sparsity"),
    ("H100", 989.4, "NVIDIA H100 data sheet, 1979 with sparsity"),
    ("H800", 989.4, "as H100; only the links are slower"),
    ("H20", 148, "NVIDIA H20 data sheet"),
    ("A100", 312, "NVIDIA A100 data sheet"),
    ("A800", 312, "as A100; only the links are slower"),
    ("A40", 149.7, "NVIDIA A40 data sheet"),
    ("A30", 165, "NVIDIA A30 data sheet"),
    ("A10G", 70, "NVIDIA A10G data sheet, 140 with sparsity"),
    ("A10", 125, "NVIDIA A10 data sheet"),
    ("L40S", 362, "NVIDIA L40S data sheet, 733 with sparsity"),
    ("L40", 181, "NVIDIA L40 data sheet, 362 with sparsity"),
    ("L4", 121, "NVIDIA L4 data sheet, 242 with sparsity"),
    ("RTX 4090", 165.2, "NVIDIA Ada architecture paper, fp32 accumulation"),
    ("RTX 3090", 71.2, "NVIDIA GA102 architecture paper, fp32 accumulation"),
    ("V100-PCIE", 112, "NVIDIA V100 data sheet, fp16"),
    ("V100", 125, "NVIDIA V100 data sheet, fp16"),
    ("T4", 65, "NVIDIA T4 data sheet, fp16"),
    ("MI325X", 1307.4, "AMD Instinct MI325X data sheet"),
    ("MI300X", 1307.4, "AMD Instinct MI300X data sheet"),
    ("MI250X", 191.5, "AMD Instinct MI250X data sheet, per compute die (what torch calls a device)"),
)


_CPU_SECONDS = 0.15


@dataclass(frozen=True)
class Peak:
    """The rate that MFU is relative to: of ONE device or process, and where the number comes from."""

    flops_per_second: float
    source: str


def vendor_peak(device_name: str) -> Peak | None:
    """Dense bf16 peak of a device by its name as torch reports it, or None for one not in the table.

    Model numbers are compared as words: "NVIDIA L4" is not an L40S, and "NVIDIA A100-SXM4-80GB" is an A100. A slice
    of a chip, "NVIDIA H200 MIG 1g.18gb", is in no table: the whole chip's peak would be many times what it can reach.
    """
    words = device_name.upper().replace("-", " ").split()
    if "MIG" in words:
        return None
    for model, tflops, source in PEAK_TFLOPS:
        if all(word in words for word in model.upper().replace("-", " ").split()):
            return Peak(tflops * 1e12, f"{model}, dense bf16, {tflops:g} TFLOP/s ({source})")
    return None


def measured_peak(device: Any, dtype: Any, size: int = 1024, seconds: float = 0.3) -> Peak:
    """Best rate of a `size` x `size` matrix product in torch on `device`, within `seconds` of trying.

    On a CPU call it on one rank only, with the threads that rank will train with, while the other ranks are
    idle or at the same work, whichever the run will look like: ranks share the cores.
    """
    import torch

    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    accelerator = getattr(torch, a.device.type, None)
    synchronize = getattr(accelerator, "synchronize", lambda: None)
    a @ b  # the first product also sets up the library
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    rate = 2 * size**3 / best
    kind = str(dtype).removeprefix("torch.")
    return Peak(rate, f"{kind} matrix product measured on this {a.device.type}, {rate / 1e12:.3g} TFLOP/s")


def device_peak(device: Any, dtype: Any) -> Peak:
    """The vendor's figure for an accelerator in the table, the measured rate for everything else."""
    import torch

    if torch.device(device).type == "cuda":
        known = vendor_peak(torch.cuda.get_device_name(device))
        if known:
            return known
    if torch.device(device).type != "cpu":
        return measured_peak(device, dtype, 8192)
    # A core reaches its best rate while the matrices fit its cache, which two cores may share. The larger product
    # has to be a short one too: where a precision is emulated it takes a quarter of a second, at every start.
    small = measured_peak(device, dtype, 512, seconds=_CPU_SECONDS)
    if 2 * 1024**3 / small.flops_per_second > _CPU_SECONDS:
        return small
    large = measured_peak(device, dtype, 1024, seconds=_CPU_SECONDS)
    return max(small, large, key=lambda peak: peak.flops_per_second)


def mfu_ratio(flops_per_token: float, tokens_per_second: float, peak_flops_per_second: float) -> float:
    """Share of the peak that goes into the model's own arithmetic.

    `flops_per_token` counts forward and backward of the model as defined (recomputation is not counted);
    `tokens_per_second` is of all ranks and `peak_flops_per_second` the sum over all ranks.
    """
    return flops_per_token * tokens_per_second / peak_flops_per_second

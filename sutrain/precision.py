"""Which precision a run computes in where the configuration leaves it open, which choices the engine cannot train in,
and what a slow one costs.

Without instructions for bf16 a processor multiplies matrices in it at about a sixth of its rate in fp32 (LOG.md), so
that what takes minutes on one machine would take an hour on the next.
"""

from __future__ import annotations

import os

import torch

_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of torch.cpu.get_capabilities(), the last one of ARM: with any of them a matrix product in bf16 is fast."""


def multiplies_bf16() -> bool:
    """Has the device of a rank on this machine instructions for matrix products in bf16?"""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.accelerator.is_available():
        # CUDA alone has devices without (before compute capability 8.0); torch would emulate it there.
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(name, False) for name in _CPU_BF16)


def resolve(precision: str) -> str:
    """`auto` as what it stands for on this machine: bf16 where it is fast, fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16() else "fp32"


def impossible_precisions(precision: str, gradients: str, stage: int, offload: bool) -> list[str]:
    """A line for each reason why the engine cannot train so at this ZeRO stage; `gradients` is their precision."""
    problems = []
    if stage == 0 and precision != "fp32" and gradients == "fp32":
        problems.append(
            f"zero.stage 0 accumulates {precision} gradients in {precision} only: "
            f"use stage 1, or gradient_precision {precision}"
        )
    if gradients not in ("fp32", precision):
        problems.append(f"gradient_precision {gradients} needs precision {gradients}")
    if offload and stage in (1, 2) and (precision, gradients) == ("fp16", "fp32"):
        problems.append(
            f"zero.offload at stage {stage} never recovers from an overflow of fp16 with fp32 gradients: "
            "use stage 3, gradient_precision fp16, or precision bf16"
        )
    return problems


def remark(precision: str) -> str:
    """What a user should know about this precision on this machine; mostly nothing."""
    if precision != "bf16" or multiplies_bf16():
        return ""
    return "warning: this device has no instructions for bf16 and computes in it several times slower: precision fp32"

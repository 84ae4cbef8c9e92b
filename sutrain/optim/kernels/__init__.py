"""The passes of the optimizers over weights, gradients and state, in two forms with the same methods."""

from __future__ import annotations

import os
import warnings

import torch

from .compiled import CompiledKernels, KernelError
from .eager import EagerKernels
from .layout import Factors, Layout, State

KERNELS = ("auto", "compiled", "triton", "eager")

__all__ = ["KERNELS", "CompiledKernels", "EagerKernels", "Factors", "KernelError", "Layout", "build_kernels"]


def build_kernels(
    choice: str, layout: Layout, device: torch.device, first: State, second: State
) -> CompiledKernels | EagerKernels:
    """auto: compiled where the masters are on the CPU and a C++ compiler works (where it does not, a warning says so),
    else eager. compiled, triton: that or KernelError; triton has never run on a GPU and is not chosen by auto.

    first, second: the optimizer's two kinds of state, see EagerKernels.
    """
    if choice == "compiled" and device.type != "cpu":
        raise KernelError(f"kernels compiled is for masters on the CPU, these are on {device}: use auto")
    if choice == "triton":
        try:
            from .gpu import TritonKernels  # there is no Triton in torch's CPU build
        except ImportError as error:
            raise KernelError(f"kernels triton: {error}; it comes with torch's CUDA build") from None
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelError("kernels triton is for masters on a GPU, these are on the CPU: use auto")
        return TritonKernels(layout, first, second)  # type: ignore[return-value]
    if choice == "eager" or device.type != "cpu":
        return EagerKernels(layout, first, second)
    try:
        return CompiledKernels(layout, first, second)
    except KernelError as error:
        if choice == "compiled":
            raise
        warnings.warn(
            f"the optimizer runs without compiled kernels, several times slower: {error}", stacklevel=2
        )
        return EagerKernels(layout, first, second)

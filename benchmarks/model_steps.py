"""One step of training for benchmarks/model.py: its time, the trunk's share of it, and the memory it takes."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from pathlib import Path

import torch

from benchmarks.model_peers import Batch, Contender
from sutrain.monitor.mfu import measured_peak


class Runner:
    """A contender in training on one batch: called, it makes one step and notes how long the trunk took.

    The first call makes the optimizer's state (and compiles), the second notes the memory: the two that `take_turns`
    does not count.
    """

    def __init__(self, contender: Contender, batch: Batch, compile_layers: bool = False) -> None:
        self.contender, self.batch = contender, batch
        self.device = batch.tokens_BL.device
        contender.model.to(self.device, torch.bfloat16).train()
        if compile_layers:
            for layer in contender.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-3, fused=True)
        self.calls, self.peak_bytes, self.trunk_seconds = 0, 0, []  # type: ignore[var-annotated]

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        before = start_of_peak(self.device) if self.calls == 1 else 0
        trunk, loss = self.step()
        if self.calls == 1:
            self.peak_bytes = peak(self.device) - before
        if self.calls > 1:
            self.trunk_seconds.append(trunk)
        self.calls += 1
        return loss

    def step(self) -> tuple[float, float]:
        """Seconds of the trunk, and the loss."""
        at = [self.now()]
        hidden_BLD = self.contender.trunk(self.batch)
        at.append(self.now())
        boundary_BLD = hidden_BLD.detach().requires_grad_()
        loss = self.contender.head(boundary_BLD, self.batch)
        loss.backward()
        at.append(self.now())
        hidden_BLD.backward(boundary_BLD.grad)
        at.append(self.now())
        self.optimizer.step()
        if not math.isfinite(found := loss.item()):
            raise ValueError(f"the loss of {type(self.contender.model).__name__} is {found}")
        return at[1] - at[0] + at[3] - at[2], found

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_of_peak(device: torch.device) -> int:
    """Bytes held now; from here on the peak is watched."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what was freed goes back, or a step would find its memory there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product: what the machine gives to a model at the very most."""
    size = 8192 if device.type == "cuda" else 2048
    return measured_peak(device, torch.bfloat16, size, seconds=2.0).flops_per_second

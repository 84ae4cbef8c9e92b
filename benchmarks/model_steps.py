"""One step of training for benchmarks/model.py: its time, the trunk's share of it, and the memory it takes."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks.model_peers import Batch, Contender
from sutrain.monitor.mfu import measured_peak


class Runner:
    """A contender in training on one batch: called, it makes one step and notes how long the trunk took.

    The first call makes the optimizer's state (and compiles), the second, of three steps, notes the memory: the calls
    that `take_turns` does not count.
    """

    def __init__(self, contender: Contender, batch: Batch, compile_layers: bool = False) -> None:
        self.contender, self.batch = contender, batch
        self.device = batch.tokens_BL.device
        contender.model.to(self.device, torch.bfloat16).train()
        if compile_layers:
            for layer in contender.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-3, fused=True)
        self.calls, self.trunk_seconds = 0, []  # type: ignore[var-annotated]
        self.tensor_bytes, self.resident_bytes = 0, None  # what a step needs beside weights and optimizer

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        if self.calls == 1:  # gradients are the step's
            self.resident_bytes = peak_resident_bytes(self.device, self.step)
            self.optimizer.zero_grad()
            self.tensor_bytes = peak_tensor_bytes(self.device, self.step)
            self.optimizer.zero_grad()
        trunk, loss = self.step()
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

    def mebibytes(self) -> tuple[float, float | None]:
        """What a step needs: of tensors, and of resident memory if known."""
        return self.tensor_bytes / 2**20, None if self.resident_bytes is None else self.resident_bytes / 2**20

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tensor_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """Bytes of all tensors that `step` makes, as many as there are at once at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    # Not profile.events(), which gives what an operator allocates to the operator, without the time.
    events = profile.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in sizes), initial=0))


def peak_resident_bytes(device: torch.device, step: Callable[[], object]) -> int | None:
    """By how much the memory of the process rises during `step`: what glibc cannot use again included, which depends
    on all that the process did before. None on a GPU."""
    if device.type == "cuda":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what was freed goes back, or a step would find its memory there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product: what the machine gives to a model at the very most."""
    size = 8192 if device.type == "cuda" else 2048
    return measured_peak(device, torch.bfloat16, size, seconds=2.0).flops_per_second

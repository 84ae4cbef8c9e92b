"""How often to probe, so that probes take no more than a given share of the training time.

A probe is two forward passes over a few rows in fp32 on one rank, for which all others wait; what share of a step that
is depends on model, batch and device. So it is measured: the first update of a process is probed, and once
SETTLED_AFTER updates are made,

    every = ⌈ seconds of a probe ÷ (share · seconds of an update) ⌉, up to the next multiple of ROUND_STEPS

holds for the rest of the run. Rank 0's clock decides for all ranks, and a checkpoint keeps what was decided, so a run
that goes on probes the steps that it would have probed. A batch that grows later makes probes cheaper than asked for.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.distributed as dist

ROUND_STEPS = 50
"""The shortest interval, and what longer ones are multiples of: runs that took slightly different times probe the same
steps, and nobody needs to know a layer's entropy more often."""
SETTLED_AFTER = 6
"""Updates of a process, of which the first is not counted: it allocates."""


def interval(probe_cost: float, step_cost: float, share: float) -> int:
    """Updates between probes, for costs in the same unit."""
    return max(1, math.ceil(probe_cost / (share * step_cost) / ROUND_STEPS)) * ROUND_STEPS


def planned_interval(probe_rows: int, rows_a_rank: int, share: float) -> int:
    """The same before anything is measured, by FLOPs: two forward passes against a forward and a backward pass, which
    takes twice as many. That fp32 is slower than 16 bit, on most devices, is left out."""
    return interval(2.0 * probe_rows, 3.0 * rows_a_rank, share)


class ProbeInterval:
    """`every_steps` is None until it is known; a given one (0: never) is known at once.

    basis: what the decision depends on besides the machine; a checkpoint's is taken over if it was made with the same.
    """

    def __init__(self, given: int | None, share: float, basis: dict[str, Any]) -> None:
        self.every_steps, self.share, self.basis = given, share, {**basis, "share": share}
        self._given = given is not None
        self._seconds: list[float] = []

    def finished(self, step_seconds: float, probe_seconds: float, device: torch.device) -> bool:
        """An update is made, collective: every rank calls it after every update. probe_seconds of rank 0 count.
        Returns whether the interval was settled just now."""
        if self.every_steps is not None:
            return False
        self._seconds.append(step_seconds)
        if len(self._seconds) < SETTLED_AFTER:
            return False
        chosen = interval(probe_seconds, statistics.median(self._seconds[1:]), self.share)
        if dist.is_initialized():
            agreed = torch.tensor(chosen if dist.get_rank() == 0 else 0, device=device)
            dist.all_reduce(agreed)
            chosen = int(agreed)
        self.every_steps = chosen
        return True

    def state(self) -> dict[str, Any]:
        """For the checkpoint; empty while nothing is settled."""
        settled = not self._given and self.every_steps is not None
        return {"every_steps": self.every_steps, "basis": self.basis} if settled else {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has, unless the interval is given or it was settled for another run than this."""
        if not self._given and state.get("basis") == self.basis:
            self.every_steps = int(state["every_steps"])

    def words(self) -> str:
        if self.every_steps == 0:
            return "probes: none (monitor.probe_every_steps)"
        if self.every_steps is not None:
            why = "monitor.probe_every_steps" if self._given else f"{self.share:.1%} of the time at most"
            return f"probes: every {self.every_steps} updates ({why})"
        return f"probes: as often as takes {self.share:.1%} of the time at most, measured over {SETTLED_AFTER} updates"

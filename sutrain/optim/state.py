"""Optimizer state that knows no world size: by tensor name and offset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ReadSlice = Callable[[str, str, int, int], Tensor]
"""(state key, tensor name, offset, length) -> flat fp32 values; raises when some are missing."""


class StateError(ValueError):
    """Saved optimizer state does not fit this optimizer; the message lists every mismatch."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer has to save.

    replicated: small tensors, the same on every rank ("row_mean|NAME"), to be saved once.
    sliced: (state key, parameter, offset in it, flat fp32 values), what this rank has to save; over all ranks
        every element comes once.
    counters: numbers that advance with the updates, and those of fp16's loss scaler.
    """

    replicated: dict[str, Tensor]
    sliced: list[tuple[str, str, int, Tensor]]
    counters: dict[str, float]

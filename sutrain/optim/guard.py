"""Update guard: no tensor may move further in one update than k times what it moved recently.

Update norms jump before the loss does (marin-community/marin#1368), and one update that is a hundred times too long can
undo a day. What counts is the size of the update per unit of learning rate, ‖Δθ‖ / lr, so that warm-up and decay are no
reason to step in. The history is the mean of this size over the first `window` updates and their exponential mean with
weight 1/window from then on; limited updates enter it as limited, and where a tensor does not move at all its history
stays: it would be held back for as long afterwards. All of Δθ is scaled, weight decay included.

The sizes come from sums over all ranks, so every rank decides the same; nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD_WINDOW = 100
"""Updates; the default."""


def valid_guard(limit: float | None, window: int) -> dict[str, bool]:
    """Conditions on update_guard and guard_window, for refuse_unless."""
    return {
        f"update_guard is {limit!r}, expected a number above 1, or null: off": limit is None or limit > 1,
        f"guard_window is {window!r}, expected a whole number, 1 or more": (
            math.isfinite(window) and window == int(window) and window >= 1
        ),
        "guard_window has no effect without update_guard: leave it out": (
            limit is not None or window == GUARD_WINDOW
        ),
    }


class UpdateGuard:
    """State: one number a tensor, [T]; 0 until the tensor has moved for the first time."""

    def __init__(self, limit: float, window: int, names: list[str], device: torch.device):
        """limit: k. window: updates that the history looks back over, and during which nothing is limited."""
        self._limit, self._window = limit, window
        self._names = names
        self._history = torch.zeros(len(names), device=device)
        self.begun_after = 0
        """Updates that the run had made when the guard was turned on; the window is counted from there."""

    def factor(self, update_square_sum: Tensor, learning_rate: float, updates: int) -> Tensor:
        """min(1, k · history / size) for every tensor, [T]; takes the sizes into the history.

        update_square_sum: Σ(Δθ)² without the guard, [T]. updates: number of this update, from 1 on.
        """
        if learning_rate == 0:  # piecewise_linear begins with it: nothing moves, and nothing is learnt
            return torch.ones_like(update_square_sum)
        size, updates = update_square_sum.sqrt() / learning_rate, updates - self.begun_after
        known = self._history > 0
        factor = torch.ones_like(size)
        if updates > self._window:
            factor = torch.where(known, (self._limit * self._history / size).clamp(max=1.0), factor)
        mean = self._history.lerp(size * factor, 1.0 / min(updates, self._window))
        mean = torch.where(size > 0, mean, self._history)
        self._history.copy_(torch.where(known, mean, size))
        return factor

    def state_by_name(self) -> dict[str, Tensor]:
        """Views, [1] each; equal on all ranks."""
        return {f"update_history|{name}": self._history[i : i + 1] for i, name in enumerate(self._names)}

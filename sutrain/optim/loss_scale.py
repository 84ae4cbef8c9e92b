"""fp16's dynamic loss scale, which lives in the engine: its numbers, and two places where the engine is wrong.

The engine multiplies the loss by the scale, divides the gradients by it, halves it after an overflow and doubles it
after so many updates without one (names as of DeepSpeed 0.19.8; `loss_scale_config` without ZeRO, `loss_scaler` with).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SCALE, GOOD_UPDATES, HYSTERESIS = "loss_scale", "loss_scale_good_updates", "loss_scale_hysteresis"


class LossScaler:
    """The scaler inside one of DeepSpeed's optimizer wrappers."""

    def __init__(self, wrapper: Any):
        self._state = getattr(wrapper, "loss_scale_config", None) or wrapper.loss_scaler
        self.dynamic = bool(
            getattr(self._state, "dynamic_loss_scale", getattr(self._state, "dynamic", False))
        )

    @property
    def scale(self) -> float:
        """By what the next loss is multiplied."""
        return float(self._state.cur_scale)

    def numbers(self) -> dict[str, float]:
        """What a checkpoint keeps; the same for every stage (without ZeRO there is no hysteresis)."""
        if not self.dynamic:
            return {}
        state = self._state
        found = {SCALE: self.scale, GOOD_UPDATES: state.cur_iter - state.last_overflow_iter - 1}
        return found | ({HYSTERESIS: state.cur_hysteresis} if hasattr(state, "cur_hysteresis") else {})

    def load(self, numbers: Mapping[str, float]) -> None:
        """Go on where `numbers` stopped; a run that had no dynamic scale leaves the first one of the settings."""
        if not self.dynamic or SCALE not in numbers:
            return
        self._state.cur_scale = float(numbers[SCALE])
        self._state.last_overflow_iter, self._state.cur_iter = -1, int(numbers[GOOD_UPDATES])
        if HYSTERESIS in numbers and hasattr(self._state, "cur_hysteresis"):
            self._state.cur_hysteresis = int(numbers[HYSTERESIS])

    def correction(self) -> float:
        """By what a gradient must be multiplied inside step().

        The engine doubles the scale before it divides the gradients by it: in that one update they come out half as
        large as they are.
        """
        if not self.dynamic:
            return 1.0
        good_before = self._state.cur_iter - self._state.last_overflow_iter - 2
        grown = good_before > 0 and good_before % self._state.scale_window == 0
        return float(self._state.scale_factor) if grown else 1.0


class ForgottenScale:
    """Without ZeRO the engine divides gradients by the scale and never multiplies the loss by it. This stands where it
    looks for a torch.amp.GradScaler, whose scale() it does call."""

    def __init__(self, scaler: LossScaler):
        self._scaler = scaler

    def scale(self, loss: Tensor) -> Tensor:
        return loss.float() * self._scaler.scale

    def step(self, optimizer: Any) -> None:
        """The wrapper unscales and looks for overflows by itself."""
        optimizer.step()

    def update(self) -> None:
        """As the wrapper has done."""

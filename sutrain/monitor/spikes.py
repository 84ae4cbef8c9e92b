"""Spikes of the loss and of every group's update, judged in process on every step.

Prometheus looks every few seconds and would miss most of them.  The rule is fixed, it is not a setting: a
threshold that is tuned per run until it is quiet tells nobody anything.

    A value is a spike if, in logs, it lies ROBUST_SIGMAS * max(noise, FLOOR) above its level
    and if it is more than FACTOR times its level, where
    level = median of the last LEVEL_STEPS values,
    noise = 1.4826 / sqrt(2) * median of the last WINDOW_STEPS absolute changes from one step to the next.

* Medians: up to half of the window may be spikes without moving the yardstick. 1.4826 turns a median absolute
  deviation into the standard deviation of a Gaussian; a change is the difference of two values, hence
  sqrt(2). Noise is taken from changes because a loss that falls steeply, as it does early on, spreads over a
  window far wider than its noise, and a spike would drown in that spread.
* ROBUST_SIGMAS = 6: one Gaussian value in 1e9.  A 1000-layer model makes 3e8 judgements in 100,000 steps.
* FACTOR = 2 for updates: the jump that precedes loss spikes in practice (marin-community/marin#1368).
  FACTOR = 1.1 for the loss: a tenth above its level is what a reader of the curve calls a spike.
* FLOOR = 0.01: a quantity that hardly moves (a constant loss) does not alarm over its last digit.
* NOISE_EVERY_STEPS = 10: the noise of 100 steps hardly changes in 10, so it is not taken anew on each of them
  (of 3000 groups it costs as much as all the rest).
* LEVEL_STEPS = 20, short against a schedule; WINDOW_STEPS = 100, enough to know the noise to about a tenth;
  MINIMUM_STEPS = 20 values must be known before anything is judged.

Updates move with the learning rate by design, so they are judged relative to the learning rate of the step
*before*. Warm-up and decay thus raise no alarm, but a learning rate that jumps (x30 by a mistake in a
schedule) does, on the step at which it jumps. A loss that is not finite is a spike at once; an update that is
not finite or is zero (a skipped step) is not judged and leaves no trace in the history.

Optimizers that fix the size of the update (LAMB, AdaFactor's clip) hide in it what they had to do. So the direction
before that, RMS(U) or one over the trust ratio, is judged by the same rule: stale second moments show there and nowhere
else (benchmarks/faults.py).

Shapes: G groups, W steps of history.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .statistics import GroupTable, TensorGroups

LEVEL_STEPS = 20
WINDOW_STEPS = 100
MINIMUM_STEPS = 20
ROBUST_SIGMAS = 6.0
UPDATE_FACTOR = 2.0
LOSS_FACTOR = 1.1
FLOOR = 0.01
NOISE_EVERY_STEPS = 10
_GAUSSIAN = 1.4826
_JUDGED = ("update_norm", "direction_rms", "trust_ratio")


class RollingHistory:
    """Level and noise of `n` quantities, given as logs; NaN where a value was not to be had."""

    def __init__(self, n: int, noise_every_steps: int = NOISE_EVERY_STEPS) -> None:
        self._noise_every_steps = noise_every_steps
        self._recent_NW = np.full((n, LEVEL_STEPS), np.nan)
        self._change_NW = np.full((n, WINDOW_STEPS), np.nan)
        self._last_N = np.full(n, np.nan)  # the last known value, however long ago
        self._seen_N = np.zeros(n, dtype=np.int64)
        self._added = 0
        self._noise_N = np.full(n, np.nan)
        self._noise_at = -noise_every_steps

    def compare(self, log_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(value / level, robust sigmas above the level); NaN below MINIMUM_STEPS known values."""
        ready = self._seen_N >= MINIMUM_STEPS
        above_N, sigmas_N = np.full(len(log_N), np.nan), np.full(len(log_N), np.nan)
        if ready.any():
            if (
                self._added - self._noise_at >= self._noise_every_steps
                or np.isnan(self._noise_N[ready]).any()
            ):
                changes_NW = self._change_NW[:, : min(self._added, WINDOW_STEPS)]
                self._noise_N = _GAUSSIAN / math.sqrt(2) * _median(changes_NW)
                self._noise_at = self._added
            above_N[ready] = log_N[ready] - _median(self._recent_NW[ready])
            sigmas_N[ready] = above_N[ready] / np.maximum(self._noise_N[ready], FLOOR)
        return np.exp(above_N), sigmas_N

    def add(self, log_N: np.ndarray) -> None:
        """Append one value each."""
        known = np.isfinite(log_N)
        self._recent_NW[:, self._added % LEVEL_STEPS] = log_N
        self._change_NW[:, self._added % WINDOW_STEPS] = np.abs(log_N - self._last_N)
        self._last_N = np.where(known, log_N, self._last_N)
        self._seen_N += known
        self._added += 1


def _median(history_NW: np.ndarray) -> np.ndarray:
    """Median of what is known in the window (nanmedian is several times slower: only if need be)."""
    if not np.isnan(history_NW).any():
        return np.median(history_NW, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing known: NaN, as it should be
        return np.nanmedian(history_NW, axis=1)


def safe_log(value_N: np.ndarray) -> np.ndarray:
    value_N = np.asarray(value_N, dtype=np.float64)
    good = np.isfinite(value_N) & (value_N > 0)
    return np.where(good, np.log(np.where(good, value_N, 1.0)), np.nan)


@dataclass(frozen=True)
class Spikes:
    """The verdict on one step.

    `loss_factor` is loss / its level if the loss spiked (infinity if it was not finite), else None.
    `updates` is the indices of the groups whose update spiked, `directions` of those whose direction before clip or
    trust ratio did; `update_factor_G` and `update_sigmas_G` are
    every group's update over its level and its distance in robust sigmas (NaN while the history is
    short).
    """

    groups: TensorGroups
    loss_factor: float | None
    updates: np.ndarray
    directions: np.ndarray
    update_factor_G: np.ndarray
    update_sigmas_G: np.ndarray

    def as_record(self) -> dict:
        """What metrics.jsonl keeps: `loss_spike` and `update_spikes` [[layer, part, factor], ...], if any."""
        record: dict = {}
        if self.loss_factor is not None:
            record["loss_spike"] = self.loss_factor
        if len(self.updates):
            record["update_spikes"] = [
                [*self.groups.keys[g], float(self.update_factor_G[g])] for g in self.updates
            ]
        if len(self.directions):
            record["direction_spikes"] = [list(self.groups.keys[g]) for g in self.directions]
        return record

    def conspicuous(self, count: int = 3) -> list[tuple[str, str, float]]:
        """(layer, part, update / own level) of the groups furthest above their own history, worst first."""
        known = np.flatnonzero(np.isfinite(self.update_sigmas_G))
        worst = known[np.argsort(-self.update_sigmas_G[known], kind="stable")][:count]
        return [(*self.groups.keys[g], float(self.update_factor_G[g])) for g in worst]


class SpikeWatch:
    """Judges every step against the steps before it.  One per run, on the rank that logs."""

    def __init__(self, groups: TensorGroups) -> None:
        self._groups = groups
        self._loss = RollingHistory(1)
        self._updates = RollingHistory(len(groups))
        self._directions = RollingHistory(len(groups))
        self._log_rate = math.nan  # of the last step that had a positive learning rate

    def judge(self, loss: float, learning_rate: float, table: GroupTable) -> Spikes:
        """Compare one step with the history, then add it to the history.

        A value that spiked stays in the history: a lasting change of level alarms for about half of
        LEVEL_STEPS.
        """
        log_loss = safe_log(np.array([loss]))
        loss_factor, loss_sigmas = (float(x[0]) for x in self._loss.compare(log_loss))
        log_update_G = safe_log(table.update_norm)
        factor_G, sigmas_G = self._updates.compare(log_update_G - self._log_rate)
        log_direction_G = safe_log(direction_of(table.direction_rms, table.trust_ratio))
        direction_factor_G, direction_sigmas_G = self._directions.compare(log_direction_G)
        self._remember(log_loss, learning_rate, log_update_G, log_direction_G)

        loss_spike: float | None = None
        if not math.isfinite(loss):
            loss_spike = math.inf
        elif loss_factor > LOSS_FACTOR and loss_sigmas > ROBUST_SIGMAS:
            loss_spike = loss_factor
        spiked = np.flatnonzero((factor_G > UPDATE_FACTOR) & (sigmas_G > ROBUST_SIGMAS))
        far = (direction_factor_G > UPDATE_FACTOR) & (direction_sigmas_G > ROBUST_SIGMAS)
        return Spikes(self._groups, loss_spike, spiked, np.flatnonzero(far), factor_G, sigmas_G)

    def _remember(
        self,
        log_loss: np.ndarray,
        learning_rate: float,
        log_update_G: np.ndarray,
        log_direction_G: np.ndarray,
    ) -> None:
        self._loss.add(log_loss)
        if learning_rate > 0:
            self._log_rate = math.log(learning_rate)
        self._updates.add(log_update_G - self._log_rate)
        self._directions.add(log_direction_G)

    def restore(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Take over the history of a run that goes on: its last step records, as metrics.jsonl keeps them.

        Steps whose table was not written count for the loss alone. Records of another model are left out.
        """
        names = [list(column) for column in zip(*self._groups.keys, strict=True)]
        unknown = np.full(len(self._groups), np.nan)
        for line in steps[-WINDOW_STEPS - 1 :]:
            layers = line.get("layers")
            fits = layers is not None and [layers["layer"], layers["part"]] == names
            known = {c: np.array(layers.get(c, unknown), float) for c in _JUDGED} if layers and fits else {}
            log_update_G = safe_log(known.get("update_norm", unknown))
            log_direction_G = safe_log(
                direction_of(known.get("direction_rms", unknown), known.get("trust_ratio", unknown))
            )
            rate = line.get("learning_rate", 0.0)
            self._remember(safe_log(np.array([line["loss"]])), rate, log_update_G, log_direction_G)


def direction_of(direction_rms_G: np.ndarray, trust_ratio_G: np.ndarray) -> np.ndarray:
    """Size of the direction before the optimizer fixed it: RMS(U), or one over the trust ratio; else NaN."""
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(direction_rms_G), 1.0 / trust_ratio_G, direction_rms_G)

"""The largest value of the last minute.

A scrape sees one step in many. What it must not miss is kept for at least two scrapes: spikes as counters
(spikes.py), sizes as the maximum over a rolling window.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

WINDOW_SECONDS = 60.0
"""At least two scrapes of an interval of up to 30 seconds (prometheus.yml has 10)."""
SLOT_SECONDS = 5.0


class RollingMaximum:
    """Maximum over the last WINDOW_SECONDS of n values; exact to SLOT_SECONDS, a few numbers a slot."""

    def __init__(self) -> None:
        self._slots: deque[tuple[float, np.ndarray]] = deque()

    def add(self, values_N: np.ndarray, now: float | None = None) -> np.ndarray:
        """Take the values of a step; returns the maxima, NaN where nothing was known in the window."""
        now = time.monotonic() if now is None else now
        while self._slots and now - self._slots[0][0] > WINDOW_SECONDS:
            self._slots.popleft()
        if self._slots and now - self._slots[-1][0] < SLOT_SECONDS:
            begin, so_far_N = self._slots[-1]
            self._slots[-1] = begin, np.fmax(so_far_N, values_N)
        else:
            self._slots.append((now, np.array(values_N, dtype=np.float64)))
        return np.fmax.reduce([slot_N for _, slot_N in self._slots])

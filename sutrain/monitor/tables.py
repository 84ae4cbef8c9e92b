"""The tables of norms per layer and part of a run that is read back: fp32, and only as many as a picture can show.

A run of a million updates writes as many tables, each 10 kB as Python numbers. Above `2 * MOST` neighbours become one,
again and again while the log is read: geometric means of what is positive and finite, as pictures.in_blocks takes them.

G groups = (layer, part) pairs, C columns, X tables held, Y layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .statistics import COLUMNS, OPTIMIZER_COLUMNS

MOST = 1024
ALL_COLUMNS = (*COLUMNS, *OPTIMIZER_COLUMNS)
Entry = tuple[float, np.ndarray]
"""Step (of several tables the mean) and values [C, G]."""


class Tables:
    """Filled by `add` in the order of the log; a table of other groups than the first one's is left out."""

    def __init__(self) -> None:
        self.layer: list[str] = []
        self.part: list[str] = []
        self._width = 1  # tables in each entry ...
        self._entries: list[Entry] = []
        self._halves: dict[
            int, Entry
        ] = {}  # ... and what has come of the next: size -> entry, the sizes powers of 2

    def add(self, step: int, table: Mapping[str, Any]) -> None:
        """Take a table by columns, as metrics.jsonl has it; what it does not hold is NaN."""
        if not self.layer:
            self.layer, self.part = list(table["layer"]), list(table["part"])
        if table["layer"] != self.layer or table["part"] != self.part:
            return
        unknown = np.full(len(self.layer), np.nan)
        values = np.array([table.get(column, unknown) for column in ALL_COLUMNS], dtype=np.float32)
        entry, size = (float(step), values), 1
        while size < self._width:
            if size not in self._halves:
                self._halves[size] = entry
                return
            entry, size = _joined(self._halves.pop(size), entry), 2 * size
        self._entries.append(entry)
        if len(self._entries) == 2 * MOST:
            pairs = zip(self._entries[::2], self._entries[1::2], strict=True)
            self._entries = [_joined(one, other) for one, other in pairs]
            self._width *= 2

    def _all(self) -> list[Entry]:
        return self._entries + [self._halves[size] for size in sorted(self._halves, reverse=True)]

    @property
    def steps(self) -> np.ndarray:
        """[X]."""
        return np.array([step for step, _ in self._all()])

    def rows(self, column: str, groups: list[int]) -> np.ndarray:
        """One column of some groups over all tables, [groups, X]."""
        at = ALL_COLUMNS.index(column)
        entries = self._all()
        values = np.array([values[at, groups] for _, values in entries], dtype=np.float64)
        return values.reshape(len(entries), len(groups)).T

    def heat_map(self, column: str, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(step [X], layer [Y], value [Y, X]) of one column, for one part of the layers."""
        groups = [
            g for g, (layer, p) in enumerate(zip(self.layer, self.part, strict=True)) if layer and p == part
        ]
        return self.steps, np.array([int(self.layer[g]) for g in groups]), self.rows(column, groups)


def _joined(one: Entry, other: Entry) -> Entry:
    """Two neighbours as one."""
    values = np.stack([one[1], other[1]])
    good = np.isfinite(values) & (values > 0)
    logs, known = np.log(np.where(good, values, 1.0)).sum(0), good.sum(0)
    mean = np.exp(logs / np.maximum(known, 1))
    return (one[0] + other[0]) / 2, np.where(known > 0, mean, np.nan).astype(np.float32)

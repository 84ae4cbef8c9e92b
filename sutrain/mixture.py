"""Several corpora mixed by weight: which corpus sample i comes from, and as its how-manieth, is a function of i.

Samples come in periods of `PERIOD`; each corpus has a fixed number of places in every period, and a keyed shuffle says
which. So the shares hold at any moment to within one period, and the position in every corpus follows from the one
integer without a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from data_prep.keys import philox_words, stream_id

PERIOD = 1024
"""Samples; weights are kept to 1 / PERIOD."""


class MixtureError(ValueError):
    """Weights that cannot be kept; the message says which and why."""


@dataclass(frozen=True)
class Mixture:
    """weights: of each corpus, of any sum. Raises MixtureError for one that would never be read."""

    weights: tuple[float, ...]
    seed: int
    places: tuple[int, ...] = field(init=False)
    """How many samples of a period each corpus has."""

    def __post_init__(self) -> None:
        if not all(weight > 0 for weight in self.weights):
            raise MixtureError(f"weights {self.weights}: every corpus needs a weight above 0")
        exact = np.array(self.weights) / sum(self.weights) * PERIOD
        places = np.floor(exact).astype(int)
        # The places left over go to the largest remainders.
        for index in np.argsort(places - exact, kind="stable")[: PERIOD - places.sum()]:
            places[index] += 1
        if (places == 0).any():
            raise MixtureError(f"weights {self.weights}: none may be below 1/{PERIOD} of all")
        object.__setattr__(self, "places", tuple(int(n) for n in places))

    def assign(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, number in that corpus) of samples [first_sample, first_sample + count), int64 [count] each."""
        first_period, last_period = first_sample // PERIOD, (first_sample + count - 1) // PERIOD
        corpora, numbers = [], []
        for period in range(first_period, last_period + 1):
            corpus, number = _period(self, period)
            corpora.append(corpus)
            numbers.append(number + period * np.array(self.places)[corpus])
        inside = slice(first_sample - first_period * PERIOD, first_sample - first_period * PERIOD + count)
        return np.concatenate(corpora)[inside], np.concatenate(numbers)[inside]


@lru_cache(maxsize=8)
def _period(mixture: Mixture, period: int) -> tuple[np.ndarray, np.ndarray]:
    """(corpus, how many of it came before in this period) of the PERIOD samples of one period."""
    keys = philox_words(mixture.seed, stream_id("mixture"), period * PERIOD, PERIOD)
    corpus = np.repeat(np.arange(len(mixture.places)), mixture.places)[np.argsort(keys, kind="stable")]
    number = np.empty(PERIOD, np.int64)
    for index, places in enumerate(mixture.places):
        number[corpus == index] = np.arange(places)
    return corpus, number

"""Our loader without labels, as benchmarks/loader.py compares it: tokens alone, which is all that the peers deliver.

A module of its own, without torch, since the processes that read ahead import it too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sutrain.data import Samples


class TokenRows(NamedTuple):
    """In the place of LabelledSamples: tokens alone [N, L], in the integers of the shards."""

    first_sample: int
    tokens_NL: np.ndarray

    def hold(self, first: int, count: int) -> bool:
        return self.first_sample <= first <= first + count <= self.first_sample + len(self.tokens_NL)

    def part(self, first: int, count: int) -> TokenRows:
        return TokenRows(first, self.tokens_NL[first - self.first_sample :][:count])

    def batch(self) -> Any:
        import torch

        return torch.from_numpy(self.tokens_NL.astype(np.int64))

    def narrowed(self) -> TokenRows:
        return self


class Tokens:
    """In the place of Samples."""

    def __init__(self, samples: Samples):
        self.samples, self.manifest, self.rows_per_epoch = samples, samples.manifest, samples.rows_per_epoch

    def labelled(self, first: int, count: int) -> TokenRows:
        return TokenRows(first, self.samples.rows(first, count).tokens_NL)

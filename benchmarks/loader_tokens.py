"""Our loader without labels, as benchmarks/loader.py compares it: tokens alone, which is all that the peers deliver.

A module of its own, without torch, since the processes that read ahead import it too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sutrain.data import Samples


class TokenRows(NamedTuple):
    """In the place of LabelledSamples: tokens alone [N, L]."""

    tokens_NL: np.ndarray

    def batch(self) -> Any:
        import torch

        return torch.from_numpy(self.tokens_NL.astype(np.int64, copy=False))

    def narrowed(self) -> TokenRows:
        return TokenRows(self.tokens_NL.astype(np.uint16))


class Tokens:
    """In the place of Samples."""

    def __init__(self, samples: Samples):
        self.samples, self.manifest, self.rows_per_epoch = samples, samples.manifest, samples.rows_per_epoch

    def labelled(self, first: int, count: int) -> TokenRows:
        return TokenRows(self.samples.rows(first, count).tokens_NL)

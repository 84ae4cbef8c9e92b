"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on fragments: elementwise, the same on any number of
ranks.

    m = β1 m + (1-β1) g     v = β2 v + (1-β2) g²     u = (m / (1-β1^t)) / (√(v / (1-β2^t)) + ε)
    θ ← θ - lr · u - lr · decay · θ

Its sums over fragments serve the global clip factor and the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import FragmentOptimizer
from .bucket import Bucket
from .lamb import check_moments, moment_passes


class AdamW(FragmentOptimizer):
    """See the module. State: two moments in slices beside the master weights."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        bias_correction: bool = True,
        **shared: Any,
    ):
        """shared: settings of every optimizer, see FragmentOptimizer."""
        super().__init__(named_parameters, **shared)
        check_moments(betas, epsilon)
        self.betas = betas
        self.epsilon = epsilon
        self.bias_correction = bias_correction

    def _second_sums(self) -> tuple[str, ...]:
        return ("direction", "direction_weight")

    def _allocate(self) -> None:
        self._passes = moment_passes(self)
        self._no_decay = torch.zeros_like(self._weight_decay)  # in the direction: decay is apart from it

    def _prepare(self, first: Bucket) -> Tensor:
        debias = [1.0 - beta**self.updates if self.bias_correction else 1.0 for beta in self.betas]
        self._scales = (1.0 / debias[0], debias[1] ** -0.5)
        weighted = self._decays and self._needs_update_norms
        return self._passes.moment_sums(
            self.global_clip_factor, self.betas, self._scales, self.epsilon, self._no_decay, weighted
        )

    def _apply(self, second: Bucket) -> None:
        step = self.learning_rate * self._learning_rate_scale
        decay = step * self._weight_decay
        if self._needs_update_norms:
            moved = step**2 * second["direction"] + 2 * step * decay * second["direction_weight"]
            guard = self._guarded((moved + decay**2 * second["weight"]).clamp_(min=0.0))
            step, decay = step * guard, decay * guard
        self._passes.moment_apply(self._scales, self.epsilon, self._no_decay, torch.stack([step, decay]))

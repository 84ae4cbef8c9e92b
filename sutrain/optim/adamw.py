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

from .base import FragmentOptimizer, products, squares
from .bucket import Bucket
from .lamb import advance_moments, check_moments


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
        self._new_slices("first_moment")
        self._new_slices("second_moment")

    def _prepare(self, first: Bucket, gradients: list[Tensor], weights: list[Tensor], second: Bucket) -> None:
        debias = [1.0 - beta**self.updates if self.bias_correction else 1.0 for beta in self.betas]
        moments = zip(self._slices("first_moment"), self._slices("second_moment"), strict=True)
        for gradient, (mean, square) in zip(gradients, moments, strict=True):
            advance_moments(gradient, mean, square, self.betas, self.global_clip_factor)
            torch.div(mean, square.sqrt().mul_(debias[1] ** -0.5).add_(self.epsilon), out=gradient)
            gradient.div_(debias[0])
        self._add(second["direction"], squares(gradients))
        if self._decays:
            self._add(second["direction_weight"], products(gradients, weights))

    def _apply(self, first: Bucket, second: Bucket, directions: list[Tensor], weights: list[Tensor]) -> None:
        step = self.learning_rate * self._learning_rate_scale
        decay = step * self._weight_decay
        moved = step**2 * second["direction"] + 2 * step * decay * second["direction_weight"]
        self._column("update_square_sum").copy_((moved + decay**2 * first["weight"]).clamp_(min=0.0))
        numbers = torch.stack([step, decay]).tolist()
        for fragment, direction, weight in zip(self.fragments.fragments, directions, weights, strict=True):
            size, lost = (column[fragment.tensor] for column in numbers)
            if lost:
                weight.add_(weight, alpha=-lost)
            weight.add_(direction, alpha=-size)

"""LAMB (You et al. 2020, arXiv 1904.00962) as Su trained RoFormerV2 with it (kexue.fm/archives/8998, 7094).

    m = β1 m + (1-β1) g     v = β2 v + (1-β2) g²     r = m / (√v + ε) + decay · θ
    θ ← θ - lr · trust · r   with  trust = ‖θ‖ / ‖r‖, or 1 where either norm is 0

No bias correction, no limits on the trust ratio; decay and trust apply to every tensor unless per_tensor says
otherwise. Both norms are of the whole tensor, summed over its fragments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import FragmentOptimizer, refuse_unless, squares
from .bucket import Bucket


class Lamb(FragmentOptimizer):
    """See the module. State: two moments in slices beside the master weights."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        **shared: Any,
    ):
        """shared: settings of every optimizer, see FragmentOptimizer. RoFormerV2 used weight_decay 0.01."""
        super().__init__(named_parameters, **shared)
        check_moments(betas, epsilon)
        self.betas = betas
        self.epsilon = epsilon

    def _second_sums(self) -> tuple[str, ...]:
        return ("direction",)

    def _allocate(self) -> None:
        self._new_slices("first_moment")
        self._new_slices("second_moment")

    def _prepare(self, first: Bucket, gradients: list[Tensor], weights: list[Tensor], second: Bucket) -> None:
        decays = self._weight_decay.tolist()
        moments = zip(self._slices("first_moment"), self._slices("second_moment"), strict=True)
        owned = zip(self.fragments.fragments, gradients, weights, moments, strict=True)
        for fragment, gradient, weight, (mean, square) in owned:
            advance_moments(gradient, mean, square, self.betas, self.global_clip_factor)
            torch.div(mean, square.sqrt().add_(self.epsilon), out=gradient)
            if decays[fragment.tensor]:
                gradient.add_(weight, alpha=decays[fragment.tensor])
        self._add(second["direction"], squares(gradients))

    def _apply(self, first: Bucket, second: Bucket, directions: list[Tensor], weights: list[Tensor]) -> None:
        adapts = self._adapt & (first["weight"] > 0) & (second["direction"] > 0)
        trust = torch.where(adapts, (first["weight"] / second["direction"]).sqrt(), 1.0)
        step = self.learning_rate * self._learning_rate_scale * trust
        self._column("update_square_sum").copy_(step**2 * second["direction"])
        self._column("trust_ratio").copy_(trust)
        steps = step.tolist()
        for fragment, direction, weight in zip(self.fragments.fragments, directions, weights, strict=True):
            weight.add_(direction, alpha=-steps[fragment.tensor])


def advance_moments(
    gradient: Tensor, mean: Tensor, square: Tensor, betas: tuple[float, float], clip_factor: float
) -> None:
    """m and v of Adam, in place, after scaling the gradient by the global clip factor."""
    if clip_factor != 1.0:
        gradient.mul_(clip_factor)
    mean.lerp_(gradient, 1.0 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])


def check_moments(betas: tuple[float, float], epsilon: float) -> None:
    """Raises ValueError for decay rates outside [0, 1) or an ε that is not positive."""
    refuse_unless(
        {
            f"betas is {betas!r}, expected two numbers, 0 <= beta < 1": len(betas) == 2
            and all(0 <= beta < 1 for beta in betas),
            f"epsilon is {epsilon!r}, expected a positive number": epsilon > 0,
        }
    )

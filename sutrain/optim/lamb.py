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

from .base import FragmentOptimizer
from .bucket import Bucket
from .kernels import CompiledKernels, EagerKernels, Layout, build_kernels
from .per_tensor import refuse_unless


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
        self._passes = moment_passes(self)

    def _prepare(self, first: Bucket) -> Tensor:
        return self._passes.moment_sums(
            self.global_clip_factor, self.betas, (1.0, 1.0), self.epsilon, self._weight_decay, False
        )

    def _apply(self, second: Bucket) -> None:
        adapts = self._adapt & (second["weight"] > 0) & (second["direction"] > 0)
        # Roots first: where gradients have ceased momentum fades, and by a square of 1e-40 a quotient is infinite.
        length = second["direction"].sqrt()
        trust = torch.where(adapts, second["weight"].sqrt() / length, 1.0)
        step = self.learning_rate * self._learning_rate_scale * trust
        if self._needs_update_norms:
            step = step * self._guarded((step * length) ** 2)
        self._column("trust_ratio").copy_(trust)
        numbers = torch.stack([step, torch.zeros_like(step)])
        self._passes.moment_apply((1.0, 1.0), self.epsilon, self._weight_decay, numbers)


def moment_passes(optimizer: FragmentOptimizer) -> CompiledKernels | EagerKernels:
    """Two moments in slices, and the passes over them; nothing is factored."""
    fragments = optimizer.fragments
    layout = Layout.of(fragments, [None] * len(fragments.names))
    optimizer._new_slices("first_moment")
    optimizer._new_slices("second_moment")
    moments = optimizer._slices("first_moment"), optimizer._slices("second_moment")
    return build_kernels(optimizer.kernels, layout, fragments.device, *moments)


def check_moments(betas: tuple[float, float], epsilon: float) -> None:
    """Raises ValueError for decay rates outside [0, 1) or an ε that is not positive."""
    refuse_unless(
        {
            f"betas is {betas!r}, expected two numbers, 0 <= beta < 1": len(betas) == 2
            and all(0 <= beta < 1 for beta in betas),
            f"epsilon is {epsilon!r}, expected a positive number": epsilon > 0,
        }
    )

"""Step sizes of every coordinate, learnt by exponentiated gradient descent (Amid et al. 2022, arXiv 2202.00145, in the
form of kexue.fm/archives/8968): as long as a gradient keeps its sign the step grows, where the sign flips it shrinks.

    ĝ = g / RMS(g)        log ν ← clamp(log ν + clamp(γ ĝ_{t-1} ĝ_t, ±limit), log gain_limits)        ν_0 = 1
    θ ← θ - lr · ν g - lr · decay · θ

The post has no normalisation and no limits; but its exponent grows with the square of the gradient, so that no γ serves
for long: `normalise: false` has it. RMS(g) is of the whole tensor, and g is the sum over all ranks and micro-batches:
with the gradient of one micro-batch the signs would mostly tell noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import FragmentOptimizer
from .bucket import Bucket
from .kernels import EagerKernels, Layout
from .per_tensor import refuse_unless


class Egd(FragmentOptimizer):
    """See the module. State: log ν and the previous ĝ, in slices beside the master weights. Its passes are eager."""

    _passes: EagerKernels

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        gain_rate: float = 0.1,
        gain_limits: tuple[float, float] = (0.1, 10.0),
        exponent_limit: float = 1.0,
        normalise: bool = True,
        **shared: Any,
    ):
        """
        gain_rate: γ; 0 is plain gradient descent. gain_limits: least and largest ν. exponent_limit: of one update.
        normalise: divide the gradients in the exponent by their RMS over the tensor.
        shared: settings of every optimizer, see FragmentOptimizer.
        """
        super().__init__(named_parameters, **shared)
        refuse_unless(
            {
                f"gain_rate is {gain_rate!r}, expected 0 or more": gain_rate >= 0,
                f"gain_limits is {gain_limits!r}, expected two numbers, 0 < low <= 1 <= high": (
                    len(gain_limits) == 2 and 0 < gain_limits[0] <= 1 <= gain_limits[1]
                ),
                f"exponent_limit is {exponent_limit!r}, expected a positive number": exponent_limit > 0,
                f"kernels is {self.kernels!r}, but only eager passes are written for egd: use auto or eager": (
                    self.kernels in ("auto", "eager")
                ),
            }
        )
        self.gain_rate = gain_rate
        self.log_gain_limits = (math.log(gain_limits[0]), math.log(gain_limits[1]))
        self.exponent_limit = exponent_limit
        self.normalise = normalise

    def _second_sums(self) -> tuple[str, ...]:
        return ("direction", "direction_weight")

    def _allocate(self) -> None:
        self._new_slices("log_gain")
        self._new_slices("previous_gradient")
        layout = Layout.of(self.fragments, [None] * self._count)
        self._passes = EagerKernels(layout, self._slices("log_gain"), self._slices("previous_gradient"))

    def _prepare(self, first: Bucket) -> Tensor:
        scale = torch.ones_like(first["gradient"])
        if self.normalise:
            root = (first["gradient"] / self._numel).sqrt()
            scale = torch.where(root > 0, 1.0 / root, 0.0)
        weighted = self._decays and self._needs_update_norms
        return self._passes.egd_sums(
            self.global_clip_factor,
            scale,
            self.gain_rate,
            self.exponent_limit,
            self.log_gain_limits,
            weighted,
        )

    def _apply(self, second: Bucket) -> None:
        step = self.learning_rate * self._learning_rate_scale
        decay = step * self._weight_decay
        if self._needs_update_norms:
            moved = step**2 * second["direction"] + 2 * step * decay * second["direction_weight"]
            guard = self._guarded((moved + decay**2 * second["weight"]).clamp_(min=0.0))
            step, decay = step * guard, decay * guard
        self._passes.add_directions(torch.stack([step, decay]))

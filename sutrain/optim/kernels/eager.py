"""The passes over weights and gradients in plain torch, a tensor at a time: for any device, and what the compiled
passes are tested against.

F fragments of this process, T tensors of the model. Gradients, weights and state are lists of flat fp32 tensors, one a
fragment. A direction (AdaFactor's U, LAMB's r) stands in the gradient's memory between the two passes of an update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..boxes import boxes_of_run
from .layout import Layout, State

Tensors = list[Tensor]


class EagerKernels:
    """See the module; CompiledKernels has the same methods."""

    def __init__(self, layout: Layout, first: State, second: State):
        """first, second: AdaFactor's second moments of what is not factored, and momentum (or None); LAMB's and AdamW's
        two moments."""
        self._layout = layout
        self._state: Any = (first, second)
        self._read: tuple[Tensor | None, list[float]] = (None, [])
        self._tensors = [fragment.tensor for fragment in layout.fragments]
        self._factors = [layout.factors[tensor] for tensor in self._tensors]
        self._boxes = [
            boxes_of_run(fragment.shape, fragment.offset, fragment.length) for fragment in layout.fragments
        ]

    def begin(self, gradients: Tensors) -> None:
        """What the other methods work on, until end(): flat fp32 gradients of every buffer."""
        owned = list(zip(self._layout.fragments, self._layout.buffer_of, strict=True))
        self._gradients = [gradients[i].view(-1).narrow(0, f.start, f.length) for f, i in owned]
        self._weights = [fragment.values() for fragment, _ in owned]

    def end(self) -> None:
        """Let go of the gradients: held on to, they would stand beside those of the next update, 4 bytes a weight."""
        self._gradients = []

    def square_sums(self, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        """Σg² of every fragment, [F]; row and column sums of g² are added into the flat arrays."""
        owned = list(zip(self._factors, self._boxes, self._gradients, strict=True))
        whole = iter(squares([gradient for factors, _, gradient in owned if factors is None]))
        totals = []
        for factors, boxes, gradient in owned:
            if factors is None:
                totals.append(next(whole))
                continue
            squared = gradient.square()
            totals.append(squared.sum())
            rows, columns = factors.rows(row_sums), factors.columns(column_sums)
            for box in boxes:
                part = box.of_flat(squared)
                box.of_whole(rows).add_(part.sum(factors.column, keepdim=True))
                box.of_whole(columns).add_(part.sum(factors.row, keepdim=True))
        return stacked([totals], row_sums)[:, 0]

    def factors(self, row_mean: Tensor, column_mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Flat arrays whose product is 1/√V: (R / max(mean R, floor))^-1/2 and C^-1/2, for owned tensors."""
        row_factor, column_factor = torch.zeros_like(row_mean), torch.zeros_like(column_mean)
        for factors in self._factors:
            if factors is not None:
                rows = factors.rows(row_mean)
                mean = rows.mean(factors.row, keepdim=True).clamp_(min=floor)
                factors.rows(row_factor).copy_((rows / mean).rsqrt_())
                factors.columns(column_factor).copy_(factors.columns(column_mean).rsqrt())
        return row_factor, column_factor

    def adafactor_sums(
        self,
        factors: tuple[Tensor, Tensor],
        clip: float,
        new_share: float,
        epsilon: float,
        limit: float,
        weighted: bool,
    ) -> Tensor:
        """With U = clip · g / √V and the old momentum m: Σθ², ΣU², ΣUθ, Σm², ΣmU, Σmθ of every fragment, [F, 6].

        Advances the second moments of what is not factored. limit: of 1/√V. Without `weighted` ΣUθ and Σmθ may be 0.
        """
        gradients, weights, (moments, momenta) = self._gradients, self._weights, self._state
        owned = zip(self._factors, self._boxes, gradients, moments, strict=True)
        for own, boxes, gradient, moment in owned:
            if clip != 1.0:
                gradient.mul_(clip)
            if own is None:
                moment.lerp_(gradient.square().add_(epsilon), new_share)
                gradient.mul_(moment.rsqrt().clamp_(max=limit))
                continue
            rows, columns = own.rows(factors[0]), own.columns(factors[1])
            for box in boxes:
                part, row, column = box.of_flat(gradient), box.of_whole(rows), box.of_whole(columns)
                if limit == float("inf"):
                    part.mul_(row).mul_(column)
                else:
                    part.mul_((row * column).clamp_(max=limit))
        nothing: Tensors = []
        return stacked(
            [
                squares(weights),
                squares(gradients),
                products(gradients, weights) if weighted else nothing,
                squares(momenta) if momenta is not None else nothing,
                products(momenta, gradients) if momenta is not None else nothing,
                products(momenta, weights) if momenta is not None and weighted else nothing,
            ],
            factors[0],
        )

    def adafactor_apply(
        self,
        factors: tuple[Tensor, Tensor],
        clip: float,
        limit: float,
        keep: float,
        numbers: Tensor,
    ) -> None:
        """θ ← θ - lost · θ - size · (keep · m + share · U); numbers: size, share and lost by tensor, [3, T]."""
        columns, momenta = numbers.tolist(), self._state[1]
        owned = zip(self._tensors, self._gradients, self._weights, strict=True)
        for position, (tensor, direction, weight) in enumerate(owned):
            size, share, lost = (column[tensor] for column in columns)
            if lost:
                weight.add_(weight, alpha=-lost)
            if momenta is not None:
                momenta[position].mul_(keep).add_(direction, alpha=share)
                weight.add_(momenta[position], alpha=-size)
            else:
                weight.add_(direction, alpha=-size * share)

    def moment_sums(
        self,
        clip: float,
        betas: tuple[float, float],
        scales: tuple[float, float],
        epsilon: float,
        decays: Tensor,
        weighted: bool,
    ) -> Tensor:
        """LAMB and AdamW: advance m and v; with r = m · scales[0] / (√v · scales[1] + ε) + decay · θ: Σθ², Σr² and Σrθ
        of every fragment, [F, 3]; decays by tensor, [T]. Without `weighted` Σrθ may be 0."""
        lost = self._on_host(decays)
        gradients, weights = self._gradients, self._weights
        owned = zip(self._tensors, gradients, weights, *self._state, strict=True)
        for tensor, gradient, weight, mean, square in owned:
            if clip != 1.0:
                gradient.mul_(clip)
            mean.lerp_(gradient, 1.0 - betas[0])
            square.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
            torch.div(mean, square.sqrt().mul_(scales[1]).add_(epsilon), out=gradient)
            if scales[0] != 1.0:
                gradient.mul_(scales[0])
            if lost[tensor]:
                gradient.add_(weight, alpha=lost[tensor])
        aligned = products(gradients, weights) if weighted else []
        return stacked([squares(weights), squares(gradients), aligned], decays)

    def _on_host(self, decays: Tensor) -> list[float]:
        """The values of a tensor that never changes, read from the device once."""
        if decays is not self._read[0]:
            self._read = (decays, decays.tolist())
        return self._read[1]

    def moment_apply(
        self, scales: tuple[float, float], epsilon: float, decays: Tensor, numbers: Tensor
    ) -> None:
        """θ ← θ - lost · θ - size · r; numbers: size and lost by tensor, [2, T]. (The compiled passes use the rest.)"""
        self.add_directions(numbers)

    def egd_sums(
        self,
        clip: float,
        normalisers: Tensor,
        rate: float,
        exponent_limit: float,
        log_gain_limits: tuple[float, float],
        weighted: bool,
    ) -> Tensor:
        """Advance log ν and the previous gradient; with r = clip · ν g: Σθ², Σr² and Σrθ of every fragment, [F, 3].

        normalisers: what gradients are multiplied with in the exponent, by tensor, [T].
        """
        gradients, weights = self._gradients, self._weights
        owned = zip(self._tensors, gradients, *self._state, strict=True)
        for tensor, gradient, log_gain, previous in owned:
            normal = gradient * normalisers[tensor]
            log_gain.add_(previous.mul_(normal).mul_(rate).clamp_(-exponent_limit, exponent_limit))
            log_gain.clamp_(*log_gain_limits)
            previous.copy_(normal)
            gradient.mul_(log_gain.exp())
            if clip != 1.0:
                gradient.mul_(clip)
        aligned = products(gradients, weights) if weighted else []
        return stacked([squares(weights), squares(gradients), aligned], normalisers)

    def add_directions(self, numbers: Tensor) -> None:
        """θ ← θ - lost · θ - size · r, r standing in the gradients; numbers: size and lost by tensor, [2, T]."""
        columns = numbers.tolist()
        for tensor, direction, weight in zip(self._tensors, self._gradients, self._weights, strict=True):
            size, lost = (column[tensor] for column in columns)
            if lost:
                weight.add_(weight, alpha=-lost)
            weight.add_(direction, alpha=-size)


def squares(tensors: Tensors) -> Tensors:
    """Σx² of each flat tensor, 0-dimensional. (At 3e7 elements fp32 dot is off by 4e-4.)"""
    if tensors and tensors[0].device.type == "cuda":  # read once, and a few launches for all of them
        return list(torch.stack(torch._foreach_norm(tensors)).square())
    return [tensor.square().sum() for tensor in tensors]


def products(left: Tensors, right: Tensors) -> Tensors:
    """Σxy of each pair of flat tensors, 0-dimensional."""
    return [(x * y).sum() for x, y in zip(left, right, strict=True)]


def stacked(columns: list[Tensors], like: Tensor) -> Tensor:
    """[F, columns] of lists of F numbers; an empty list is a column of zeros."""
    count = max(map(len, columns))
    zeros = torch.zeros(count, dtype=torch.float32, device=like.device)
    return torch.stack([torch.stack(column) if column else zeros for column in columns], 1)

"""AdaFactor (Shazeer & Stern 2018, arXiv 1804.04235; kexue.fm/archives/7302), exact on any number of ranks.

With t counting updates from 1, for a tensor with rows i and columns j:

    β̂2 = 1 - t^-c            R_i = β̂2 R_i + (1-β̂2) mean_j(g²_ij + ε1)        C_j alike, over i
    V_ij = R_i C_j / mean(R)   U = g / √V   (a vector keeps V itself)
    Û = U / max(1, RMS(U)/d)   α = lr · max(ε2, RMS(θ))   θ ← θ - α Û - lr · decay · θ

The paper has sums where R and C are means here; V is the same. R, C and both RMS are of the whole tensor:
they come from sums over all fragments in two all-reduces of 4 · (rows + columns + a few) bytes per tensor. R
and C are the same on every rank, so the state of a matrix is rows + columns numbers. Momentum, if wanted,
averages Û, before α (as Su's does), and is kept in slices beside the master weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import FragmentOptimizer, products, refuse_unless, squares
from .boxes import Box, boxes_of_run
from .bucket import Bucket
from .schedule import RelativeStep

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"relative_step": True},
    "bert4keras": {"min_dim_size_to_factor": 128, "factored_dimensions": "largest"},
}
"""paper: the step size of the paper, min(0.01, 1/√t), times the learning rate, to be set to 1.
bert4keras: Su's optimizer with an explicit learning rate (his default: 0.001)."""


class AdaFactor(FragmentOptimizer):
    """See the module. State: row and column means on every rank, slices for vectors and momentum."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        decay_exponent: float = 0.8,
        epsilon_gradient: float = 1e-30,
        epsilon_scale: float = 1e-3,
        clip_threshold: float | None = 1.0,
        parameter_scale: bool = True,
        relative_step: bool = False,
        warmup_initialisation: bool = False,
        momentum: float = 0.0,
        min_dim_size_to_factor: int = 0,
        factored_dimensions: str = "last",
        **shared: Any,
    ):
        """
        decay_exponent: c of β̂2 = 1 - t^-c.
        epsilon_gradient: ε1, added to g². epsilon_scale: ε2, the least RMS(θ).
        clip_threshold: d; None: no update clipping. parameter_scale: False: α = lr.
        relative_step: multiply the learning rate by min(0.01, 1/√t), or with warmup_initialisation
            min(1e-6 t, 1/√t). momentum: β1, 0: none (and no memory for it).
        min_dim_size_to_factor: factor only when both dimensions have at least this size; 0: always.
        factored_dimensions: "last" (the last two) or "largest" (the two largest) of three or more.
        shared: settings of every optimizer, see FragmentOptimizer.
        """
        super().__init__(named_parameters, **shared)
        refuse_unless(
            {
                f"decay_exponent is {decay_exponent!r}, expected 0 < c <= 1": 0 < decay_exponent <= 1,
                f"epsilon_gradient is {epsilon_gradient!r}, expected above 1e-37": epsilon_gradient > 1e-37,
                f"epsilon_scale is {epsilon_scale!r}, expected 0 or more": epsilon_scale >= 0,
                f"clip_threshold is {clip_threshold!r}, expected a positive number or None": (
                    clip_threshold is None or clip_threshold > 0
                ),
                f"momentum is {momentum!r}, expected 0 <= momentum < 1": 0 <= momentum < 1,
                f"factored_dimensions is {factored_dimensions!r}, expected 'last' or 'largest'": (
                    factored_dimensions in ("last", "largest")
                ),
            }
        )
        self.decay_exponent = decay_exponent
        self.epsilon_gradient = epsilon_gradient
        self.epsilon_scale = epsilon_scale
        self.clip_threshold = clip_threshold
        self.parameter_scale = parameter_scale
        self.momentum = momentum
        self._relative_step = RelativeStep(warmup_initialisation) if relative_step else None
        self._factored = {
            name: factored_pair(shape, min_dim_size_to_factor, factored_dimensions)
            for name, shape in self._shapes.items()
        }

    # ---- layout of row and column statistics ---------------------------------------------------------------

    def _first_sums(self) -> dict[str, tuple[int, ...]]:
        """Row and column sums of all factored tensors, end to end."""
        self._factors = [
            _Factors(index, shape, *pair)
            for index, (name, shape) in enumerate(self.fragments.shapes.items())
            if (pair := self._factored[name]) is not None
        ]
        return {
            "row": (sum(f.row_shape.numel() for f in self._factors),),
            "column": (sum(f.column_shape.numel() for f in self._factors),),
        }

    def _second_sums(self) -> tuple[str, ...]:
        with_momentum = ("momentum", "momentum_update", "momentum_weight") if self.momentum else ()
        return ("update", "update_weight", *with_momentum)

    def _allocate(self) -> None:
        device, first = self.fragments.device, self._first
        self._row_mean, self._column_mean = torch.zeros_like(first["row"]), torch.zeros_like(first["column"])
        row_sizes = [f.row_shape.numel() for f in self._factors]
        column_sizes = [f.column_shape.numel() for f in self._factors]
        # A row sum has as many terms as there are columns, and the other way round.
        self._row_terms = _repeat([f.shape[f.column] for f in self._factors], row_sizes, device)
        self._column_terms = _repeat([f.shape[f.row] for f in self._factors], column_sizes, device)
        parts = (first["row"], first["column"], self._row_mean, self._column_mean)
        sizes = (row_sizes, column_sizes, row_sizes, column_sizes)
        split = [part.split(size) for part, size in zip(parts, sizes, strict=True)]
        self._by_tensor: list[_Factors | None] = [None] * self._count
        for position, factors in enumerate(self._factors):
            factors.row_sum = split[0][position].view(factors.row_shape)
            factors.column_sum = split[1][position].view(factors.column_shape)
            factors.row_mean = split[2][position].view(factors.row_shape)
            factors.column_mean = split[3][position].view(factors.column_shape)
            self._by_tensor[factors.tensor] = factors
        self._boxes: list[list[Box]] = [
            boxes_of_run(fragment.shape, fragment.offset, fragment.length)
            for fragment in self.fragments.fragments
        ]
        self._new_slices("second_moment", lambda tensor: self._by_tensor[tensor] is None)
        if self.momentum:
            self._new_slices("momentum")

    # ---- the two rounds ------------------------------------------------------------------------------------

    def _add_gradient_sums(self, first: Bucket, gradients: list[Tensor]) -> None:
        totals = []
        for fragment, boxes, gradient in zip(self.fragments.fragments, self._boxes, gradients, strict=True):
            squared = gradient.square()
            totals.append(squared.sum())
            factors = self._by_tensor[fragment.tensor]
            if factors is None:
                continue
            for box in boxes:
                part = box.of_flat(squared)
                box.of_whole(factors.row_sum).add_(part.sum(factors.column, keepdim=True))
                box.of_whole(factors.column_sum).add_(part.sum(factors.row, keepdim=True))
        self._add(first["gradient"], totals)

    def _prepare(self, first: Bucket, gradients: list[Tensor], weights: list[Tensor], second: Bucket) -> None:
        new_share = float(self.updates) ** -self.decay_exponent  # 1 - β̂2
        clip, epsilon = self.global_clip_factor, self.epsilon_gradient
        for mean, sums, terms in (
            (self._row_mean, first["row"], self._row_terms),
            (self._column_mean, first["column"], self._column_terms),
        ):
            mean.lerp_((sums / terms).mul_(clip * clip).add_(epsilon), new_share)
        owned = zip(self.fragments.fragments, self._boxes, gradients, strict=True)
        for position, (fragment, boxes, gradient) in enumerate(owned):
            if clip != 1.0:
                gradient.mul_(clip)
            factors = self._by_tensor[fragment.tensor]
            if factors is None:
                moment = self._sliced["second_moment"][position]
                moment.lerp_(gradient.square().add_(epsilon), new_share)
                gradient.mul_(moment.rsqrt())
                continue
            row = (factors.row_mean / factors.row_mean.mean(factors.row, keepdim=True)).rsqrt_()
            column = factors.column_mean.rsqrt()
            for box in boxes:
                box.of_flat(gradient).mul_(box.of_whole(row)).mul_(box.of_whole(column))
        self._add(second["update"], squares(gradients))
        if self._decays:
            self._add(second["update_weight"], products(gradients, weights))
        if self.momentum:
            momenta = self._slices("momentum")
            self._add(second["momentum"], squares(momenta))
            self._add(second["momentum_update"], products(momenta, gradients))
            if self._decays:
                self._add(second["momentum_weight"], products(momenta, weights))

    def _apply(self, first: Bucket, second: Bucket, directions: list[Tensor], weights: list[Tensor]) -> None:
        update_rms = (second["update"] / self._numel).sqrt()
        clip = torch.ones_like(update_rms)
        if self.clip_threshold is not None:
            clip = 1.0 / (update_rms / self.clip_threshold).clamp(min=1.0)
        learning_rate = self.learning_rate * self._learning_rate_scale
        if self._relative_step is not None:
            learning_rate = learning_rate * self._relative_step(self.updates)
        decay = learning_rate * self._weight_decay  # not multiplied by the parameter scale
        scale = torch.ones_like(learning_rate)
        if self.parameter_scale:
            weight_rms = (first["weight"] / self._numel).sqrt().clamp(min=self.epsilon_scale)
            scale = torch.where(self._adapt, weight_rms, scale)
        step = learning_rate * scale
        take = (1.0 - self.momentum) * clip
        self._column("update_square_sum").copy_(self._update_square_sum(first, second, step, take, decay))
        self._column("update_rms").copy_(update_rms)
        self._column("clip_factor").copy_(clip)

        keep, numbers = self.momentum, torch.stack([step, take, decay]).tolist()
        for position, (fragment, weight) in enumerate(zip(self.fragments.fragments, weights, strict=True)):
            size, share, lost = (column[fragment.tensor] for column in numbers)
            if lost:
                weight.add_(weight, alpha=-lost)
            if keep:
                momentum = self._sliced["momentum"][position]
                momentum.mul_(keep).add_(directions[position], alpha=share)
                weight.add_(momentum, alpha=-size)
            else:
                weight.add_(directions[position], alpha=-size * share)

    def _update_square_sum(
        self, first: Bucket, second: Bucket, step: Tensor, take: Tensor, decay: Tensor
    ) -> Tensor:
        """Σ(Δθ)², [T], of Δθ = -step · (β1 m + take · U) - decay · θ, multiplied out: all its sums are known
        from the two rounds, so that none has to be taken over the difference itself."""
        moved = take**2 * second["update"]
        aligned = take * second["update_weight"]
        if self.momentum:
            moved = moved + 2 * self.momentum * take * second["momentum_update"]
            moved = moved + self.momentum**2 * second["momentum"]
            aligned = aligned + self.momentum * second["momentum_weight"]
        squared = step**2 * moved + 2 * step * decay * aligned + decay**2 * first["weight"]
        return squared.clamp_(min=0.0)

    def _replicated(self) -> dict[str, Tensor]:
        names = self.fragments.names
        rows = {f"row_mean|{names[f.tensor]}": f.row_mean for f in self._factors}
        return rows | {f"column_mean|{names[f.tensor]}": f.column_mean for f in self._factors}


class _Factors:
    """Row and column statistics of one tensor; the dimension summed over is kept with size 1."""

    row_sum: Tensor
    column_sum: Tensor
    row_mean: Tensor
    column_mean: Tensor

    def __init__(self, tensor: int, shape: torch.Size, row: int, column: int):
        self.tensor, self.shape, self.row, self.column = tensor, shape, row, column
        self.row_shape = torch.Size(1 if d == column else size for d, size in enumerate(shape))
        self.column_shape = torch.Size(1 if d == row else size for d, size in enumerate(shape))


def factored_pair(shape: Iterable[int], min_dim_size: int, dimensions: str) -> tuple[int, int] | None:
    """(row dimension, column dimension) to factor, or None: the whole second moment is kept."""
    sizes = list(shape)
    if len(sizes) < 2:
        return None
    if dimensions == "largest":
        pair = sorted(sorted(range(len(sizes)), key=lambda d: (sizes[d], d))[-2:])
    else:
        pair = [len(sizes) - 2, len(sizes) - 1]
    return (pair[0], pair[1]) if min(sizes[pair[0]], sizes[pair[1]]) >= min_dim_size else None


def settings_of_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `preset` by what it stands for; settings given beside it win. Raises ValueError."""
    given = dict(settings)
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
    return {**PRESETS.get(preset, {}), **given}


def _repeat(values: list[int], times: list[int], device: torch.device) -> Tensor:
    counts = torch.tensor(times, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

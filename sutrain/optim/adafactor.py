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

import math
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from .base import FragmentOptimizer
from .bucket import Bucket
from .kernels import Layout, build_kernels
from .per_tensor import refuse_unless
from .schedule import RelativeStep

NEVER_FACTORED = 1_000_000
"""A min_dim_size_to_factor that no matrix has in both dimensions."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"relative_step": True},
    "bert4keras": {"min_dim_size_to_factor": 128, "factored_dimensions": "largest"},
    "bert4keras_finetune": {
        "min_dim_size_to_factor": NEVER_FACTORED,
        "factored_dimensions": "largest",
        "momentum": 0.9,
    },
    "torch": {
        "epsilon_gradient": 0.0,
        "epsilon_root": torch.finfo(torch.float32).eps,
        "inverse_sqrt_cap": True,
    },
}
"""paper: the step size of the paper, min(0.01, 1/√t), times the learning rate, to be set to 1.
bert4keras: Su's optimizer with an explicit learning rate (his default: 0.001).
bert4keras_finetune: what his fine-tuning on CLUE ran with: nothing factored, momentum; learning rate 5e-4.
torch: torch.optim.Adafactor with its defaults (learning rate 0.01)."""


class AdaFactor(FragmentOptimizer):
    """See the module. State: row and column means on every rank, slices for vectors and momentum."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        decay_exponent: float = 0.8,
        epsilon_gradient: float = 1e-30,
        epsilon_root: float = 0.0,
        epsilon_scale: float = 1e-3,
        clip_threshold: float | None = 1.0,
        parameter_scale: bool = True,
        relative_step: bool = False,
        warmup_initialisation: bool = False,
        inverse_sqrt_cap: bool = False,
        momentum: float = 0.0,
        min_dim_size_to_factor: int = 0,
        factored_dimensions: str = "last",
        **shared: Any,
    ):
        """
        decay_exponent: c of β̂2 = 1 - t^-c.
        epsilon_gradient: ε1, added to g². epsilon_scale: ε2, the least RMS(θ).
        epsilon_root: least √V, and least mean(R); 0: none. (How torch.optim.Adafactor uses its ε1.)
        clip_threshold: d; None: no update clipping. parameter_scale: False: α = lr.
        relative_step: multiply the learning rate by min(0.01, 1/√t), or with warmup_initialisation
            min(1e-6 t, 1/√t). inverse_sqrt_cap: α takes min(lr, 1/√t) for lr, weight decay does not.
        momentum: β1, 0: none (and no memory for it).
        min_dim_size_to_factor: factor only when both dimensions have at least this size; 0: always.
        factored_dimensions: "last" (the last two) or "largest" (the two largest) of three or more.
        shared: settings of every optimizer, see FragmentOptimizer.
        """
        super().__init__(named_parameters, **shared)
        refuse_unless(
            {
                f"decay_exponent is {decay_exponent!r}, expected 0 < c <= 1": 0 < decay_exponent <= 1,
                f"epsilon_gradient is {epsilon_gradient!r}, expected above 1e-37, or 0 with epsilon_root": (
                    epsilon_gradient > 1e-37 or (epsilon_gradient == 0 and epsilon_root > 0)
                ),
                f"epsilon_root is {epsilon_root!r}, expected 0 or 1e-18..1": (
                    epsilon_root == 0 or 1e-18 <= epsilon_root <= 1
                ),
                "relative_step and inverse_sqrt_cap are both set: choose one": not (
                    relative_step and inverse_sqrt_cap
                ),
                "warmup_initialisation has no effect without relative_step: set that too": (
                    relative_step or not warmup_initialisation
                ),
                f"epsilon_scale is {epsilon_scale!r}, expected 0 or more": epsilon_scale >= 0,
                f"clip_threshold is {clip_threshold!r}, expected a positive number, or null: off": (
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
        self.epsilon_root = epsilon_root
        self.epsilon_scale = epsilon_scale
        self.inverse_sqrt_cap = inverse_sqrt_cap
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
        shapes = self.fragments.shapes
        pairs = [self._factored[name] for name in shapes]
        self._layout = Layout.of(self.fragments, pairs)
        return {"factored": (self._layout.rows + self._layout.columns,)}

    def _second_sums(self) -> tuple[str, ...]:
        with_momentum = ("momentum", "momentum_update", "momentum_weight") if self.momentum else ()
        return ("update", "update_weight", *with_momentum)

    def _allocate(self) -> None:
        device, factored = self.fragments.device, self._layout.factored
        self._means = torch.zeros_like(self._first["factored"])
        sizes = [self._layout.rows, self._layout.columns]
        self._row_mean, self._column_mean = self._means.split(sizes)
        self._row_sums, self._column_sums = self._first["factored"].split(sizes)
        # A row sum has as many terms as there are columns, and the other way round.
        row_terms = [(f.shape[f.column], prod(f.row_shape)) for f in factored]
        self._terms = _repeat(row_terms + [(f.shape[f.row], prod(f.column_shape)) for f in factored], device)
        self._new_slices("second_moment", lambda tensor: self._layout.factors[tensor] is None)
        moments = [self._sliced["second_moment"].get(i) for i in range(len(self._layout.fragments))]
        if self.momentum:
            self._new_slices("momentum")
        momenta = self._slices("momentum") if self.momentum else None
        self._passes = build_kernels(self.kernels, self._layout, device, moments, momenta)

    # ---- the two rounds ------------------------------------------------------------------------------------

    def _add_first_sums(self, first: Bucket) -> None:
        sums = self._passes.square_sums(self._row_sums, self._column_sums)
        first["gradient"].index_add_(0, self._owners, sums)

    def _prepare(self, first: Bucket) -> Tensor:
        new_share = float(self.updates) ** -self.decay_exponent  # 1 - β̂2
        clip, epsilon = self.global_clip_factor, self.epsilon_gradient
        self._means.lerp_((first["factored"] / self._terms).mul_(clip * clip).add_(epsilon), new_share)
        self._limit = 1.0 / self.epsilon_root if self.epsilon_root else math.inf
        self._factors = self._passes.factors(self._row_mean, self._column_mean, self.epsilon_root)
        weighted = self._decays and self._needs_update_norms
        return self._passes.adafactor_sums(self._factors, clip, new_share, epsilon, self._limit, weighted)

    def _apply(self, second: Bucket) -> None:
        update_rms = (second["update"] / self._numel).sqrt()
        clip = torch.ones_like(update_rms)
        if self.clip_threshold is not None:
            clip = 1.0 / (update_rms / self.clip_threshold).clamp(min=1.0)
        relative = 1.0 if self._relative_step is None else self._relative_step(self.updates)
        learning_rate = self.learning_rate * relative * self._learning_rate_scale
        decay = learning_rate * self._weight_decay  # not multiplied by the parameter scale
        if self.inverse_sqrt_cap:
            learning_rate = learning_rate.clamp(max=1.0 / math.sqrt(self.updates))
        scale = torch.ones_like(learning_rate)
        if self.parameter_scale:
            weight_rms = (second["weight"] / self._numel).sqrt().clamp(min=self.epsilon_scale)
            scale = torch.where(self._adapt, weight_rms, scale)
        step, take = learning_rate * scale, (1.0 - self.momentum) * clip
        if self._needs_update_norms:
            guard = self._guarded(self._update_square_sum(second, step, take, decay))
            step, decay = step * guard, decay * guard
        self._column("update_rms").copy_(update_rms)
        self._column("clip_factor").copy_(clip)
        numbers = torch.stack([step, take, decay])
        self._passes.adafactor_apply(
            self._factors, self.global_clip_factor, self._limit, self.momentum, numbers
        )

    def _update_square_sum(self, second: Bucket, step: Tensor, take: Tensor, decay: Tensor) -> Tensor:
        """Σ(Δθ)², [T], of Δθ = -step · (β1 m + take · U) - decay · θ, multiplied out: all its sums are known
        from round two, so that none has to be taken over the difference itself."""
        moved = take**2 * second["update"]
        aligned = take * second["update_weight"]
        if self.momentum:
            moved = moved + 2 * self.momentum * take * second["momentum_update"]
            moved = moved + self.momentum**2 * second["momentum"]
            aligned = aligned + self.momentum * second["momentum_weight"]
        squared = step**2 * moved + 2 * step * decay * aligned + decay**2 * second["weight"]
        return squared.clamp_(min=0.0)

    def _replicated(self) -> dict[str, Tensor]:
        names, factored = self.fragments.names, self._layout.factored
        rows = {f"row_mean|{names[f.tensor]}": f.rows(self._row_mean) for f in factored}
        return rows | {f"column_mean|{names[f.tensor]}": f.columns(self._column_mean) for f in factored}


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
    if preset is not None and preset not in list(PRESETS):
        raise ValueError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}")
    return {**PRESETS.get(preset, {}), **given}


def _repeat(values_and_times: list[tuple[int, int]], device: torch.device) -> Tensor:
    table = torch.tensor(values_and_times, dtype=torch.int64).view(-1, 2)
    return table[:, 0].float().repeat_interleave(table[:, 1]).to(device)

"""What all fragment optimizers share: attaching to fragments, clipping, statistics, counters and state by
name.

An update has two rounds. Round one sums Σθ² and Σg² of every tensor (and AdaFactor's row and column sums)
over all
fragments: from it come the global gradient norm, the clip factor and the decision whether to apply the update
at all, the same on every rank. Round two sums what the size of the update depends on. Each round is one
all-reduce of a few numbers per tensor. No tensor is gathered, and no statistic is taken from a slice alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket
from .fragments import FragmentError, FragmentMap, is_optimized
from .state import OptimizerState, ReadSlice, StateError

STATISTICS = (
    "weight_square_sum",
    "grad_square_sum",
    "update_square_sum",
    "numel",
    "update_rms",
    "clip_factor",
    "trust_ratio",
)
"""Columns of `statistics`, each of the whole logical tensor. Weights are those the update started from;
gradients those the engine handed over, before any clipping; the update is the fp32 difference applied, with
learning rate and weight decay in it. update_rms (before clipping) and clip_factor are AdaFactor's,
trust_ratio is LAMB's; else NaN."""

PER_TENSOR = ("learning_rate_scale", "weight_decay", "adapt")
"""Settings that may differ between tensors. adapt=False: AdaFactor without parameter scale, LAMB without
trust ratio."""


class FragmentOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: `attach` a FragmentMap, then use as any torch optimizer.

    step() uses the gradients up: their memory holds the update afterwards.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1.0,
        weight_decay: float = 0.0,
        clip_global_norm: float | None = None,
        skip_nonfinite: bool = True,
        per_tensor: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """
        learning_rate: first value of param_groups[0]["lr"], which a trainer sets before each step.
        weight_decay: decoupled: θ loses learning rate · weight_decay · θ, unscaled by the tensor's size.
        clip_global_norm: scale all gradients down together when their global norm exceeds this; None: off.
        skip_nonfinite: leave weights, state and counters alone when a gradient is infinite or not a number.
        per_tensor: {glob over tensor names: {learning_rate_scale, weight_decay, adapt}}, later ones win.
        """
        refuse_unless(
            {
                f"learning_rate is {learning_rate!r}, expected 0 or more": learning_rate >= 0,
                f"weight_decay is {weight_decay!r}, expected 0 or more": weight_decay >= 0,
                f"clip_global_norm is {clip_global_norm!r}, expected a positive number or None": (
                    clip_global_norm is None or clip_global_norm > 0
                ),
            }
        )
        parameters = {name: parameter for name, parameter in named_parameters if is_optimized(parameter)}
        super().__init__(list(parameters.values()), {"lr": learning_rate})
        self.tensor_names = list(parameters)
        self.clip_global_norm = clip_global_norm
        self.skip_nonfinite = skip_nonfinite
        self.updates = 0
        """Updates applied; what β̂2 and bias corrections count."""
        self.skipped_updates = 0
        self.last_update_applied = False
        self.global_grad_norm = math.nan
        """Norm of all gradients before clipping, of the last step."""
        self.global_clip_factor = 1.0
        self._choices = _choices_per_tensor(self.tensor_names, weight_decay, per_tensor or {})
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._fragments: FragmentMap | None = None
        self._sliced: dict[str, dict[int, Tensor]] = {}  # state key -> position in fragments -> values

    # ---- what an optimizer defines -------------------------------------------------------------------------

    def _first_sums(self) -> dict[str, tuple[int, ...]]:
        """Further sums of round one: bucket key -> shape."""
        return {}

    def _second_sums(self) -> tuple[str, ...]:
        """Per-tensor sums of round two: bucket keys."""
        raise NotImplementedError

    def _allocate(self) -> None:
        """Create state, zeros, when the fragments are known."""

    def _add_gradient_sums(self, first: Bucket, gradients: list[Tensor]) -> None:
        """Add this rank's part of Σg², and of the further sums of round one."""
        self._add(first["gradient"], squares(gradients))

    def _prepare(self, first: Bucket, gradients: list[Tensor], weights: list[Tensor], second: Bucket) -> None:
        """Advance state, turn gradients into directions in place, add this rank's part of round two."""
        raise NotImplementedError

    def _apply(self, first: Bucket, second: Bucket, directions: list[Tensor], weights: list[Tensor]) -> None:
        """Change the weights and fill update_square_sum and the optimizer's own columns of `statistics`."""
        raise NotImplementedError

    # ---- attaching -----------------------------------------------------------------------------------------

    @property
    def fragments(self) -> FragmentMap:
        """Raises RuntimeError before attach()."""
        if self._fragments is None:
            raise RuntimeError("call optimizer.attach(FragmentMap.from_engine(engine)) before training")
        return self._fragments

    def attach(self, fragments: FragmentMap) -> None:
        """Learn which parts of which tensors this process updates. Raises FragmentError."""
        if self._fragments is not None:
            raise FragmentError("the optimizer is attached already; build a new one for another engine")
        held = [id(tensor) for group in self.param_groups for tensor in group["params"]]
        if sorted(held) != sorted(map(id, fragments.buffers)):
            raise FragmentError("the fragment map belongs to another optimizer or engine than this one")
        if self._shapes != fragments.shapes:
            unlike = {name for name, _ in self._shapes.items() ^ fragments.shapes.items()}
            raise FragmentError(
                f"names or shapes differ from those given to the optimizer: {', '.join(sorted(unlike))}"
            )
        self.tensor_names = list(fragments.names)
        columns = [self._choices[name] for name in fragments.names]
        device = fragments.device
        self._fragments = fragments
        self._count = len(fragments.names)
        scales, decays = ([float(c[key]) for c in columns] for key in ("learning_rate_scale", "weight_decay"))
        self._learning_rate_scale = torch.tensor(scales, device=device)
        self._weight_decay = torch.tensor(decays, device=device)
        self._decays = any(decays)
        self._adapt = torch.tensor([c["adapt"] for c in columns], dtype=torch.bool, device=device)
        self._numel = torch.tensor([float(s.numel()) for s in fragments.shapes.values()], device=device)
        self._owners = torch.tensor([f.tensor for f in fragments.fragments], dtype=torch.int64, device=device)
        first = {"weight": (self._count,), "gradient": (self._count,), **self._first_sums()}
        self._first = Bucket(first, device)
        self._second = Bucket(dict.fromkeys(self._second_sums(), (self._count,)), device)
        self.statistics = torch.full((self._count, len(STATISTICS)), math.nan, device=device)
        """fp32 [T, S]: rows by tensor_names, columns by STATISTICS; equal on all ranks, new after a step."""
        self._allocate()

    def _new_slices(self, key: str, wanted: Callable[[int], bool] = lambda tensor: True) -> None:
        """State `key`: flat fp32 zeros for every owned fragment of the wanted tensors (by index)."""
        self._sliced[key] = {
            position: torch.zeros(fragment.length, device=self.fragments.device)
            for position, fragment in enumerate(self.fragments.fragments)
            if wanted(fragment.tensor)
        }

    def _slices(self, key: str) -> list[Tensor]:
        """State `key` of all owned fragments, in their order."""
        return list(self._sliced[key].values())

    # ---- the step ------------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Collective: every rank calls it. Steps with zero gradients before attach() are ignored
        (the 16-bit engine without ZeRO makes one when it starts); others raise RuntimeError there."""
        if closure is not None:
            raise ValueError("closures are not supported: compute the gradients, then call step()")
        if self._fragments is None:
            if any(
                p.grad is not None and p.grad.any() for group in self.param_groups for p in group["params"]
            ):
                self.fragments  # noqa: B018 - raises
            return
        gradients = [fragment.gradient() for fragment in self._fragments.fragments]
        weights = [fragment.values() for fragment in self._fragments.fragments]
        first, second = self._first, self._second
        first.flat.zero_()
        self._add(first["weight"], squares(weights))
        self._add_gradient_sums(first, gradients)
        self._fragments.all_reduce(first.flat)
        self._start_statistics(first)
        self.last_update_applied = math.isfinite(self.global_grad_norm) or not self.skip_nonfinite
        if not self.last_update_applied:
            self.skipped_updates += 1
            return
        self.updates += 1
        second.flat.zero_()
        self._prepare(first, gradients, weights, second)
        self._fragments.all_reduce(second.flat)
        self._apply(first, second, gradients, weights)

    def _start_statistics(self, first: Bucket) -> None:
        self.global_grad_norm = math.sqrt(float(first["gradient"].double().sum()))
        self.global_clip_factor = 1.0
        if self.clip_global_norm is not None and self.global_grad_norm > self.clip_global_norm:
            self.global_clip_factor = self.clip_global_norm / (self.global_grad_norm + 1e-6)
        self.statistics.fill_(math.nan)
        self._column("weight_square_sum").copy_(first["weight"])
        self._column("grad_square_sum").copy_(first["gradient"])
        self._column("update_square_sum").zero_()
        self._column("numel").copy_(self._numel)

    def _column(self, name: str) -> Tensor:
        return self.statistics[:, STATISTICS.index(name)]

    def _add(self, sums: Tensor, values: list[Tensor]) -> None:
        """Add one number per owned fragment to the sum of its tensor."""
        if values:
            sums.index_add_(0, self._owners, torch.stack(values))

    # ---- state ---------------------------------------------------------------------------------------------

    def _replicated(self) -> dict[str, Tensor]:
        """Views of the state that is the same on every rank, by unique key."""
        return {}

    def state_by_name(self) -> OptimizerState:
        """Views of the state, as a checkpoint stores it; independent of world size and ZeRO stage."""
        sliced = [
            (key, self.fragments.fragments[position].name, self.fragments.fragments[position].offset, values)
            for key, slices in self._sliced.items()
            for position, values in slices.items()
        ]
        counters = {"updates": self.updates, "skipped_updates": self.skipped_updates}
        return OptimizerState(self._replicated(), sliced if self.fragments.writes else [], counters)

    def load_state_by_name(
        self, replicated: Mapping[str, Tensor], counters: Mapping[str, int], read: ReadSlice
    ) -> None:
        """Take over saved state, of any world size. Raises StateError, before any change."""
        own = self._replicated()
        problems = [f"missing {key}" for key in own if key not in replicated]
        problems += [f"unexpected {key}" for key in replicated if key not in own]
        problems += [
            f"{key} has shape {tuple(replicated[key].shape)}, expected {tuple(value.shape)}"
            for key, value in own.items()
            if key in replicated and replicated[key].shape != value.shape
        ]
        problems += [
            f"missing counter {key}" for key in ("updates", "skipped_updates") if key not in counters
        ]
        if problems:
            raise StateError(
                "the saved state does not fit this optimizer's settings:\n  " + "\n  ".join(problems)
            )
        loaded = []
        for key, slices in self._sliced.items():
            for position, values in slices.items():
                fragment = self.fragments.fragments[position]
                loaded.append((values, read(key, fragment.name, fragment.offset, fragment.length)))
        for values, saved in loaded:
            values.copy_(saved)
        for key, value in own.items():
            value.copy_(replicated[key])
        self.updates, self.skipped_updates = int(counters["updates"]), int(counters["skipped_updates"])

    def state_dict(self) -> dict[str, Any]:
        """Refused: a torch state dict of flat slices fits one world size only."""
        raise StateError(
            "this optimizer saves its state by tensor name: use state_by_name() instead of state_dict()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as state_dict() is."""
        raise StateError("this optimizer loads its state by tensor name: use load_state_by_name()")


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """Σx² of each flat tensor, 0-dimensional. (At 3e7 elements fp32 dot is off by 4e-4.)"""
    return [tensor.square().sum() for tensor in tensors]


def products(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Σxy of each pair of flat tensors, 0-dimensional."""
    return [(x * y).sum() for x, y in zip(left, right, strict=True)]


def refuse_unless(valid: Mapping[str, bool]) -> None:
    """Raises ValueError with the texts of all conditions that do not hold, one a line."""
    problems = [text for text, holds in valid.items() if not holds]
    if problems:
        raise ValueError("\n".join(problems))


def _choices_per_tensor(
    names: list[str], weight_decay: float, per_tensor: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    choices = {
        name: {"learning_rate_scale": 1.0, "weight_decay": weight_decay, "adapt": True} for name in names
    }
    problems = []
    for pattern, settings in per_tensor.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        problems += (
            []
            if matching
            else [f"per_tensor pattern {pattern!r} matches no tensor; names are like {names[0]}"]
        )
        unknown = sorted(set(settings) - set(PER_TENSOR))
        problems += [
            f"per_tensor {pattern!r}: unknown {key!r}, expected {', '.join(PER_TENSOR)}" for key in unknown
        ]
        problems += [
            f"per_tensor {pattern!r}: {key} is {settings[key]!r}, expected 0 or more"
            for key in ("learning_rate_scale", "weight_decay")
            if settings.get(key, 0) < 0
        ]
        for name in matching:
            choices[name].update({key: settings[key] for key in settings if key in PER_TENSOR})
    if problems:
        raise ValueError("\n".join(problems))
    return choices

"""What all fragment optimizers share: attaching to fragments, clipping, statistics, counters and state by name.

An update has two rounds. Round one sums Σg² of every tensor (and AdaFactor's row and column sums) over all
fragments: from it come the global gradient norm, the clip factor and the decision whether to apply the update
at all, the same on every rank. Round two sums what the size of the update depends on, Σθ² among it: its pass reads
the weights anyway. Each round is one all-reduce of a few numbers per tensor. No tensor is gathered, and no statistic is
taken from a slice alone.

ZeRO-3 calls step() once for every sub-group of tensors. A sub-group is then a part: an optimizer of its own over its
own tensors, with its own buckets and state, made from this one in attach(). What an optimizer defines (below) runs on
a part, whose `fragments`, `statistics` and state are the part's alone; where step() takes everything at once, as in
ZeRO 0, 1 and 2, the optimizer is its own only part. The update count, the clip factor and the decision to apply an
update are taken with the first part and shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket
from .columns import STATISTICS
from .fragments import Fragment, FragmentError, FragmentMap, is_optimized, whole_shape
from .guard import GUARD_WINDOW, UpdateGuard, valid_guard
from .kernels import KERNELS, CompiledKernels, EagerKernels
from .kernels.eager import squares, stacked
from .logical import Parts, rows_of_parts, shapes_of_parts
from .per_tensor import choices_per_tensor, refuse_unless
from .state import STARTS_AT_ZERO, OptimizerState, ReadSlice, StateError, changes, kind_of, refuse_other_state


class FragmentOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: `attach` a FragmentMap, then use as any torch optimizer.

    step() may use the gradients up: their memory is its scratch space.
    """

    _passes: CompiledKernels | EagerKernels

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1.0,
        weight_decay: float = 0.0,
        clip_global_norm: float | None = None,
        skip_nonfinite: bool = True,
        per_tensor: Mapping[str, Mapping[str, Any]] | None = None,
        logical_tensors: Mapping[str, Parts] | None = None,
        update_guard: float | None = None,
        guard_window: int = GUARD_WINDOW,
        kernels: str = "auto",
        statistics: bool = True,
    ):
        """
        learning_rate: first value of param_groups[0]["lr"], which a trainer sets before each step.
        weight_decay: decoupled: θ loses learning rate · weight_decay · θ, unscaled by the tensor's size.
        clip_global_norm: scale all gradients down together when their global norm exceeds this; None: off.
        skip_nonfinite: leave weights, state and counters alone when a gradient is infinite or not a number.
        per_tensor: {glob over tensor names: {learning_rate_scale, weight_decay, adapt}}, later ones win.
        logical_tensors: {glob over parameter names: a number of equal parts along the first dimension, or the rows
            of each}: a fused QKV (3) is three tensors, NAME#0, NAME#1 and NAME#2.
        update_guard, guard_window: see UpdateGuard; None: off. kernels: see build_kernels.
        statistics: False leaves the norms of updates NaN and saves what serves them alone.
        """
        refuse_unless(
            {
                f"learning_rate is {learning_rate!r}, expected 0 or more": learning_rate >= 0,
                f"weight_decay is {weight_decay!r}, expected 0 or more": weight_decay >= 0,
                f"clip_global_norm is {clip_global_norm!r}, expected a positive number, or null: off": (
                    clip_global_norm is None or clip_global_norm > 0
                ),
                **valid_guard(update_guard, guard_window),
                f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}": kernels in KERNELS,
            }
        )
        parameters = {name: parameter for name, parameter in named_parameters if is_optimized(parameter)}
        super().__init__(list(parameters.values()), {"lr": learning_rate})
        whole = {name: whole_shape(parameter) for name, parameter in parameters.items()}
        self._rows = rows_of_parts(logical_tensors or {}, whole)
        self._shapes = shapes_of_parts(whole, self._rows)
        self.tensor_names = list(self._shapes)
        self.clip_global_norm = clip_global_norm
        self.skip_nonfinite = skip_nonfinite
        self.kernels = kernels
        self._guard_settings = None if update_guard is None else (update_guard, int(guard_window))
        self._guard: UpdateGuard | None = None
        self._needs_update_norms = statistics or update_guard is not None
        self.updates = 0
        """Updates applied; what β̂2 and bias corrections count."""
        self.skipped_updates = 0
        self.last_update_applied = False
        self.gate: Callable[[float], bool] | None = None
        """Asked with the global gradient norm whether the update is made; the same answer on every rank."""
        self.global_clip_factor = 1.0
        self._global_grad_norm: Tensor | float = math.nan
        self._choices = choices_per_tensor(self.tensor_names, weight_decay, per_tensor or {})
        self._fragments: FragmentMap | None = None
        self._parts: list[FragmentOptimizer] = []
        self._next_part = 0
        self._sliced: dict[str, dict[int, Tensor]] = {}  # state key -> position in fragments -> values

    # ---- what an optimizer defines -------------------------------------------------------------------------

    def _first_sums(self) -> dict[str, tuple[int, ...]]:
        """Further sums of round one: bucket key -> shape."""
        return {}

    def _second_sums(self) -> tuple[str, ...]:
        """Per-tensor sums of round two, behind "weight": bucket keys."""
        raise NotImplementedError

    def _allocate(self) -> None:
        """Create state, zeros, and self._passes, when the fragments are known."""
        raise NotImplementedError

    def _add_first_sums(self, first: Bucket) -> None:
        """Add this rank's part of Σg², and of the further sums of round one."""
        nothing = torch.empty(0, device=first.flat.device)
        first["gradient"].index_add_(0, self._owners, self._passes.square_sums(nothing, nothing))

    def _prepare(self, first: Bucket) -> Tensor:
        """Advance state; gradients may be used up. Σθ² and the second sums of every fragment, in their order, [F, S];
        further columns do not count."""
        raise NotImplementedError

    def _apply(self, second: Bucket) -> None:
        """Change the weights by what _guarded() leaves, fill the optimizer's own columns of `statistics`."""
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
        handed_over = [] if fragments.around.in_parts else sorted(map(id, fragments.buffers))
        if sorted(held) != handed_over:
            raise FragmentError("the fragment map belongs to another optimizer or engine than this one")
        fragments = fragments.split(self._rows)
        if self._shapes != fragments.shapes:
            unlike = {name for name, _ in self._shapes.items() ^ fragments.shapes.items()}
            raise FragmentError(
                f"names or shapes differ from those given to the optimizer: {', '.join(sorted(unlike))}"
            )
        self.tensor_names = list(fragments.names)
        self._fragments = fragments
        self.statistics = torch.full(
            (len(fragments.names), len(STATISTICS)), math.nan, device=fragments.device
        )
        """fp32 [T, S]: rows by tensor_names, columns by STATISTICS; equal on all ranks, new after a step."""
        pieces, row = fragments.parts(), 0
        for piece in pieces:
            part = self if piece is fragments else self._part(piece)
            rows = slice(row, row + len(piece.names))
            if self.tensor_names[rows] != piece.names:
                raise FragmentError("the engine hands tensors over in another order than the model has them")
            part.statistics, row = self.statistics[rows], rows.stop
            part._attach()
            self._parts.append(part)

    def _part(self, piece: FragmentMap) -> FragmentOptimizer:
        """An optimizer over some of the tensors, with all settings of this one."""
        part: FragmentOptimizer = object.__new__(type(self))
        part.__dict__.update(self.__dict__, _fragments=piece, _sliced={}, tensor_names=list(piece.names))
        return part

    def _attach(self) -> None:
        """Lay out sums and state for the tensors of self.fragments."""
        fragments = self.fragments
        columns = [self._choices[name] for name in fragments.names]
        device = fragments.device
        self._count = len(fragments.names)
        scales, decays = ([float(c[key]) for c in columns] for key in ("learning_rate_scale", "weight_decay"))
        self._learning_rate_scale = torch.tensor(scales, device=device)
        self._weight_decay = torch.tensor(decays, device=device)
        self._decays = any(decays)
        self._adapt = torch.tensor([c["adapt"] for c in columns], dtype=torch.bool, device=device)
        self._numel = torch.tensor([float(s.numel()) for s in fragments.shapes.values()], device=device)
        self._owners = torch.tensor([f.tensor for f in fragments.fragments], dtype=torch.int64, device=device)
        self._first = Bucket({"gradient": (self._count,), **self._first_sums()}, device)
        self._second = Bucket(dict.fromkeys(("weight", *self._second_sums()), (self._count,)), device)
        if self._guard_settings is not None:
            self._guard = UpdateGuard(*self._guard_settings, fragments.names, device)
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
        part = self._part_to_step()
        part.param_groups = self.param_groups  # the engine may have put another list there
        fragments = part.fragments
        gradients = fragments.gradients()
        scaler = fragments.around.loss_scaler
        if scaler is not None and (correction := scaler.correction()) != 1.0:
            for gradient in gradients:
                gradient.mul_(correction)
        first, second = part._first, part._second
        first.flat.zero_()
        part._passes.begin(gradients)
        part._add_first_sums(first)
        fragments.all_reduce(first.flat)
        if part is self._parts[0]:
            self._decide(first)
        part.updates, part.global_clip_factor = self.updates, self.global_clip_factor
        part.last_update_applied = self.last_update_applied
        second.flat.zero_()
        part._add_second_sums(part._prepare(first) if self.last_update_applied else part._weight_sums())
        fragments.all_reduce(second.flat)
        part._start_statistics(first, second)
        if self.last_update_applied:
            part._apply(second)
        part._passes.end()
        if part is self._parts[-1]:
            fragments.around.forget_gradients()

    def _part_to_step(self) -> FragmentOptimizer:
        """The part whose turn it is. Raises RuntimeError when the engine hands over another one."""
        part = self._parts[self._next_part]
        self._next_part = (self._next_part + 1) % len(self._parts)
        if self.fragments.around.in_parts:
            held = [tensor for group in self.param_groups for tensor in group["params"]]
            if len(held) != 1 or held[0] is not part.fragments.buffers[0]:
                raise RuntimeError(
                    "the engine calls step() for its sub-groups in another order than it has them"
                )
        return part

    def _decide(self, first: Bucket) -> None:
        """Is the update applied, and how much are gradients scaled down? The same on every rank.

        The one number read back from the device is the gradient norm, and only where clipping is asked for or the
        engine does not drop an infinite update itself.
        """
        around = self.fragments.around
        if around.grad_norm is None:
            self._global_grad_norm = first["gradient"].double().sum().sqrt()
        else:
            correction = 1.0 if around.loss_scaler is None else around.loss_scaler.correction()
            self._global_grad_norm = around.grad_norm() * correction
        looks = self.skip_nonfinite and not around.checks_finite
        self.last_update_applied = not looks or math.isfinite(self.global_grad_norm)
        if self.last_update_applied and self.gate is not None:
            self.last_update_applied = self.gate(self.global_grad_norm)
        self.global_clip_factor = 1.0
        if self.clip_global_norm is not None and self.global_grad_norm > self.clip_global_norm:
            self.global_clip_factor = self.clip_global_norm / (self.global_grad_norm + 1e-6)
        if self.last_update_applied:
            self.updates += 1
        else:
            self.skipped_updates += 1

    @property
    def global_grad_norm(self) -> float:
        """Norm of all gradients before clipping, of the last step. (Waits for the device, once.)"""
        self._global_grad_norm = float(self._global_grad_norm)
        return self._global_grad_norm

    def _start_statistics(self, first: Bucket, second: Bucket) -> None:
        self.statistics.fill_(math.nan)
        self._column("weight_square_sum").copy_(second["weight"])
        self._column("grad_square_sum").copy_(first["gradient"])
        self._column("clipped_grad_square_sum").copy_(first["gradient"]).mul_(self.global_clip_factor**2)
        self._column("update_square_sum").fill_(math.nan if self.last_update_applied else 0.0)
        self._column("numel").copy_(self._numel)

    def _column(self, name: str) -> Tensor:
        return self.statistics[:, STATISTICS.index(name)]

    def _add_second_sums(self, sums: Tensor) -> None:
        """Add the numbers of every owned fragment, [F, S], to those of its tensor."""
        by_key_ST = self._second.flat.view(-1, self._count)[: sums.shape[1]]
        by_key_ST.index_add_(1, self._owners, sums[:, : len(by_key_ST)].T)

    def _weight_sums(self) -> Tensor:
        """Σθ² of every fragment, [F, 1], for the statistics of an update that is not made."""
        return stacked([squares([f.values() for f in self.fragments.fragments])], self.statistics)

    def _guarded(self, update_square_sum: Tensor) -> Tensor:
        """Σ(Δθ)² of the update as it would be -> what the guard multiplies it with, both [T]; into the statistics."""
        factor = torch.ones_like(update_square_sum)
        if self._guard is not None:
            factor = self._guard.factor(update_square_sum, self.learning_rate, self.updates)
            self._column("guard_factor").copy_(factor)
        self._column("update_square_sum").copy_(update_square_sum * factor**2)
        return factor

    # ---- state ---------------------------------------------------------------------------------------------

    def _replicated(self) -> dict[str, Tensor]:
        """Views of the state that is the same on every rank, by "KEY|TENSOR"; of a part, those of its tensors."""
        return {}

    def _all_replicated(self) -> dict[str, Tensor]:
        own = {key: value for part in self._parts for key, value in part._replicated().items()}
        return own | {k: value for guard in self._guards() for k, value in guard.state_by_name().items()}

    def _guards(self) -> list[UpdateGuard]:
        return [part._guard for part in self._parts if part._guard is not None]

    def _all_sliced(self) -> list[tuple[str, Fragment, Tensor]]:
        """(state key, fragment, its values) of all parts."""
        return [
            (key, part.fragments.fragments[position], values)
            for part in self._parts
            for key, slices in part._sliced.items()
            for position, values in slices.items()
        ]

    def state_by_name(self) -> OptimizerState:
        """Views of the state, as a checkpoint stores it; independent of world size and ZeRO stage."""
        sliced = [(key, *fragment.stored, values) for key, fragment, values in self._all_sliced()]
        counters: dict[str, float] = {"updates": self.updates, "skipped_updates": self.skipped_updates}
        for guard in self._guards():
            counters["guard_begun_after"] = guard.begun_after
        scaler = self.fragments.around.loss_scaler
        counters |= scaler.numbers() if scaler is not None else {}
        return OptimizerState(self._all_replicated(), sliced if self.fragments.writes else [], counters)

    def load_state_by_name(
        self,
        replicated: Mapping[str, Tensor],
        counters: Mapping[str, float],
        read: ReadSlice,
        kept: Collection[tuple[str, str]],
    ) -> list[str]:
        """Take saved state of any world size and stage into a new optimizer. Raises StateError before any change.

        kept: (state key, tensor) of all that `read` finds. A loss scale is taken over if both runs have a dynamic one.
        Returns a line for each state of STARTS_AT_ZERO that begins anew or is dropped.
        """
        own, slices = self._all_replicated(), self._all_sliced()
        here = {*map(kind_of, own), *(key for part in self._parts for key in part._sliced)}
        there = {*map(kind_of, replicated), *(key for key, _ in kept)}
        begun, dropped = STARTS_AT_ZERO & (here - there), STARTS_AT_ZERO & (there - here)
        own = {key: value for key, value in own.items() if kind_of(key) not in begun}
        slices = [(key, fragment, values) for key, fragment, values in slices if key not in begun]
        saved = {key: value for key, value in replicated.items() if kind_of(key) not in dropped}
        missing = {(key, fragment.stored[0]) for key, fragment, _ in slices} - set(kept)
        refuse_other_state(own, saved, ["|".join(names) for names in sorted(missing)], counters)
        loaded = [(values, read(key, *fragment.stored, fragment.length)) for key, fragment, values in slices]
        for values, content in loaded:
            values.copy_(content)
        for key, value in own.items():
            value.copy_(saved[key])
        self.updates, self.skipped_updates = int(counters["updates"]), int(counters["skipped_updates"])
        guard_begun = counters.get("guard_begun_after", self.updates if "update_history" in begun else 0)
        for guard in self._guards():
            guard.begun_after = int(guard_begun)
        if self.fragments.around.loss_scaler is not None:
            self.fragments.around.loss_scaler.load(counters)
        return changes(begun, dropped)

    def state_dict(self) -> dict[str, Any]:
        """Refused: a torch state dict of flat slices fits one world size only."""
        raise StateError("this optimizer saves its state by tensor name: use state_by_name()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as state_dict() is."""
        raise StateError("this optimizer loads its state by tensor name: use load_state_by_name()")

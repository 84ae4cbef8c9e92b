"""Which part of which named tensor this process owns, and where it lies.

ZeRO hands an optimizer one flat fp32 slice per rank; where a tensor begins and what shape it had is gone. A
FragmentMap is that lost knowledge. With it an optimizer computes statistics of whole tensors from partial
sums over the fragments (see adafactor.py), a checkpoint writes tensors by name, and nothing depends on the
number of ranks.

    flat slice of rank 1      │ ..end of A │ B, all of it │ first part of C.. │ padding │
    fragments of rank 1         A[90:120)    B[0:40)        C[0:33)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .logical import runs_of_parts, shapes_of_parts

if TYPE_CHECKING:
    from .loss_scale import LossScaler


class FragmentError(ValueError):
    """A fragment map is incomplete, contradicts the engine, or the engine cannot be mapped."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [offset, offset + length) of a flattened named tensor, at `start` of the flat fp32 `buffer`.

    `buffer` is the tensor in the optimizer's param_groups (its `.grad` is the gradient of the same elements).
    """

    name: str
    tensor: int
    """Index of the tensor in FragmentMap.names."""
    shape: torch.Size
    """Shape of the whole tensor."""
    offset: int
    length: int
    buffer: Tensor
    start: int
    parameter: str = ""
    """The model's parameter, where the tensor is a part of one (a third of a fused QKV); else empty."""
    parameter_offset: int = 0
    """Then: where in the flattened parameter the fragment begins."""

    @property
    def stored(self) -> tuple[str, int]:
        """(name, offset) under which a checkpoint keeps these elements: those of the parameter."""
        return (self.parameter, self.parameter_offset) if self.parameter else (self.name, self.offset)

    def values(self) -> Tensor:
        """Flat fp32 view of the master weights, [length]."""
        return self.buffer.detach().view(-1).narrow(0, self.start, self.length)


@dataclass(frozen=True)
class Surroundings:
    """What the owner of the memory, an engine, does around a map; the defaults are those of a single process.

    replicated: every rank owns everything (no ZeRO) and sums must not be reduced.
    group: the ranks that share the tensors; None is the default group.
    device: where the group can communicate, if that is not where the masters are (CPU offload under NCCL).
    refresh: copies the fp32 masters into the weights the model computes with, on all ranks.
    weights: the whole of a parameter the model computes with, by name; collective.
    in_parts: the optimizer's step() is called once for each buffer (ZeRO-3), else once for all of them.
    grad_norm: the global gradient norm before the first of such calls; the optimizer sees only parts.
    checks_finite: the engine itself drops an update whose gradients are not finite, before any step().
    forget_gradients: called after an update, where an engine would hand the same gradient over once more for a tensor
        that the next one does not use.
    loss_scaler: of fp16.
    """

    replicated: bool = True
    group: dist.ProcessGroup | None = None
    device: torch.device | None = None
    refresh: Callable[[], None] = lambda: None
    weights: Callable[[str], Tensor] | None = None
    in_parts: bool = False
    grad_norm: Callable[[], Tensor | float] | None = None
    checks_finite: bool = False
    forget_gradients: Callable[[], None] = lambda: None
    loss_scaler: LossScaler | None = None


class FragmentMap:
    """All fragments of one process, the names and shapes of all tensors, and how to sum over all owners."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        fragments: Iterable[Fragment],
        *,
        buffers: Sequence[Tensor],
        around: Surroundings,
        buffer_names: Sequence[Sequence[str]] | None = None,
    ):
        """
        shapes: every trainable tensor of the model, in model order; equal on all ranks.
        buffers: the flat fp32 tensors, as they stand in the optimizer's param_groups.
        buffer_names: the tensors of each buffer, also those of which other ranks own all, if in_parts.
        """
        self.shapes = dict(shapes)
        self.names = list(self.shapes)
        self.fragments = sorted(fragments, key=lambda fragment: (fragment.tensor, fragment.offset))
        self.buffers = list(buffers)
        self.around = around
        self._buffer_names = buffer_names
        wrong = [buffer.dtype for buffer in self.buffers if buffer.dtype != torch.float32]
        if wrong:
            raise FragmentError(
                f"master weights are {wrong[0]}, expected torch.float32: leave them to the engine's fp32"
            )

    @classmethod
    def from_engine(cls, engine: Any, verify: bool = True) -> FragmentMap:
        """The map of a DeepSpeed engine (ZeRO 0, 1, 2, 3; fp32, bf16, fp16), checked element by element.

        Collective: call it on all ranks. Raises FragmentError, with every reason, for an engine it cannot
        serve.
        """
        from .engines import map_engine  # DeepSpeed is imported only where there is an engine

        fragments = map_engine(engine)
        if verify:
            from .verification import verify_fragments

            verify_fragments(fragments)
        return fragments

    @classmethod
    def whole(cls, named_parameters: Iterable[tuple[str, Tensor]]) -> FragmentMap:
        """One process, no engine: fragments are whole fp32 parameters. Frozen ones are left out."""
        parameters = {name: parameter for name, parameter in named_parameters if is_optimized(parameter)}
        return cls.of_copies(parameters, parameters, Surroundings(weights=parameters.__getitem__))

    @classmethod
    def of_copies(
        cls, parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], around: Surroundings
    ) -> FragmentMap:
        """Every process holds a whole fp32 master of every parameter."""
        scattered = [name for name, master in masters.items() if not master.is_contiguous()]
        if scattered:
            raise FragmentError(
                f"{', '.join(scattered)}: not contiguous in memory; make it contiguous() before training"
            )
        fragments = [
            Fragment(name, index, parameters[name].shape, 0, master.numel(), master, 0)
            for index, (name, master) in enumerate(masters.items())
        ]
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return cls(shapes, fragments, buffers=list(masters.values()), around=around)

    def split(self, rows: Mapping[str, Sequence[int]]) -> FragmentMap:
        """The same memory with the parameters of `rows` seen as several tensors each (see logical.py)."""
        if not rows:
            return self
        shapes = shapes_of_parts(self.shapes, rows)
        index = {name: position for position, name in enumerate(shapes)}
        fragments = []
        for whole in self.fragments:
            if whole.name not in rows:
                fragments.append(replace(whole, tensor=index[whole.name]))
                continue
            runs = runs_of_parts(whole.shape, rows[whole.name], whole.offset, whole.length)
            for part, offset, length, before in runs:
                name = f"{whole.name}#{part}"
                place = (offset, length, whole.buffer, whole.start + before)
                stored = (whole.name, whole.offset + before)
                fragments.append(Fragment(name, index[name], shapes[name], *place, *stored))
        names = self._buffer_names and [
            list(shapes_of_parts({name: self.shapes[name] for name in held}, rows))
            for held in self._buffer_names
        ]
        return FragmentMap(shapes, fragments, buffers=self.buffers, around=self.around, buffer_names=names)

    def parts(self) -> list[FragmentMap]:
        """The maps of what the engine hands over in one step(): of every buffer by itself, or this one."""
        if not self.around.in_parts:
            return [self]
        assert self._buffer_names is not None
        found = []
        for buffer, names in zip(self.buffers, self._buffer_names, strict=True):
            index = {name: position for position, name in enumerate(names)}
            own = [replace(f, tensor=index[f.name]) for f in self.fragments if f.buffer is buffer]
            shapes = {name: self.shapes[name] for name in names}
            found.append(FragmentMap(shapes, own, buffers=[buffer], around=self.around))
        return found

    def gradients(self) -> list[Tensor]:
        """The gradient of every buffer, fp32 and contiguous; zeros where the engine left none."""
        found = []
        for buffer in self.buffers:
            gradient = buffer.grad
            if gradient is None:
                gradient = torch.zeros_like(buffer, requires_grad=False)
            elif gradient.dtype != torch.float32 or not gradient.is_contiguous():
                gradient = gradient.detach().float().contiguous()
            found.append(gradient)
        return found

    @property
    def device(self) -> torch.device:
        return self.buffers[0].device

    @property
    def replicated(self) -> bool:
        """Does every rank own everything?"""
        return self.around.replicated

    @property
    def world_size(self) -> int:
        """Ranks over which one tensor may be spread."""
        return 1 if self.replicated or not dist.is_initialized() else dist.get_world_size(self.around.group)

    @property
    def rank(self) -> int:
        """Rank among those that hold the model, also where it is replicated."""
        return dist.get_rank(self.around.group) if dist.is_initialized() else 0

    @property
    def ranks(self) -> int:
        """How many hold the model, also where it is replicated."""
        return dist.get_world_size(self.around.group) if dist.is_initialized() else 1

    def all_reduce(self, sums: Tensor) -> None:
        """Add up partial sums of all owners, in place. Nothing to do where each rank owns everything."""
        if self.world_size > 1:
            there = self._where_the_group_is(sums)
            dist.all_reduce(there, group=self.around.group)
            if there is not sums:
                sums.copy_(there)

    def all_gather(self, local: Tensor) -> list[Tensor]:
        """`local` of every rank in rank order; it must have the same shape everywhere."""
        if self.world_size == 1:
            return [local]
        there = self._where_the_group_is(local)
        gathered = [torch.empty_like(there) for _ in range(self.world_size)]
        dist.all_gather(gathered, there, group=self.around.group)
        return [values.to(local.device) for values in gathered]

    def _where_the_group_is(self, values: Tensor) -> Tensor:
        """NCCL does not take what lies on the CPU: itself, or a copy where the group can communicate."""
        return values if self.around.device is None else values.to(self.around.device)

    def master_slices(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset, flat fp32 view): what this rank has to save. Over all ranks every element comes
        once.

        Where masters are replicated, rank 0 yields them all and the others nothing.
        """
        if self.writes:
            for fragment in self.fragments:
                yield *fragment.stored, fragment.values()

    @property
    def writes(self) -> bool:
        """Does this rank save what it owns? (Replicas do not.)"""
        return not self.replicated or self.rank == 0

    def load_master(self, name: str, offset: int, values: Tensor) -> int:
        """Copy the part of `values` (elements from `offset` of tensor `name`) that this rank owns.

        Returns how many elements were taken, 0 for a range that others own. The model computes with them
        after refresh_model_weights(). Raises FragmentError for an unknown tensor or a range outside of it.
        """
        if name not in self.shapes:
            raise FragmentError(
                f"{name}: no such tensor in the model; expected one of {', '.join(self.names[:5])}, …"
            )
        end = offset + values.numel()
        if offset < 0 or end > self.shapes[name].numel():
            raise FragmentError(
                f"{name}: elements {offset}..{end} do not lie in shape {tuple(self.shapes[name])}"
            )
        taken = 0
        for fragment in self.fragments:
            low, high = max(fragment.offset, offset), min(fragment.offset + fragment.length, end)
            if fragment.name == name and low < high:
                target = fragment.values()[low - fragment.offset : high - fragment.offset]
                target.copy_(values.reshape(-1)[low - offset : high - offset])
                taken += high - low
        return taken

    def refresh_model_weights(self) -> None:
        """Make the model compute with the fp32 masters: round, gather from all ranks. Collective."""
        with torch.no_grad():
            self.around.refresh()

    def model_weight(self, name: str) -> Tensor:
        """The parameter the model computes with, whole, on every rank. Collective under ZeRO-3."""
        assert self.around.weights is not None, "a map without a model"
        return self.around.weights(name).detach()

    @property
    def loss_scale(self) -> float:
        """By what the next loss is multiplied; 1 unless fp16."""
        return 1.0 if self.around.loss_scaler is None else self.around.loss_scaler.scale

    def describe(self) -> str:
        """A table, one line a fragment: tensor, shape, elements this rank owns, place in which of its buffers."""
        number = {id(buffer): position for position, buffer in enumerate(self.buffers)}
        lines = [
            f"{'tensor':<48} {'shape':<20} {'elements owned':<24} {'of':>11}  {'buffer':>6} {'from':>11}"
        ]
        for fragment in self.fragments:
            elements = f"{fragment.offset}..{fragment.offset + fragment.length}"
            shape = "x".join(map(str, fragment.shape)) or "scalar"
            where = f"{number[id(fragment.buffer)]:>6} {fragment.start:>11}"
            lines.append(
                f"{fragment.name:<48} {shape:<20} {elements:<24} {fragment.shape.numel():>11}  {where}"
            )
        owned = sum(fragment.length for fragment in self.fragments)
        total = sum(shape.numel() for shape in self.shapes.values())
        kind = "replicated" if self.replicated else f"rank {self.rank} of {self.world_size}"
        padding = sum(buffer.numel() for buffer in self.buffers) - owned
        lines.append(f"{owned} of {total} elements in {len(self.names)} tensors, {padding} padding ({kind})")
        return "\n".join(lines)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter; under ZeRO-3 it stands empty while it is not in use, and remembers its shape."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_optimized(parameter: Tensor) -> bool:
    """Trainable and not empty: the parameters DeepSpeed hands to an optimizer."""
    return parameter.requires_grad and whole_shape(parameter).numel() > 0

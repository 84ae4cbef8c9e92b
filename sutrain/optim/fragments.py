"""Which part of which named tensor this process owns, and where it lies.

ZeRO hands an optimizer one flat fp32 slice per rank; where a tensor begins and what shape it had is gone. A
FragmentMap is that lost knowledge. With it an optimizer computes statistics of whole tensors from partial
sums over the fragments (see adafactor.py), a checkpoint writes tensors by name, and nothing depends on the
number of ranks.

    flat slice of rank 1      │ ..end of A │ B, all of it │ first part of C.. │ padding │
    fragments of rank 1         A[90:120)    B[0:40)        C[0:33)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def values(self) -> Tensor:
        """Flat fp32 view of the master weights, [length]."""
        return self.buffer.detach().view(-1).narrow(0, self.start, self.length)

    def gradient(self) -> Tensor:
        """Flat fp32 gradient of the same elements, [length]; zeros when the engine left none."""
        if self.buffer.grad is None:
            return torch.zeros(self.length, dtype=torch.float32, device=self.buffer.device)
        gradient = self.buffer.grad.detach().contiguous().view(-1)
        return gradient.narrow(0, self.start, self.length).float()


class FragmentMap:
    """All fragments of one process, the names and shapes of all tensors, and how to sum over all owners."""

    def __init__(
        self,
        shapes: dict[str, torch.Size],
        fragments: Iterable[Fragment],
        *,
        buffers: Sequence[Tensor],
        replicated: bool,
        group: dist.ProcessGroup | None = None,
        refresh: Callable[[], None] = lambda: None,
    ):
        """
        shapes: every trainable tensor of the model, in model order; equal on all ranks.
        buffers: the flat fp32 tensors, as they stand in the optimizer's param_groups.
        replicated: every rank owns everything (no ZeRO) and sums must not be reduced.
        group: the ranks that share the tensors; None is the default group.
        refresh: copies the fp32 masters into the weights the model computes with, on all ranks.
        """
        self.shapes = dict(shapes)
        self.names = list(self.shapes)
        self.fragments = sorted(fragments, key=lambda fragment: (fragment.tensor, fragment.offset))
        self.buffers = list(buffers)
        self.replicated = replicated
        self._group = group
        self._refresh = refresh
        wrong = [buffer.dtype for buffer in self.buffers if buffer.dtype != torch.float32]
        if wrong:
            raise FragmentError(
                f"master weights are {wrong[0]}, expected torch.float32: leave them to the engine's fp32"
            )

    @classmethod
    def from_engine(cls, engine: Any, verify: bool = True) -> FragmentMap:
        """The map of a DeepSpeed engine (ZeRO 0, 1, 2; fp32 or bf16), checked element by element.

        Collective: call it on all ranks. Raises FragmentError, with every reason, for an engine it cannot
        serve.
        """
        from .engines import map_engine  # DeepSpeed is imported only where there is an engine

        fragments, parameters = map_engine(engine)
        if verify:
            from .verification import verify_fragments

            verify_fragments(fragments, parameters)
        return fragments

    @classmethod
    def whole(cls, named_parameters: Iterable[tuple[str, Tensor]]) -> FragmentMap:
        """One process, no engine: fragments are whole fp32 parameters. Frozen ones are left out."""
        parameters = {name: parameter for name, parameter in named_parameters if is_optimized(parameter)}
        return cls.of_copies(parameters, parameters)

    @classmethod
    def of_copies(
        cls,
        parameters: dict[str, Tensor],
        masters: dict[str, Tensor],
        refresh: Callable[[], None] = lambda: None,
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
        return cls(shapes, fragments, buffers=list(masters.values()), replicated=True, refresh=refresh)

    @property
    def device(self) -> torch.device:
        return self.buffers[0].device

    @property
    def world_size(self) -> int:
        """Ranks over which one tensor may be spread."""
        return 1 if self.replicated or not dist.is_initialized() else dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        """Rank among those that hold the model, also where it is replicated."""
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    def all_reduce(self, sums: Tensor) -> None:
        """Add up partial sums of all owners, in place. Nothing to do where each rank owns everything."""
        if self.world_size > 1:
            dist.all_reduce(sums, group=self._group)

    def all_gather(self, local: Tensor) -> list[Tensor]:
        """`local` of every rank in rank order; it must have the same shape everywhere."""
        if self.world_size == 1:
            return [local]
        gathered = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(gathered, local, group=self._group)
        return gathered

    def master_slices(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset, flat fp32 view): what this rank has to save. Over all ranks every element comes
        once.

        Where masters are replicated, rank 0 yields them all and the others nothing.
        """
        if self.writes:
            for fragment in self.fragments:
                yield fragment.name, fragment.offset, fragment.values()

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
            self._refresh()

    def describe(self) -> str:
        """A table, one line a fragment: tensor, shape, elements owned by this rank, place in the buffer."""
        lines = [f"{'tensor':<48} {'shape':<20} {'elements owned':<24} {'of':>11}  flat start"]
        for fragment in self.fragments:
            elements = f"{fragment.offset}..{fragment.offset + fragment.length}"
            shape = "x".join(map(str, fragment.shape)) or "scalar"
            size = fragment.shape.numel()
            lines.append(f"{fragment.name:<48} {shape:<20} {elements:<24} {size:>11}  {fragment.start}")
        owned = sum(fragment.length for fragment in self.fragments)
        total = sum(shape.numel() for shape in self.shapes.values())
        kind = "replicated" if self.replicated else f"rank {self.rank} of {self.world_size}"
        lines.append(f"{owned} of {total} elements in {len(self.names)} tensors ({kind})")
        return "\n".join(lines)


def is_optimized(parameter: Tensor) -> bool:
    """Trainable and not empty: the parameters DeepSpeed hands to an optimizer."""
    return parameter.requires_grad and parameter.numel() > 0

"""Prove a fragment map before a run trusts it: two checks at start, a fraction of a second.

1. The ranges of all ranks, put together, cover every tensor exactly once.
2. Every element is written its own id through the map, the model weights are refreshed from the masters,
   and each rank reads all its weights back. A wrong start, order or tensor in the map shows as a wrong id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fragments import FragmentError, FragmentMap

_BASE = 256  # ids are written digit by digit: 0..255 is exact in bf16 and fp16


def verify_fragments(fragments: FragmentMap) -> None:
    """Raises FragmentError on every rank when any rank's map is wrong; else leaves all weights as they were."""
    _verify_coverage(fragments)
    _verify_element_ids(fragments)


def _verify_coverage(fragments: FragmentMap) -> None:
    local = torch.full((max(1, len(fragments.names)), 3), -1, dtype=torch.int64, device=fragments.device)
    rows = [(fragment.tensor, fragment.offset, fragment.length) for fragment in fragments.fragments]
    problems = []
    if len({tensor for tensor, _, _ in rows}) != len(rows):
        problems.append(f"rank {fragments.rank} owns several fragments of one tensor; expected one at most")
    for fragment in fragments.fragments:
        end = fragment.start + fragment.length
        if fragment.start < 0 or end > fragment.buffer.numel():
            problems.append(
                f"{fragment.name}: found at {fragment.start}..{end} of a slice of {fragment.buffer.numel()} elements"
            )
    if problems:  # of this rank alone: to the others its fragments are missing, so that all of them raise
        rows = []
    if rows:
        local[: len(rows)] = torch.tensor(rows)
    owned: dict[int, list[tuple[int, int, int]]] = {tensor: [] for tensor in range(len(fragments.names))}
    for rank, table in enumerate(fragments.all_gather(local)):
        for tensor, offset, length in table.tolist():
            if tensor >= 0:
                owned[tensor].append((offset, length, rank))
    for tensor, pieces in owned.items():
        name, size, position = fragments.names[tensor], fragments.shapes[fragments.names[tensor]].numel(), 0
        for offset, length, rank in [*sorted(pieces), (size, 0, -1)]:
            if offset > position:
                problems.append(f"{name}: elements {position}..{offset} belong to no rank")
            elif offset < position and rank < 0:
                problems.append(f"{name}: elements {offset}..{position} lie outside of the tensor")
            elif offset < position:
                problems.append(f"{name}: elements {offset}..{position} belong to rank {rank} and to another")
            position = max(position, offset + length)
    if problems:
        raise FragmentError("the fragment map does not cover each element once:\n  " + "\n  ".join(problems))


@torch.no_grad()
def _verify_element_ids(fragments: FragmentMap) -> None:
    sizes = [shape.numel() for shape in fragments.shapes.values()]
    first_ids = [sum(sizes[:tensor]) for tensor in range(len(sizes))]
    saved = [buffer.detach().clone() for buffer in fragments.buffers]
    problem = None
    digits, largest = 1, sum(sizes) - 1
    while largest >= _BASE**digits:
        digits += 1
    try:
        for digit in range(digits):
            for fragment in fragments.fragments:
                start = first_ids[fragment.tensor] + fragment.offset
                fragment.values().copy_(_digits(start, fragment.length, digit, fragments.device))
            fragments.refresh_model_weights()
            for tensor, name in enumerate(fragments.names):
                expected = _digits(first_ids[tensor], sizes[tensor], digit, fragments.device)
                wrong = (
                    fragments.model_weight(name).detach().reshape(-1).float().to(expected.device) != expected
                )
                if problem is None and wrong.any():
                    problem = f"{name}: element {int(wrong.nonzero()[0])} is not where the map has it"
    finally:
        for buffer, values in zip(fragments.buffers, saved, strict=True):
            buffer.detach().copy_(values)
        fragments.refresh_model_weights()
    failures = torch.tensor([0.0 if problem is None else 1.0], device=fragments.device)
    fragments.all_reduce(failures)
    if failures.item():
        raise FragmentError("the fragment map contradicts the engine: " + (problem or "seen on another rank"))


def _digits(start: int, length: int, digit: int, device: torch.device) -> Tensor:
    """Digit `digit` (base 256, 0 is the lowest) of the ids start … start + length - 1, as fp32."""
    ids = torch.arange(start, start + length, dtype=torch.int64, device=device)
    return (ids // _BASE**digit % _BASE).float()

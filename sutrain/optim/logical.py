"""One parameter that is several tensors: a fused query-key-value matrix is three.

Statistics (row and column means, RMS, trust ratio, norms) are of a tensor, so a matrix that was glued together only
for speed must be taken apart again for them. The parts lie one behind the other along the first dimension, hence are
contiguous runs of the flattened parameter, and a fragment of it falls into at most as many fragments of theirs.

    qkv.weight [3D, D]   ->   qkv.weight#0 [D, D], qkv.weight#1 [D, D], qkv.weight#2 [D, D]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch

Parts = int | Sequence[int]
"""A number of equal parts, or the rows of each."""


def rows_of_parts(spec: Mapping[str, Parts], shapes: Mapping[str, torch.Size]) -> dict[str, list[int]]:
    """{parameter: rows of each of its logical tensors} for {glob over parameter names: parts}; later globs win.

    Raises ValueError, one line a mistake, for a glob without a match and for rows that do not add up.
    """
    rows, problems = {}, mistakes_in_parts(spec)
    for pattern, parts in spec.items() if not problems else ():
        matching = [name for name in shapes if fnmatchcase(name, str(pattern))]
        if not matching:
            example = next(iter(shapes), "none")
            problems.append(
                f"logical_tensors pattern {pattern!r} matches no tensor; names are like {example}"
            )
        for name in matching:
            total = shapes[name][0] if len(shapes[name]) else 1
            cut = [total // parts] * parts if isinstance(parts, int) else list(parts)
            if sum(cut) != total:
                problems.append(
                    f"logical_tensors {pattern!r}: {parts!r} does not divide the {total} rows of {name}"
                )
            rows[name] = cut
    if problems:
        raise ValueError("\n".join(problems))
    return {name: cut for name, cut in rows.items() if len(cut) > 1}


def mistakes_in_parts(spec: Any) -> list[str]:
    """What is wrong with `logical_tensors` whatever the parameters are, a line each."""
    if not isinstance(spec, Mapping):
        return [f"logical_tensors is {spec!r}, expected {{glob over parameter names: parts}}"]
    return [
        f"logical_tensors {pattern!r}: {parts!r}, expected a number of parts or a list of rows, 1 or more"
        for pattern, parts in spec.items()
        if not _sensible(parts)
    ]


def shapes_of_parts(
    shapes: Mapping[str, torch.Size], rows: Mapping[str, Sequence[int]]
) -> dict[str, torch.Size]:
    """Names and shapes of the logical tensors, in the order of the parameters."""
    found = {}
    for name, shape in shapes.items():
        for part, count in enumerate(rows.get(name, ())):
            found[f"{name}#{part}"] = torch.Size((count, *shape[1:]))
        if name not in rows:
            found[name] = shape
    return found


def runs_of_parts(
    shape: torch.Size, rows: Sequence[int], offset: int, length: int
) -> list[tuple[int, int, int, int]]:
    """(part, offset in the part, length, elements of the run before it) of elements [offset, offset + length)."""
    inner = torch.Size(shape[1:]).numel()
    ends = [end * inner for end in accumulate(rows)]
    found = []
    for part, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        low, high = max(begin, offset), min(end, offset + length)
        if low < high:
            found.append((part, low - begin, high - low, low - offset))
    return found


def _sensible(parts: Any) -> bool:
    counts = [parts] if isinstance(parts, int) else parts
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not counts:
        return False
    return all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts)

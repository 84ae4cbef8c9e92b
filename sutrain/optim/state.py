"""Optimizer state that knows no world size: by tensor name and offset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

ReadSlice = Callable[[str, str, int, int], Tensor]
"""(state key, tensor name, offset, length) -> flat fp32 values; raises when some are missing."""


class StateError(ValueError):
    """Saved optimizer state does not fit this optimizer; the message lists every mismatch."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer has to save.

    replicated: small tensors, the same on every rank ("row_mean|NAME"), to be saved once.
    sliced: (state key, parameter, offset in it, flat fp32 values), what this rank has to save; over all ranks
        every element comes once.
    counters: numbers that advance with the updates, and those of fp16's loss scaler.
    """

    replicated: dict[str, Tensor]
    sliced: list[tuple[str, str, int, Tensor]]
    counters: dict[str, float]


STARTS_AT_ZERO = frozenset({"momentum", "update_history"})
"""State that a setting turns on and off: a run that goes on begins it at zero where there is none, and drops it where
it is not wanted any more."""


def kind_of(key: str) -> str:
    """The state key in "KEY|TENSOR"."""
    return key.partition("|")[0]


def changes(begun: Collection[str], dropped: Collection[str]) -> list[str]:
    """A line for each state of STARTS_AT_ZERO that came or went."""
    came = [f"the optimizer's {key} begins at zero" for key in sorted(begun)]
    return came + [f"the optimizer's {key} is not wanted any more: dropped" for key in sorted(dropped)]


def refuse_other_state(
    own: Mapping[str, Tensor],
    replicated: Mapping[str, Tensor],
    missing_slices: Sequence[str],
    counters: Mapping[str, float],
) -> None:
    """Raises StateError unless the saved replicated tensors are the optimizer's own, and slices and counters there."""
    few = {
        "missing": [*(key for key in own if key not in replicated), *missing_slices],
        "unexpected": [key for key in replicated if key not in own],
        "of another shape": [
            f"{key} {tuple(replicated[key].shape)}, expected {tuple(value.shape)}"
            for key, value in own.items()
            if key in replicated and replicated[key].shape != value.shape
        ],
        "missing counter": [key for key in ("updates", "skipped_updates") if key not in counters],
    }
    problems = [f"{words}: {_some(names)}" for words, names in few.items() if names]
    if problems:
        raise StateError(
            "the saved state does not fit this optimizer's settings:\n  " + "\n  ".join(problems)
        )


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

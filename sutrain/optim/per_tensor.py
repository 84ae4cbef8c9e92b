"""Settings that may differ between tensors, chosen by globs over their names."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

PER_TENSOR = ("learning_rate_scale", "weight_decay", "adapt")
"""Settings that may differ between tensors. adapt=False: AdaFactor without parameter scale, LAMB without
trust ratio."""


def refuse_unless(valid: Mapping[str, bool]) -> None:
    """Raises ValueError with the texts of all conditions that do not hold, one a line."""
    problems = [text for text, holds in valid.items() if not holds]
    if problems:
        raise ValueError("\n".join(problems))


def is_number(value: Any) -> bool:
    """Python's bool is an int, but true is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mistakes_per_tensor(per_tensor: Any) -> list[str]:
    """What is wrong with `per_tensor` whatever the names of the tensors are, a line each."""
    if not isinstance(per_tensor, Mapping):
        return [f"per_tensor is {per_tensor!r}, expected {{glob over tensor names: {{setting: value}}}}"]
    problems = []
    for pattern, settings in per_tensor.items():
        if not isinstance(settings, Mapping):
            problems.append(f"per_tensor {pattern!r}: {settings!r}, expected {{setting: value}}")
            continue
        for key, value in settings.items():
            if key not in PER_TENSOR:
                problems.append(f"per_tensor {pattern!r}: unknown {key!r}, expected {', '.join(PER_TENSOR)}")
            elif key == "adapt" and not isinstance(value, bool):
                problems.append(f"per_tensor {pattern!r}: adapt is {value!r}, expected true or false")
            elif key != "adapt" and not (is_number(value) and value >= 0):
                problems.append(f"per_tensor {pattern!r}: {key} is {value!r}, expected a number, 0 or more")
    return problems


def choices_per_tensor(
    names: list[str], weight_decay: float, per_tensor: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """PER_TENSOR of every tensor. Raises ValueError with every unknown glob, key and impossible value."""
    choices = {
        name: {"learning_rate_scale": 1.0, "weight_decay": weight_decay, "adapt": True} for name in names
    }
    problems = mistakes_per_tensor(per_tensor)
    for pattern, settings in per_tensor.items() if not problems else ():
        matching = [name for name in names if fnmatchcase(name, str(pattern))]
        if not matching:
            problems.append(f"per_tensor pattern {pattern!r} matches no tensor; names are like {names[0]}")
        for name in matching:
            choices[name].update(settings)
    if problems:
        raise ValueError("\n".join(problems))
    return choices

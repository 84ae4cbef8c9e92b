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


def choices_per_tensor(
    names: list[str], weight_decay: float, per_tensor: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """PER_TENSOR of every tensor. Raises ValueError with every unknown glob, key and impossible value."""
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

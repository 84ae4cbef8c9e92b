"""Optimizers by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .adafactor import NEVER_FACTORED, AdaFactor, factored_pair, settings_of_preset
from .adamw import AdamW
from .base import FragmentOptimizer
from .egd import Egd
from .lamb import Lamb
from .logical import mistakes_in_parts
from .per_tensor import is_number, mistakes_per_tensor

OPTIMIZERS: dict[str, type[FragmentOptimizer]] = {
    "adafactor": AdaFactor,
    "lamb": Lamb,
    "adamw": AdamW,
    "egd": Egd,
}


def build_optimizer(
    name: str, named_parameters: Iterable[tuple[str, Tensor]], **settings: Any
) -> FragmentOptimizer:
    """The optimizer `name` for model.named_parameters(); frozen parameters are left out.

    Settings are the arguments of its class and of FragmentOptimizer; AdaFactor also takes `preset`, one of
    adafactor.PRESETS. Raises ValueError with every unknown name and what is near it, and every value of a wrong type.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown, expected one of {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    known = settings_of(name)
    problems = []
    for unknown in sorted(set(settings) - set(known)):
        near = get_close_matches(unknown, known, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
        problems.append(f"{name}: unknown setting {unknown!r}; {hint}")
    problems += [f"{name}: {line}" for line in _of_wrong_type(kind, settings)]
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return kind(named_parameters, **(settings_of_preset(settings) if kind is AdaFactor else settings))
    except ValueError as error:
        raise ValueError(f"{name}: " + str(error).replace("\n", f"\n{name}: ")) from None


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError with every mistake that shows without the model: all but whether globs match its tensors."""
    rest = dict(settings)
    problems = mistakes_per_tensor(rest.pop("per_tensor", None) or {})
    problems += mistakes_in_parts(rest.pop("logical_tensors", None) or {})
    try:
        build_optimizer(name, [("probe", torch.nn.Parameter(torch.zeros(1)))], **rest)
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(problems))


def _of_wrong_type(kind: type[FragmentOptimizer], settings: Mapping[str, Any]) -> list[str]:
    """What is not of the type its argument is annotated with, a line each: in YAML `no` is false but `none` a word."""
    hints = {**get_type_hints(FragmentOptimizer.__init__), **get_type_hints(kind.__init__)}
    problems = []
    for key, value in settings.items():
        valid, expected = _TYPES.get(hints.get(key), (lambda _: True, ""))
        if not valid(value):
            problems.append(f"{key} is {value!r}, expected {expected}")
    return problems


def _are_two_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: is_number(value) and math.isfinite(value) and value == int(value), "a whole number"),
    float: (is_number, "a number"),
    float | None: (lambda value: value is None or is_number(value), "a number, or null: off"),
    tuple[float, float]: (_are_two_numbers, "two numbers"),
}
"""Annotation -> whether a value is of that type, and how the type is called."""


def settings_of(name: str) -> list[str]:
    """Names of all settings of an optimizer."""
    kinds = (OPTIMIZERS[name], FragmentOptimizer)
    parameters = [p for kind in kinds for p in inspect.signature(kind).parameters.values()]
    named = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return (["preset"] if OPTIMIZERS[name] is AdaFactor else []) + named


def whole_state_numbers(
    name: str,
    settings: Mapping[str, Any],
    parameters: int,
    shapes: Callable[[], Mapping[tuple[int, ...], int]],
) -> int:
    """How many numbers of state an optimizer keeps of tensors that it does not factor, all ranks together.

    parameters: of the model; shapes: {shape: how many tensors of it}, asked for where it decides what is factored.
    """
    if name != "adafactor":
        return 2 * parameters
    chosen = settings_of_preset(settings)
    momentum = parameters if chosen.get("momentum") else 0
    least, dimensions = chosen.get("min_dim_size_to_factor", 0), chosen.get("factored_dimensions", "last")
    if not 0 < least < NEVER_FACTORED:
        return momentum + (parameters if least else 0)
    whole = (shape for shape in shapes().items() if factored_pair(shape[0], least, dimensions) is None)
    return momentum + sum(math.prod(shape) * times for shape, times in whole)

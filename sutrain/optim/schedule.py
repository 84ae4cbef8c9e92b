"""Learning-rate schedules: what the peak learning rate is multiplied with, as a function of the update.

`schedule(update)` takes the number of updates already applied (0 before the first) and returns a multiplier.
Time is counted in optimizer updates, never in micro-batches. A warm-up over W updates reaches 1 after W of
them: the first update already moves, with 1/W (Su's piecewise_linear alone starts at exactly 0, as his does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class Schedule(Protocol):
    """A frozen object that maps updates already applied to a multiplier of the peak learning rate."""

    def __call__(self, update: int) -> float: ...


class ScheduleError(ValueError):
    """Meaningless settings; the message has one line for each."""


@dataclass(frozen=True)
class PiecewiseLinear:
    """Su's schedule (bert4keras, used for RoFormerV2: kexue.fm/archives/8998), in updates.

    points: {update: multiplier}, at least one. Unless 0 is among the updates, (0, 0.0) is put before them, so
    the first stretch is a linear warm-up from zero. Linear in between, constant after the last: {4000: 1,
    40000: 0.5}.
    """

    points: Mapping[int, float]

    def __post_init__(self) -> None:
        _check(
            "piecewise_linear",
            (bool(self.points), "points is empty, expected {update: multiplier}"),
            *((update == int(update) and update >= 0, f"update {update} is not a whole number, 0 or more")
              for update in self.points),
            *((math.isfinite(y) and y >= 0, f"multiplier {y} at {t} is not a number, 0 or more")
              for t, y in self.points.items()),
        )  # fmt: skip
        points = sorted(self.points.items())
        object.__setattr__(self, "points", dict(points if points[0][0] == 0 else [(0, 0.0), *points]))

    def __call__(self, update: int) -> float:
        points = list(self.points.items())
        for (start, low), (end, high) in pairwise(points):
            if update < end:
                return low + (high - low) * (update - start) / (end - start)
        return points[-1][1]


@dataclass(frozen=True)
class Constant:
    """Warm-up, then 1."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check("constant", _natural("warmup_steps", self.warmup_steps))

    def __call__(self, update: int) -> float:
        return _warmup(update, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    """Warm-up, then a straight line that reaches final_share with the last of total_steps."""

    total_steps: int
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        _check("linear", *_decaying(self.total_steps, self.warmup_steps, self.final_share))

    def __call__(self, update: int) -> float:
        passed = _passed(update, self.warmup_steps, self.total_steps)
        return _warmup(update, self.warmup_steps) * (1.0 - (1.0 - self.final_share) * passed)


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine from 1 to final_share (Loshchilov & Hutter, arXiv 1608.03983)."""

    total_steps: int
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        _check("cosine", *_decaying(self.total_steps, self.warmup_steps, self.final_share))

    def __call__(self, update: int) -> float:
        passed = _passed(update, self.warmup_steps, self.total_steps)
        share = self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * passed))
        return _warmup(update, self.warmup_steps) * share


@dataclass(frozen=True)
class InverseSquareRoot:
    """Warm-up, then √(warmup_steps / t): T5's and the Transformer's; without warm-up 1/√t."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check("inverse_sqrt", _natural("warmup_steps", self.warmup_steps))

    def __call__(self, update: int) -> float:
        return min(_warmup(update, self.warmup_steps), math.sqrt(max(1, self.warmup_steps) / (update + 1)))


@dataclass(frozen=True)
class StableDecay:
    """Warm-up, a plateau at 1, then a straight line over the last decay_steps to final_share.

    arXiv 2404.06395.
    """

    total_steps: int
    decay_steps: int
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        _check(
            "stable_decay",
            *_decaying(self.total_steps, self.warmup_steps, self.final_share),
            (
                1 <= self.decay_steps <= self.total_steps - self.warmup_steps,
                f"decay_steps is {self.decay_steps}, expected 1..{self.total_steps - self.warmup_steps} "
                "(total_steps - warmup_steps)",
            ),
        )

    def __call__(self, update: int) -> float:
        passed = _passed(update, self.total_steps - self.decay_steps, self.total_steps)
        return _warmup(update, self.warmup_steps) * (1.0 - (1.0 - self.final_share) * passed)


@dataclass(frozen=True)
class RelativeStep:
    """AdaFactor's own step size ρ_t = min(0.01, 1/√t), or with warm-up min(1e-6 t, 1/√t) (arXiv 1804.04235
    §9).

    Unlike the others it is asked with the number of the update itself, from 1 on.
    """

    warmup: bool = False

    def __call__(self, update: int) -> float:
        return min(1e-6 * update if self.warmup else 1e-2, 1.0 / math.sqrt(update))


_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "constant": ("warmup_steps",),
    "linear": ("warmup_steps", "final_share"),
    "cosine": ("warmup_steps", "final_share"),
    "inverse_sqrt": ("warmup_steps",),
    "stable_decay": ("warmup_steps", "final_share", "decay_steps"),
    "piecewise_linear": ("points",),
}
SHAPES = tuple(_SETTINGS_OF)


def build_schedule(
    shape: str,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    final_share: float = 0.0,
    decay_steps: int | None = None,
    points: Mapping[int, float] | None = None,
) -> Schedule:
    """The schedule of that name (one of SHAPES) for a run of total_steps updates. Raises ScheduleError, also for a
    setting that has no effect on it, and for a warm-up that does not end within the run."""
    if shape not in SHAPES:
        raise ScheduleError(f"schedule {shape!r} is unknown, expected one of {', '.join(SHAPES)}")
    if shape == "piecewise_linear" and warmup_steps:
        raise ScheduleError("piecewise_linear: warmup_steps is set too; put the warm-up into points")
    given = {
        "warmup_steps": warmup_steps,
        "final_share": final_share,
        "decay_steps": decay_steps,
        "points": points,
    }
    _check(
        shape,
        *(
            (not value or name in _SETTINGS_OF[shape], f"{name} has no effect: leave it out")
            for name, value in given.items()
        ),
    )
    if shape in (
        "constant",
        "inverse_sqrt",
    ):  # the others, which end with the run, look at its length themselves
        _check(shape, _longer(total_steps, warmup_steps))
    if shape == "constant":
        return Constant(warmup_steps)
    if shape == "linear":
        return Linear(total_steps, warmup_steps, final_share)
    if shape == "cosine":
        return Cosine(total_steps, warmup_steps, final_share)
    if shape == "inverse_sqrt":
        return InverseSquareRoot(warmup_steps)
    if shape == "stable_decay":
        return StableDecay(total_steps, decay_steps or 0, warmup_steps, final_share)
    return PiecewiseLinear(points or {})


def _warmup(update: int, warmup_steps: int) -> float:
    return min(1.0, (update + 1) / (warmup_steps or 1))


def _passed(update: int, start: int, end: int) -> float:
    """Share of the stretch from `start` to `end` behind us when this update is made: 1 for the last one."""
    return min(1.0, max(0.0, (update + 1 - start) / (end - start)))


def _natural(name: str, value: int) -> tuple[bool, str]:
    return value == int(value) and value >= 0, f"{name} is {value}, expected a whole number, 0 or more"


def _longer(total_steps: int, warmup_steps: int) -> tuple[bool, str]:
    text = f"total_steps is {total_steps}, expected more than warmup_steps {warmup_steps}"
    return total_steps > warmup_steps, text


def _decaying(total_steps: int, warmup_steps: int, final_share: float) -> list[tuple[bool, str]]:
    return [
        _natural("warmup_steps", warmup_steps),
        _longer(total_steps, warmup_steps),
        (0.0 <= final_share <= 1.0, f"final_share is {final_share}, expected 0..1"),
    ]


def _check(schedule: str, *conditions: tuple[bool, str]) -> None:
    problems = [f"{schedule}: {problem}" for valid, problem in conditions if not valid]
    if problems:
        raise ScheduleError("\n".join(problems))

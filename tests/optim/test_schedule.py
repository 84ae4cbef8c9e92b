"""Schedules against values worked out by hand."""

import math

import pytest

from sutrain.optim import ScheduleError, build_schedule
from sutrain.optim.schedule import PiecewiseLinear, RelativeStep


def values(schedule, *updates):
    return [schedule(update) for update in updates]


def test_piecewise_linear_of_roformer_v2():
    """RoFormerV2's own, in updates (its scripts count micro-batches of 8): warm-up from zero is implied."""
    schedule = PiecewiseLinear({4000: 1, 40000: 0.5, 160000: 0.1, 320000: 0.01})
    found = values(schedule, 0, 1, 2000, 4000, 22000, 40000, 100000, 320000, 10**7)
    assert found == pytest.approx([0, 1 / 4000, 0.5, 1, 0.75, 0.5, 0.3, 0.01, 0.01])


def test_piecewise_linear_starting_at_zero_has_no_warmup_and_order_does_not_matter():
    assert values(PiecewiseLinear({10: 0.5, 0: 1}), 0, 5, 10, 11) == [1, 0.75, 0.5, 0.5]


def test_constant_and_warmup():
    assert values(build_schedule("constant", 100, warmup_steps=4), 0, 1, 3, 4, 99) == [0.25, 0.5, 1, 1, 1]
    assert values(build_schedule("constant", 100), 0, 99) == [1, 1]


def test_linear():
    schedule = build_schedule("linear", 12, warmup_steps=2, final_share=0.5)
    assert values(schedule, 0, 1, 6, 11, 12) == pytest.approx([0.5, 1, 0.75, 0.5, 0.5])


def test_cosine():
    schedule = build_schedule("cosine", 10, warmup_steps=2, final_share=0.2)
    assert values(schedule, 1, 5, 9) == pytest.approx([1, 0.6, 0.2])
    assert schedule(3) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_inverse_square_root():
    schedule = build_schedule("inverse_sqrt", 100, warmup_steps=4)
    assert values(schedule, 0, 3, 15, 63) == pytest.approx([0.25, 1, 0.5, 0.25])
    assert values(build_schedule("inverse_sqrt", 100), 0, 3) == pytest.approx([1, 0.5])


def test_stable_decay():
    schedule = build_schedule("stable_decay", 20, warmup_steps=2, decay_steps=4, final_share=0.2)
    assert values(schedule, 0, 1, 15, 16, 19, 30) == pytest.approx([0.5, 1, 1, 0.8, 0.2, 0.2])


def test_relative_step_of_the_paper():
    assert values(RelativeStep(), 1, 10_000, 40_000) == pytest.approx([0.01, 0.01, 0.005])
    assert values(RelativeStep(warmup=True), 1, 1_000, 1_000_000) == pytest.approx([1e-6, 1e-3, 1e-3])


def test_no_schedule_leaves_its_range():
    for shape in ("constant", "linear", "cosine", "inverse_sqrt", "stable_decay"):
        schedule = build_schedule(
            shape, 50, warmup_steps=7, decay_steps=10 if shape == "stable_decay" else None
        )
        assert all(0 <= schedule(update) <= 1 for update in range(80)), shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wobble", 10), "schedule 'wobble' is unknown, expected one of constant"),
        (("linear", 10, {"warmup_steps": 10}), "more than warmup_steps 10"),
        (
            ("cosine", 10, {"final_share": 1.5, "warmup_steps": -1}),
            "warmup_steps is -1.*\n.*final_share is 1.5",
        ),
        (("stable_decay", 10, {"warmup_steps": 4, "decay_steps": 7}), "decay_steps is 7, expected 1..6"),
        (("stable_decay", 10), "decay_steps is 0"),
        (("piecewise_linear", 10), "points is empty"),
        (("piecewise_linear", 10, {"points": {-5: 1, 4: -1}}), "update -5 .*\n.*multiplier -1 at 4"),
        (("piecewise_linear", 10, {"points": {4: 1}, "warmup_steps": 4}), "put the warm-up into points"),
        *(
            ((shape, 10, {**needed, name: value}), f"{shape}: {name} has no effect: leave it out")
            for name, value, shapes in (
                ("points", {4: 1}, ("constant", "linear", "cosine", "inverse_sqrt", "stable_decay")),
                ("decay_steps", 3, ("constant", "linear", "cosine", "inverse_sqrt", "piecewise_linear")),
                ("final_share", 0.1, ("constant", "inverse_sqrt", "piecewise_linear")),
            )
            for shape in shapes
            for needed in (
                {"stable_decay": {"decay_steps": 3}, "piecewise_linear": {"points": {4: 1}}}.get(shape, {}),
            )
        ),
        (("constant", 10, {"warmup_steps": 10}), "more than warmup_steps 10"),
        (("inverse_sqrt", 10, {"warmup_steps": 12}), "more than warmup_steps 12"),
    ],
)
def test_meaningless_settings_are_refused(arguments, message):
    *position, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ScheduleError, match=message):
        build_schedule(*position, **keywords)

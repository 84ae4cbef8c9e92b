"""What an optimizer saves and takes over: all of it, from any cut, and nothing that does not fit."""

import pytest
import torch
from torch import nn

from sutrain.optim import OPTIMIZERS, FragmentError, FragmentMap, StateError, build_optimizer
from sutrain.optim.build import whole_state_numbers
from tests.optim.test_optimizers import column, parameters, run, run_once, standalone


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_round(name):
    own = parameters()
    optimizer = standalone(name, own, **({"momentum": 0.9} if name == "adafactor" else {}))
    run(optimizer, own, 3)
    saved = optimizer.state_by_name()
    whole = {(key, tensor): values.clone() for key, tensor, _, values in saved.sliced}
    replicated = {key: value.clone() for key, value in saved.replicated.items()}
    other = standalone(name, parameters(), **({"momentum": 0.9} if name == "adafactor" else {}))
    assert (
        other.load_state_by_name(
            replicated, saved.counters, lambda key, tensor, at, n: whole[key, tensor][at : at + n], whole
        )
        == []
    )
    again = other.state_by_name()
    assert again.counters == {"updates": 3, "skipped_updates": 0}
    assert all(torch.equal(again.replicated[key], value) for key, value in replicated.items())
    assert all(torch.equal(values, whole[key, tensor]) for key, tensor, _, values in again.sliced)


def resumed(name, settings, new_settings):
    """(an optimizer with the new settings that took over the state after 3 updates, its weights, what it said)."""
    own = parameters()
    optimizer = standalone(name, own, **settings)
    run(optimizer, own, 3)
    saved = optimizer.state_by_name()
    whole = {(key, tensor): values for key, tensor, _, values in saved.sliced}
    other = standalone(name, own, **new_settings)
    said = other.load_state_by_name(
        saved.replicated, saved.counters, lambda key, tensor, at, n: whole[key, tensor][at : at + n], whole
    )
    return other, own, said


@pytest.mark.parametrize(
    ("name", "setting", "state"),
    [
        ("adafactor", {"momentum": 0.9}, "momentum"),
        *((name, {"update_guard": 2.0, "guard_window": 4}, "update_history") for name in OPTIMIZERS),
    ],
)
def test_momentum_and_guard_may_be_turned_on_and_off_when_a_run_goes_on(name, setting, state):
    optimizer, own, said = resumed(name, {}, setting)
    assert said == [f"the optimizer's {state} begins at zero"] and optimizer.updates == 3
    run(optimizer, own, 2)
    optimizer, own, said = resumed(name, setting, {})
    assert said == [f"the optimizer's {state} is not wanted any more: dropped"] and optimizer.updates == 3
    run(optimizer, own, 2)


def test_a_guard_that_is_turned_on_later_limits_nothing_within_its_window():
    optimizer, own, _ = resumed("adamw", {}, {"update_guard": 1.0001, "guard_window": 5})
    run(optimizer, own, 5)
    assert (column(optimizer, "guard_factor") == 1).all()
    assert optimizer.state_by_name().counters["guard_begun_after"] == 3


def test_state_of_other_settings_is_refused():
    own = parameters()
    optimizer = run_once("adafactor", own)
    replicated = dict(optimizer.state_by_name().replicated)
    replicated["row_mean|matrix"] = torch.zeros(5, 1)
    replicated["row_mean|other"] = replicated.pop("row_mean|square")
    with pytest.raises(StateError) as raised:
        optimizer.load_state_by_name(
            replicated, {"updates": 3}, lambda *where: torch.zeros(where[3]), [("second_moment", "no such")]
        )
    for line in (
        "missing: row_mean|square, second_moment|",
        "unexpected: row_mean|other",
        "another shape: row_mean|matrix (5, 1)",
        "missing counter: skipped_updates",
    ):
        assert line in str(raised.value)
    assert optimizer.updates == 1


def test_state_that_is_missing_altogether_is_a_few_names_and_a_count():
    own = [(f"layers.{i}.weight", torch.nn.Parameter(torch.ones(3))) for i in range(100)]
    optimizer = build_optimizer("adamw", own)
    optimizer.attach(FragmentMap.whole(own))
    with pytest.raises(
        StateError, match=r"missing: first_moment\|layers.0.weight, .* and 197 more"
    ) as raised:
        optimizer.load_state_by_name({}, {"updates": 3, "skipped_updates": 0}, lambda *_: torch.zeros(3), [])
    assert len(str(raised.value).splitlines()) == 2


def test_masters_are_loaded_from_any_overlapping_range():
    own = parameters()
    fragments = FragmentMap.whole(own.items())
    assert fragments.load_master("matrix", 10, torch.arange(5.0)) == 5
    assert own["matrix"].detach().view(-1)[10:15].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FragmentError, match=r"matrix: elements 490\.\.495"):
        fragments.load_master("matrix", 490, torch.zeros(5))
    with pytest.raises(FragmentError, match="nowhere: no such tensor"):
        fragments.load_master("nowhere", 0, torch.zeros(5))
    assert "17x29" in fragments.describe()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adafactor", {}),
        ("adafactor", {"momentum": 0.9}),
        ("adafactor", {"preset": "bert4keras_finetune"}),
        ("adafactor", {"min_dim_size_to_factor": 300}),
        ("adafactor", {"min_dim_size_to_factor": 301, "momentum": 0.9}),
        ("lamb", {}),
        ("adamw", {}),
        ("egd", {}),
    ],
)
def test_state_of_the_size_of_the_parameters_is_what_is_announced(name, settings):
    own = {"matrix": nn.Parameter(torch.randn(300, 400))}
    state = standalone(name, own, **settings).state_by_name()
    held = sum(values.numel() for *_, values in state.sliced)
    assert held == whole_state_numbers(name, settings, 120_000, lambda: {(300, 400): 1})

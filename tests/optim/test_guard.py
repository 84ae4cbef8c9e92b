"""The update guard: what it lets through, what it limits, and that it goes on after a resume as if nothing happened."""

import pytest
import torch
from torch import nn

from sutrain.optim import OPTIMIZERS, STATISTICS, FragmentMap, build_optimizer

SHAPES = {"matrix": (6, 9), "vector": (7,)}
SPIKE = 12
SETTINGS = {
    "adafactor": {"clip_threshold": None, "parameter_scale": False, "weight_decay": 0.1},
    "lamb": {},
    "adamw": {"betas": (0.0, 0.999), "weight_decay": 0.1},
    "egd": {"weight_decay": 0.1},
}


def optimizer_and_weights(name, **settings):
    generator = torch.Generator().manual_seed(0)
    own = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
    optimizer = build_optimizer(name, own.items(), **{**SETTINGS[name], **settings})
    optimizer.attach(FragmentMap.whole(own.items()))
    return optimizer, own


def run(optimizer, own, updates, learning_rate=lambda update: 0.01, spike=("vector",), size=100.0):
    """Gradients of equal size, but at SPIKE; returns (Δθ by tensor, guard factors) of every update."""
    seen = []
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for key, shape in SHAPES.items():
            factor = size if update == SPIKE and key in spike else 1.0
            own[key].grad = torch.randn(shape, generator=generator) * factor
        before = {key: value.detach().clone() for key, value in own.items()}
        optimizer.param_groups[0]["lr"] = learning_rate(update)
        optimizer.step()
        moved = {key: (own[key].detach() - before[key]).norm().item() for key in SHAPES}
        seen.append((moved, optimizer.statistics[:, STATISTICS.index("guard_factor")].tolist()))
        reported = optimizer.statistics[:, STATISTICS.index("update_square_sum")].sqrt().tolist()
        assert reported == pytest.approx(list(moved.values()), rel=1e-3)
    return seen


def column(optimizer, name):
    return optimizer.statistics[:, STATISTICS.index(name)]


@pytest.mark.parametrize("name", ["adafactor", "adamw", "egd"])
def test_a_spike_is_limited_to_k_times_the_history_of_its_own_tensor(name):
    optimizer, own = optimizer_and_weights(name, update_guard=2.0, guard_window=5)
    seen = run(optimizer, own, range(1, SPIKE + 1))
    history = None
    for update, (moved, _) in enumerate(seen, 1):
        if update == SPIKE:
            assert moved["vector"] == pytest.approx(2.0 * history, rel=1e-4)
        else:
            share = 1 / min(update, 5)
            history = moved["vector"] if history is None else history + share * (moved["vector"] - history)
    matrix, vector = seen[-1][1]
    assert vector < 0.7
    assert matrix == 1.0
    assert all(factors == [1.0, 1.0] for _, factors in seen[:-1])
    free = run(*optimizer_and_weights(name), range(1, SPIKE + 1))
    assert free[-1][0]["vector"] > 1.4 * seen[-1][0]["vector"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_nothing_is_limited_nothing_changes(name):
    guarded, own = optimizer_and_weights(name, update_guard=1e6, guard_window=2)
    plain, other = optimizer_and_weights(name)
    run(guarded, own, range(1, 8), spike=())
    run(plain, other, range(1, 8), spike=())
    assert all(torch.equal(own[key], other[key]) for key in SHAPES)


def test_a_warm_up_is_no_spike():
    """The learning rate grows hundredfold, and begins with nothing at all."""
    optimizer, own = optimizer_and_weights("adafactor", update_guard=2.0, guard_window=3, weight_decay=0.0)
    seen = run(optimizer, own, range(1, 10), learning_rate=lambda update: 1e-4 * (update - 1) ** 2)
    assert seen[0][0] == {"matrix": 0.0, "vector": 0.0}
    assert all(factors == [1.0, 1.0] for _, factors in seen)


def test_a_tensor_that_rested_goes_on_as_it_was():
    """With updates clipped, since second moments fade while a tensor rests."""
    settings = {"update_guard": 2.0, "guard_window": 3, "weight_decay": 0.0, "clip_threshold": 1.0}
    optimizer, own = optimizer_and_weights("adafactor", **settings)
    for update in range(1, 60):
        for key, weight in own.items():
            rests = key == "vector" and 10 <= update < 50
            weight.grad = torch.full_like(weight, 0.0 if rests else 1.0)
        optimizer.step()
        if update >= 50:
            assert column(optimizer, "guard_factor").tolist() == [1.0, 1.0], update


def test_nothing_is_limited_in_the_first_window():
    optimizer, own = optimizer_and_weights("adamw", update_guard=1.01, guard_window=SPIKE)
    assert all(factors == [1.0, 1.0] for _, factors in run(optimizer, own, range(1, SPIKE + 1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name):
    settings = {"update_guard": 1.2, "guard_window": 3}
    whole, own = optimizer_and_weights(name, **settings)
    run(whole, own, range(1, 9))
    state = whole.state_by_name()
    assert state.replicated["update_history|vector"].shape == (1,)
    replicated = {key: value.clone() for key, value in state.replicated.items()}
    sliced = {(key, tensor): values.clone() for key, tensor, _, values in state.sliced}
    resumed, other = optimizer_and_weights(name, **settings)
    with torch.no_grad():
        for key in SHAPES:
            other[key].copy_(own[key])
    resumed.load_state_by_name(
        replicated, state.counters, lambda key, tensor, at, n: sliced[key, tensor][at : at + n], sliced
    )
    first = run(whole, own, range(9, SPIKE + 3), spike=("vector", "matrix"))
    second = run(resumed, other, range(9, SPIKE + 3), spike=("vector", "matrix"))
    assert first == second
    assert all(torch.equal(own[key], other[key]) for key in SHAPES)
    if name in ("adafactor", "adamw", "egd"):
        assert min(first[SPIKE - 9][1]) < 1.0

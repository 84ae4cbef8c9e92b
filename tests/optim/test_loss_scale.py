"""fp16's loss scale, with DeepSpeed's own scalers: its numbers go round, and the step in which it grows is seen."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import (
    DynamicLossScaler,
    LossScaleConfig,
    LossScaleProfile,
    LossScaler,
)
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from sutrain.optim.loss_scale import LossScaler as Seen

OVERFLOWS = {3, 4, 11, 12}


@pytest.fixture(autouse=True)
def nobody_logs(monkeypatch):
    """The scaler asks for its rank only to know who logs an overflow; here is no process group to ask."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)


def with_zero():
    scaler = DynamicLossScaler(2.0**10, 3, 1.0, 2, False)
    return SimpleNamespace(loss_scaler=scaler, update=scaler.update_scale)


def without_zero():
    arguments = {"init_scale": 2.0**10, "scale_window": 3, "min_scale": 1.0}
    config = LossScaleConfig(torch.float16, True, 0, arguments, profile=LossScaleProfile.UNFUSED)
    wrapper = SimpleNamespace(loss_scale_config=config, verbose=False)
    wrapper.update = lambda overflow: FP16_UnfusedOptimizer._update_scale(wrapper, overflow)
    return wrapper


@pytest.mark.parametrize("make", [with_zero, without_zero])
def test_growth_is_seen_in_the_very_update(make):
    """The engine updates the scale, then divides by it: the factor is that of new to old scale."""
    wrapper = make()
    seen, factors = Seen(wrapper), []
    for iteration in range(20):
        before = seen.scale
        wrapper.update(iteration in OVERFLOWS)
        if iteration not in OVERFLOWS:
            assert seen.correction() == seen.scale / before
            factors.append(seen.correction())
    assert sorted(set(factors)) == [1.0, 2.0]


@pytest.mark.parametrize("make", [with_zero, without_zero])
@pytest.mark.parametrize("at", [2, 4, 5, 13])
def test_numbers_go_round(make, at):
    """Another scaler that takes over goes on as the first would have."""
    first, second = make(), make()
    for iteration in range(at):
        first.update(iteration in OVERFLOWS)
    Seen(second).load(Seen(first).numbers())
    for iteration in itertools.chain(range(at, 24)):
        assert Seen(first).scale == Seen(second).scale
        for wrapper in (first, second):
            wrapper.update(iteration in OVERFLOWS)


def test_a_fixed_scale_is_no_state():
    seen = Seen(SimpleNamespace(loss_scaler=LossScaler(128.0)))
    assert (seen.numbers(), seen.correction(), seen.scale) == ({}, 1.0, 128.0)
    seen.load({"loss_scale": 4.0, "loss_scale_good_updates": 3})
    assert seen.scale == 128.0


def test_a_run_without_a_scale_leaves_the_first_one():
    wrapper = with_zero()
    Seen(wrapper).load({"updates": 5})
    assert Seen(wrapper).scale == 2.0**10

"""A step that stands out is refused before anything changes, and a run of nothing but NaN is stopped."""

import json
import math

import numpy as np
import pytest
import torch

from sutrain.monitor.acting import BrokenStreak, StepGate, TrainingStoppedError, write_dump
from sutrain.optim import FragmentMap, build_optimizer


def feed(gate: StepGate, steps: int = 40, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for _ in range(steps):
        gate.loss = 2.0 * math.exp(0.02 * random.standard_normal())
        assert gate(3.0 * math.exp(0.05 * random.standard_normal()))


def test_a_jump_of_loss_or_gradient_is_refused_and_the_samples_are_named():
    gate = StepGate(8.0)
    feed(gate)
    gate.loss = 4.0
    assert not gate(3.0)
    assert gate.refused == 1 and gate.verdict["sigmas"] > 8
    record = gate.as_record(samples_consumed=480, samples=12)
    assert record["refused"]["first_sample"] == 468 and record["refused"]["samples"] == 12
    gate.loss = 2.0
    assert gate(3.0) and gate.as_record(492, 12) == {}
    assert not gate(30.0)
    gate.loss = math.nan
    assert not gate(3.0) and gate.verdict["sigmas"] == math.inf


def test_nothing_is_refused_on_a_short_history_or_when_off_and_a_new_level_is_accepted_in_the_end():
    gate = StepGate(8.0)
    for loss in (2.0, 2.0, 50.0, 2.0):
        gate.loss = loss
        assert gate(1.0)
    off = StepGate(None)
    off.loss = math.nan
    assert off(math.inf)
    gate = StepGate(8.0)
    feed(gate)
    gate.loss = 4.0
    refused = [not gate(3.0) for _ in range(15)]
    assert refused[0] and not refused[-1]


def test_a_resumed_gate_decides_as_the_uninterrupted_one():
    one, other = StepGate(6.0), StepGate(6.0)
    feed(one, 70)
    one.loss = math.nan
    one(1.0)
    other.load(json.loads(json.dumps(one.state())))
    random = np.random.default_rng(5)
    verdicts = []
    for _ in range(150):
        loss, norm = 2.0 * math.exp(0.1 * random.standard_normal()), math.exp(random.standard_normal())
        one.loss = other.loss = loss
        verdicts.append((one(norm), other(norm)))
    assert all(a == b for a, b in verdicts) and not all(a for a, _ in verdicts)
    assert one.refused == other.refused


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor"])
def test_a_refused_update_changes_neither_weights_nor_state_nor_counters(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    optimizer = build_optimizer(name, model.named_parameters(), learning_rate=0.1)
    optimizer.attach(FragmentMap.whole(model.named_parameters()))
    gate = StepGate(8.0)
    optimizer.gate = gate

    def step(factor: float) -> None:
        for parameter in model.parameters():
            parameter.grad = factor * (1 + 0.01 * torch.randn_like(parameter))
        gate.loss = 1.0
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        state = optimizer.state_by_name()
        held = [*state.replicated.values(), *(values for *_, values in state.sliced)]
        return [tensor.clone() for tensor in (*model.parameters(), *held)]

    for _ in range(30):
        step(1.0)
    before, updates = everything(), optimizer.updates
    step(1000.0)
    assert gate.refused == 1 and optimizer.updates == updates == 30
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(1.0)
    assert optimizer.updates == 31
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_broken_steps_in_a_row_stop_the_run_with_a_dump(tmp_path):
    streak, dumped = BrokenStreak(2), []

    def record(step, loss, skipped):
        return {"step": step, "loss": loss, "skipped_steps_total": skipped, "refused_steps_total": 0}

    def dump(last, last_good_step):
        assert last_good_step == 3  # the loss of step 4 was finite, and there was no update of it
        dumped.append(
            write_dump(tmp_path, last["step"], last, {"layer": ["0"], "grad_norm": [math.inf]}, None)
        )
        return str(dumped[0])

    streak.stop_after(record(1, 2.0, 0), dump)
    streak.stop_after(record(2, math.nan, 0), dump)
    streak.stop_after(record(3, 2.0, 0), dump)
    streak.stop_after(record(4, 2.0, 1), dump)
    with pytest.raises(
        TrainingStoppedError, match=r"after step 5: 2 step\(s\) in a row .*dump-step-00000005.json"
    ):
        streak.stop_after(record(5, math.nan, 2), dump)
    content = json.loads(dumped[0].read_text())
    assert content["last_step"]["loss"] == "nan" and content["layers"]["grad_norm"] == ["inf"]
    assert content["documents"].endswith("--step 5")
    never = BrokenStreak(None)
    for step in range(7, 50):
        never.stop_after(record(step, math.nan, step), None)
    assert never.good_step == 5, "whose weights the loss of step 6 was the last to see"


def test_refused_steps_are_broken_ones_and_what_was_missed_before_a_checkpoint_is_not():
    def record(step, skipped, refused):
        counts = {"skipped_steps_total": skipped, "refused_steps_total": refused}
        return {"step": step, "loss": 2.0, **counts}

    streak = BrokenStreak(1)
    streak.without_update = 7
    streak.stop_after(record(101, 4, 3), None)
    with pytest.raises(TrainingStoppedError, match="after step 102"):
        streak.stop_after(record(102, 4, 4), None)

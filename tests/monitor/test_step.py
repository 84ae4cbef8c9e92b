"""What one step of the loop says of itself, with a made-up engine in place of DeepSpeed's."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sutrain import pretrain
from sutrain.data import Batch
from sutrain.monitor.acting import StepGate


class Engine:
    """Takes micro-batches and does nothing."""

    def train(self):
        pass

    def set_gradient_accumulation_boundary(self, last):
        pass

    def __call__(self, *inputs, **settings):
        return SimpleNamespace(loss_sum=torch.tensor(8.0))

    def backward(self, loss, scale_wrt_gas):
        pass


class Clock:
    def update(self):
        pass


@pytest.fixture
def run(monkeypatch):
    """A run of one rank; `run.applied` says whether the next update is made."""
    run = object.__new__(pretrain.Run)
    run.config = SimpleNamespace(optimizer=SimpleNamespace(learning_rate=1.0), seed=0)
    run.engine, run.device, run.clock, run.gate = Engine(), torch.device("cpu"), Clock(), StepGate(8.0)
    run.rank, run.world_size, run.stop_requested, run.save_requested = 0, 1, False, False
    run.plan, run.schedule = SimpleNamespace(sequences_at=lambda _: 4), lambda _: 1.0
    run.optimizer = SimpleNamespace(param_groups=[{}], updates=0, statistics=torch.zeros(1))
    run.fragments = SimpleNamespace(loss_scale=1.0)
    run.steps_done = run.samples_consumed = run.tokens = run.skipped = 0
    run.applied = True
    monkeypatch.setattr(pretrain.dist, "all_reduce", lambda tensor: None)

    def step_engine(_):
        run.optimizer.updates += run.applied

    monkeypatch.setattr(pretrain, "step_engine", step_engine)
    return run


def micro_batches(count=2):
    tensor = torch.ones(1, 4, dtype=torch.long)
    return [Batch(first, tensor, tensor, tensor > 0, tensor, fingerprint=7) for first in range(count)]


def test_an_update_that_the_gate_was_not_asked_for_is_skipped_and_not_refused(run):
    """A gradient that is not finite never comes to the gate, whose last verdict may have been a refusal."""
    random = np.random.default_rng(0)
    for _ in range(40):
        run.gate.loss = math.exp(0.02 * random.standard_normal())
        assert run.gate(1.0)
    assert not run.gate(100.0) and run.gate.verdict
    run.applied = False
    record = run.step(micro_batches())
    assert record["skipped_steps_total"] == 1 and "refused" not in record
    assert record["refused_steps_total"] == 1

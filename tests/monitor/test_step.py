"""What one step of the loop says of itself, with a made-up engine in place of DeepSpeed's."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sutrain import pretrain
from sutrain.data import Batch
from sutrain.evaluation import Evaluator
from sutrain.launch import Requests
from sutrain.monitor.acting import StepGate
from sutrain.monitor.ranks import RankClock
from sutrain.objectives.masked_lm import MaskedLoss


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


@pytest.fixture
def run(monkeypatch):
    """A run of one rank; `run.applied` says whether the next update is made."""
    run = object.__new__(pretrain.Run)
    run.config = SimpleNamespace(optimizer=SimpleNamespace(learning_rate=1.0), seed=0)
    run.engine, run.device, run.gate = Engine(), torch.device("cpu"), StepGate(8.0)
    run.clock = RankClock(0, 1, run.device)
    run.rank, run.world_size, run.requests, run.save_now = 0, 1, Requests(), False
    run.plan = SimpleNamespace(sequences_at=lambda _: 4, tokens_at=lambda samples: 2 if samples < 4 else None)
    run.manifest, run.schedule = SimpleNamespace(row_tokens=4), lambda _: 1.0
    run.optimizer = SimpleNamespace(param_groups=[{}], updates=0, statistics=torch.zeros(1))
    run.fragments = SimpleNamespace(loss_scale=1.0)
    run.steps_done = run.samples_consumed = run.tokens = run.skipped = 0
    run.applied = True
    monkeypatch.setattr(pretrain.dist, "all_reduce", lambda tensor: None)

    def step_engine(_):
        run.optimizer.updates += run.applied

    monkeypatch.setattr(pretrain, "step_engine", step_engine)
    yield run
    run.clock.close()


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


def test_a_step_says_how_long_its_rows_were(run):
    assert [run.step(micro_batches())["row_tokens"] for _ in range(2)] == [2, 4]


def test_waiting_for_others_is_no_part_of_a_rank_s_forward_time(run, monkeypatch):
    """All wait ahead of the first forward pass for a rank without data, and ZeRO-2 for each other in every backward."""
    monkeypatch.setattr(pretrain.dist, "all_reduce", lambda tensor: time.sleep(0.1))
    monkeypatch.setattr(Engine, "backward", lambda *_, **settings: time.sleep(0.1))
    run.clock.forward(0.0)
    run.step(micro_batches(3))
    run.clock.finished(1)
    state = run.clock.board.states[0]
    assert 0 < state.forward_seconds < 0.1 and state.step_seconds > 0.5


class Model:
    """Guesses nothing, of one predicted token."""

    training = True

    def set_ramp(self, updates):
        pass

    def eval(self):
        pass

    def train(self, mode):
        pass

    def __call__(self, *inputs, see, **settings):
        see(torch.zeros(4, 8))
        time.sleep(0.01)
        return MaskedLoss(torch.tensor(8.0), torch.tensor(0), torch.tensor(4))


@pytest.fixture
def evaluating(run, monkeypatch):
    """The run, with three batches to evaluate of a model that learns nothing; `run.signs`: when it said that it lives,
    `run.done`: what it wrote, as far as it counts evaluations and checkpoints."""
    evaluator = object.__new__(Evaluator)
    vars(evaluator).update(
        samples=SimpleNamespace(batch=lambda start, count: micro_batches(1)[0]), sequences=3, micro_sequences=1,
        device=run.device, rank=0, world_size=1, lengths=[], sources=[], most_frequent=5, basis="",
    )  # fmt: skip
    monkeypatch.setattr(Evaluator, "_adder_by_kind", lambda *_: lambda scores_MV: None)
    run.evaluator, run.engine.module = evaluator, Model()
    run.signs, run.done = [], []
    run.outputs = SimpleNamespace(
        heartbeat=lambda: run.signs.append(run.clock.board.states[0].time),
        evaluation=lambda found: run.done.append(f"evaluation {found['step']}"),
    )
    run.config.steps, run.config.checkpoint = 20, SimpleNamespace(every_steps=10)
    run.steps_done, run.saved_step, run.owed, run.other_basis, run.best_loss = 7, 0, True, False, 1.0

    def save(best=False):
        run.done.append(f"checkpoint {run.steps_done}{', evaluation owed' * run.owed}{', best' * best}")
        run.saved_step = run.steps_done

    run.save = save
    run.clock.finished(7)
    return run


def test_every_micro_batch_of_an_evaluation_is_a_sign_of_life(evaluating):
    """On a large data set it takes longer than a rank, or the loop, may be silent."""
    assert evaluating.evaluate() == 24.0 / 12
    assert len(evaluating.signs) == 3 and evaluating.signs[2] > evaluating.signs[0] + 0.02


def asked_at_second_batch(run, name):
    """A signal that arrives within the evaluation."""
    batch, beats = run.evaluator.samples.batch, iter((False, True))

    def read(start, count):
        if next(beats, False):
            setattr(run.requests, name, True)
        return batch(start, count)

    run.evaluator.samples = SimpleNamespace(batch=read)


def test_a_request_to_stop_breaks_an_evaluation_off_behind_a_checkpoint_that_owes_it(evaluating):
    asked_at_second_batch(evaluating, "stop")
    assert evaluating.settle() and evaluating.done == ["checkpoint 7, evaluation owed"]
    # It is made when the run goes on; should that be stopped at once, nothing is new that could be kept.
    assert evaluating.evaluate_first(resumed=True) and len(evaluating.done) == 1
    evaluating.requests.stop, evaluating.steps_done, evaluating.saved_step = False, 20, 20
    assert not evaluating.evaluate_first(resumed=True)
    assert evaluating.done[1:] == ["evaluation 20", "checkpoint 20"], "the last one says that nothing is owed"


def test_a_request_to_save_does_not_wait_for_an_evaluation_and_lets_it_go_on(evaluating):
    asked_at_second_batch(evaluating, "save")
    evaluating.best_loss = 3.0
    assert not evaluating.settle()
    assert evaluating.done == ["checkpoint 7, evaluation owed", "evaluation 7", "checkpoint 7, best"]
    assert not evaluating.requests.save

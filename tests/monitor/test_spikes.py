"""What counts as a spike, and what must not."""

import math

import numpy as np
import pytest

from sutrain.monitor.log import find_steps, last_steps
from sutrain.monitor.spikes import LEVEL_STEPS, MINIMUM_STEPS, WINDOW_STEPS, RollingHistory, SpikeWatch
from tests.monitor.made_up import COLUMNS, groups_of, made_up_run, write_run


def judge_all(**settings):
    watch, verdicts = None, []
    for record, table, _ in made_up_run(**settings):
        watch = watch or SpikeWatch(table.groups)
        verdicts.append(watch.judge(record["loss"], record["learning_rate"], table))
    return verdicts


def constant_run(losses, updates, rates=None):
    """Verdicts of a two-layer model whose every update norm is `updates[i]` times a constant."""
    groups = groups_of(2)
    watch = SpikeWatch(groups)
    for i, (loss, update) in enumerate(zip(losses, updates, strict=True)):
        sums = np.ones((len(groups.names), len(COLUMNS)))
        sums[:, COLUMNS.index("update_square_sum")] = update**2
        yield watch.judge(loss, rates[i] if rates is not None else 1e-3, groups.table(sums, COLUMNS))


def test_a_clean_run_with_warm_up_and_decay_raises_no_alarm():
    for seed in range(3):
        verdicts = judge_all(seed=seed, steps=600)
        assert not any(len(v.updates) or v.loss_factor for v in verdicts)


def test_the_update_spike_is_seen_before_the_loss_spike_and_in_the_right_layers():
    verdicts = judge_all(layers=9, steps=300, spike_at=(150, 220))
    assert [i + 1 for i, v in enumerate(verdicts) if len(v.updates)] == [150, 220]
    assert [i + 1 for i, v in enumerate(verdicts) if v.loss_factor] == [152, 222]
    spike = verdicts[149]
    layers = {spike.groups.keys[g][0] for g in spike.updates}
    assert layers == {"", "0", "1", "2"}  # the third of the layers that moved, and the tensors below them
    assert all(row[2] > 4 for row in spike.conspicuous(3))
    assert spike.as_record()["update_spikes"][0][:2] == ["", "embedding"]


def test_a_learning_rate_that_jumps_is_an_update_spike_and_a_smooth_schedule_is_not():
    rates = np.concatenate([np.linspace(1e-5, 1e-3, 50), np.geomspace(1e-3, 1e-5, 100)])
    assert not any(len(v.updates) for v in constant_run([2.0] * 150, rates, rates))
    rates[100] *= 30
    verdicts = list(constant_run([2.0] * 150, rates, rates))
    assert [i for i, v in enumerate(verdicts) if len(v.updates)] == [100]
    assert verdicts[100].update_factor_G[0] == pytest.approx(30, rel=0.1)


def test_nothing_is_judged_on_a_short_history_and_a_level_that_stays_becomes_the_new_usual():
    updates = [1.0] * 10 + [5.0]
    assert not any(len(v.updates) for v in constant_run([2.0] * 11, updates))
    updates = [1.0] * MINIMUM_STEPS + [5.0]
    assert len(list(constant_run([2.0] * len(updates), updates))[-1].updates)
    updates = [1.0] * WINDOW_STEPS + [5.0] * WINDOW_STEPS
    alarms = [i for i, v in enumerate(constant_run([2.0] * len(updates), updates)) if len(v.updates)]
    assert alarms == list(range(WINDOW_STEPS, WINDOW_STEPS + LEVEL_STEPS // 2 + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_from_the_first_step(bad):
    verdicts = list(constant_run([bad, 2.0, bad], [1.0, 1.0, 1.0]))
    assert [v.loss_factor for v in verdicts] == [math.inf, None, math.inf]


def test_a_constant_loss_does_not_alarm_over_its_last_digit():
    losses = [2.0] * 50 + [2.0001, 2.15, 2.3]
    verdicts = list(constant_run(losses, [1.0] * 53))
    assert [v.loss_factor is not None for v in verdicts[50:]] == [False, False, True]


def test_skipped_steps_leave_no_trace():
    updates = [1.0, 0.0] * 40 + [math.nan, 1.0, 3.0]
    verdicts = list(constant_run([2.0] * len(updates), updates))
    assert [i for i, v in enumerate(verdicts) if len(v.updates)] == [len(updates) - 1]


def test_level_and_noise_by_hand():
    history = RollingHistory(1)
    for value in [0.0, 1.0, 2.0] * 7:  # level 1; changes 1, 1, 2, 1, 1, 2, ...: median 1
        history.add(np.array([value]))
    factor, sigmas = history.compare(np.array([4.0]))
    assert factor[0] == pytest.approx(math.e**3)
    assert sigmas[0] == pytest.approx(3 / (1.4826 / math.sqrt(2)))


def test_a_spike_shows_on_a_steep_slope():
    losses = np.exp(np.linspace(2.0, 1.4, 100)) * (1 + 0.01 * np.random.default_rng(0).standard_normal(100))
    losses[80] *= 1.3
    assert [i for i, v in enumerate(constant_run(losses, [1.0] * 100)) if v.loss_factor] == [80]


def test_a_noisy_quantity_may_double_without_alarm():
    noise = np.random.default_rng(0).standard_normal(1000)
    updates = np.exp(0.35 * noise)  # above twice its median on every fortieth step
    assert (updates > 2).sum() > 15
    assert not any(len(v.updates) for v in constant_run([2.0] * 1000, updates))


def test_a_history_read_back_from_the_log_judges_as_the_one_that_went_on(tmp_path):
    settings = {"layers": 3, "steps": 200, "spike_at": (150,)}
    write_run(tmp_path, **settings)
    straight, back = SpikeWatch(groups_of(3)), SpikeWatch(groups_of(3))
    for number, (record, table, _) in enumerate(made_up_run(**settings), 1):
        expected = straight.judge(record["loss"], record["learning_rate"], table)
        if number == 149:
            steps = list(find_steps(tmp_path / "metrics.jsonl", range(150)).values())
            assert [s["step"] for s in last_steps(tmp_path / "metrics.jsonl", 3)] == [198, 199, 200]
            back.restore(steps)
        elif number > 149:
            found = back.judge(record["loss"], record["learning_rate"], table)
            assert found.updates.tolist() == expected.updates.tolist()
            assert found.loss_factor == pytest.approx(expected.loss_factor)
    other = SpikeWatch(groups_of(5))
    other.restore(steps)  # another model: its loss is known, its layers are not
    assert not np.isfinite(other._updates._recent_NW).any() and np.isfinite(other._loss._recent_NW).any()

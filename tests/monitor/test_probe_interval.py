"""The interval of probes: worked out by hand, the same on every rank, kept by checkpoints, overruled by the user."""

import json
import re

import pytest
import torch

from data_prep.config_file import ConfigError, load_config
from sutrain.config import PretrainConfig
from sutrain.data import open_manifest
from sutrain.monitor.probe_interval import SETTLED_AFTER, ProbeInterval, interval, planned_interval
from sutrain.plan import probes_in_words
from tests.test_pretrain import records, train, write_run

CPU, BASIS = torch.device("cpu"), {"rows": 8, "world_size": 2}


@pytest.mark.parametrize(
    ("probe", "step", "share", "expected"),
    [
        (12.792, 2.001, 0.02, 350),  # 319.6
        (0.232, 0.427, 0.02, 50),  # 27.2
        (1.0, 1.0, 0.02, 50),  # just fits
        (1.001, 1.0, 0.02, 100),
        (10.0, 1.0, 0.5, 50),
        (0.0, 1.0, 0.02, 50),  # nothing was probed
    ],
)
def test_the_interval_is_the_shortest_round_one_that_keeps_the_share(probe, step, share, expected):
    assert interval(probe, step, share) == expected
    assert probe / (expected * step) <= share
    if expected > 50:
        assert probe / ((expected - 50) * step) > share


def test_by_flops_a_probe_of_eight_rows_beside_a_batch_of_one_is_rare():
    assert planned_interval(8, 1, 0.02) == 300  # 2 x 8 passes of a third of a step each: 5.33 steps ÷ 0.02
    assert planned_interval(8, 512, 0.02) == 50


def settle(chosen: ProbeInterval, step_seconds, probe_seconds=1.0) -> list[bool]:
    return [chosen.finished(seconds, probe_seconds, CPU) for seconds in step_seconds]


def test_it_settles_once_by_the_median_of_the_first_updates_without_the_very_first():
    chosen = ProbeInterval(None, 0.02, BASIS)
    assert chosen.state() == {} and "measured over 6 updates" in chosen.words()
    said = settle(chosen, [900.0, 0.1, 0.1, 0.1, 700.0, 0.1, 0.1, 0.1])
    assert said == [False] * (SETTLED_AFTER - 1) + [True, False, False]
    assert chosen.every_steps == 500  # 1 / (0.02 · 0.1)
    assert chosen.words() == "probes: every 500 updates (2.0% of the time at most)"


def test_a_checkpoint_keeps_it_unless_the_run_is_another_one():
    first = ProbeInterval(None, 0.02, BASIS)
    settle(first, [0.1] * SETTLED_AFTER)
    state = json.loads(json.dumps(first.state()))
    resumed = ProbeInterval(None, 0.02, BASIS)
    resumed.load(state)
    assert resumed.every_steps == 500 and not any(settle(resumed, [9.0] * 10)) and resumed.state() == state
    for share, basis in ((0.05, BASIS), (0.02, {**BASIS, "world_size": 3})):
        other = ProbeInterval(None, share, basis)
        other.load(state)
        assert other.every_steps is None
    other.load({})  # of an older checkpoint
    assert other.every_steps is None


def test_what_the_user_gives_is_neither_measured_nor_replaced():
    given = ProbeInterval(7, 0.02, BASIS)
    given.load({"every_steps": 500, "basis": given.basis})
    assert given.every_steps == 7 and not any(settle(given, [1e-6] * 10)) and given.state() == {}
    assert ProbeInterval(0, 0.02, BASIS).words() == "probes: none (monitor.probe_every_steps)"


def test_two_ranks_agree_print_it_and_a_resumed_run_keeps_it(dataset, tmp_path):
    """The real thing: a share so small that no interval fits the run, so that only first updates are probed."""
    config = write_run(tmp_path, dataset, monitor={"port": 0, "probe_share": 1e-6}, steps=12)
    output = train(config, 2, "--steps=8")
    (every,) = re.findall(
        r"^probes: every (\d+) updates \(0\.0% of the time at most\)$", output, re.MULTILINE
    )
    assert int(every) >= 50 and int(every) % 50 == 0
    assert list(records(tmp_path / "run", "probe")) == [1]
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    texts = [path.read_text() for path in checkpoint.glob("*.json")]
    assert any(f'"every_steps": {every}' in text or f'"every_steps":{every}' in text for text in texts)
    resumed = train(config, 2)
    assert f"probes: every {every} updates" in resumed and "resumed at step 8" in resumed
    assert resumed.count("probes:") == 1
    assert list(records(tmp_path / "run", "probe")) == [1, 9]


def test_a_share_beside_a_given_interval_is_refused(write_config):
    with pytest.raises(ConfigError, match=r"monitor\.probe_share has no effect beside probe_every_steps"):
        load_config(PretrainConfig, write_config(monitor={"probe_every_steps": 5, "probe_share": 0.1}), [])


def test_the_plan_says_how_often(dataset, write_config):
    words = []
    for changes in ({"probe_every_steps": None, "probe_sequences": 4}, {"probe_every_steps": 30},
                    {"probe_every_steps": 0}):  # fmt: skip
        config = load_config(PretrainConfig, write_config(data={"dir": str(dataset)}, monitor=changes), [])
        words.append(probes_in_words(config, 1, open_manifest(config.data)))
    assert words[0].startswith("about every 150 updates by FLOPs (4 rows in fp32)")
    assert words[1:] == ["every 30 updates", "none"]

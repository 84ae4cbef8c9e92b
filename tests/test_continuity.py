"""What may change when a run goes on: listed, checked, shown; and beginning from the weights of another run."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from data_prep.config_file import ConfigError, load_config
from sutrain import checkpoint as checkpoints
from sutrain import continuity
from sutrain.checkpoint_writer import save_checkpoint
from sutrain.config import PretrainConfig
from sutrain.data import load_manifest


@pytest.fixture
def config(write_config, dataset):
    return load_config(PretrainConfig, write_config(data={"dir": str(dataset)}))


@pytest.fixture
def saved(config, dataset):
    return continuity.identity(config, [load_manifest(dataset)])


def changed(saved, path, value):
    now = copy.deepcopy(saved)
    node = now
    *parents, last = path.split(".")
    for parent in parents:
        node = node[int(parent) if parent.isdigit() else parent]
    node[last] = value
    return now


def test_nothing_changed_is_nothing_said(saved):
    assert continuity.check(saved, copy.deepcopy(saved), []) == []


def test_the_lists_name_keys_that_exist(saved):
    """A rule for a key that no longer exists is a rule for nothing."""
    for rule in (*continuity.MAY_CHANGE, *continuity.FIXED):
        node = saved["config"]
        for part in rule.split("."):
            assert part in node, rule
            node = {"weight": 1.0} if part == "others" else node[part]


def test_every_section_of_the_configuration_has_a_rule(saved):
    """A new section must be put on one of the lists: what nobody thought about counts as fixed."""
    listed = {
        rule.split(".")[0] for rule in (*continuity.MAY_CHANGE, *continuity.FIXED, *continuity.ACCEPTABLE)
    }
    assert set(saved["config"]) <= listed, set(saved["config"]) - listed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config.optimizer.learning_rate", 0.01),
        ("config.steps", 99),
        ("config.batch.global_sequences", 24),
        ("config.zero.stage", 2),
        ("config.data.dir", "/elsewhere"),
        ("config.model.hidden_dropout", 0.3),
        ("config.evaluation.every_steps", 3),
    ],
)
def test_what_may_change_is_let_through_and_told(saved, path, value):
    lines = continuity.check(saved, changed(saved, path, value), [])
    assert (
        len(lines) == 1
        and lines[0].startswith(f"{path.removeprefix('config.')}: ")
        and repr(value) in lines[0]
    )


def test_what_only_a_run_that_begins_looks_at_is_told_as_such(saved):
    saved["config"]["precision"] = "fp16"
    now = changed(changed(saved, "config.init_from", "/x"), "config.loss_scale.initial", 1024.0)
    lines = continuity.check(saved, now, [])
    assert len(lines) == 2 and all("(without effect: " in line for line in lines)
    saved["config"]["precision"] = "bf16"
    lines = continuity.check(saved, now, [])
    assert [line.split(":")[0] for line in lines if "without effect" in line] == ["init_from"]


@pytest.mark.parametrize(
    ("path", "value", "way_out"),
    [
        ("config.model.num_layers", 3, "--init_from=CHECKPOINT"),
        ("config.optimizer.name", "lamb", "--init_from=CHECKPOINT"),
        ("config.data.weight", 2.0, "--init_from=CHECKPOINT"),
        ("config.seed", 1, "--accept_changes=[seed]"),
        ("config.masking.predict_share", 0.3, "--accept_changes=[masking]"),
        ("corpora.0.content_hash", "other", "--accept_changes=[corpora]"),
    ],
)
def test_what_may_not_change_is_refused_with_the_difference_and_the_way_out(saved, path, value, way_out):
    with pytest.raises(ConfigError) as raised:
        continuity.check(saved, changed(saved, path, value), [])
    key = path.removeprefix("config.")
    assert f"{key}: " in str(raised.value) and f"{value!r} now" in str(raised.value)
    assert way_out in str(raised.value)


def test_all_differences_are_named_at_once_and_free_ones_are_not_among_them(saved):
    now = changed(changed(changed(saved, "config.seed", 1), "config.model.num_layers", 3), "config.steps", 5)
    with pytest.raises(ConfigError) as raised:
        continuity.check(saved, now, [])
    assert "seed: " in str(raised.value) and "model.num_layers: " in str(raised.value)
    assert "steps: " not in str(raised.value)


def test_an_accepted_change_goes_through_and_only_that(saved):
    now = changed(saved, "corpora.0.splits.train.rows", 17)
    now["corpora"][0]["splits"]["train"]["rows"] = 17
    lines = continuity.check(saved, now, ["corpora"])
    assert "corpora.0.splits.train.rows" in lines[0] and "17 now (accepted)" in lines[0]
    with pytest.raises(ConfigError):
        continuity.check(saved, now, ["seed"])
    with pytest.raises(ConfigError):
        continuity.check(
            saved, changed(saved, "config.model.hidden_size", 64), ["corpora", "seed", "masking"]
        )


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default(saved):
    older = copy.deepcopy(saved)
    del older["config"]["model"]["hidden_size"], older["config"]["masking"]["predict_share"]
    default = copy.deepcopy(saved)
    default["config"]["model"]["hidden_size"] = 768
    assert continuity.check(older, default, []) == []
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 768 in the checkpoint, 32 now"):
        continuity.check(older, saved, [])


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_refused(saved):
    with pytest.raises(ConfigError, match="init_from"):
        continuity.check({"steps": 3}, saved, [])


WEIGHT = torch.arange(6.0).reshape(2, 3)


def whole(source, step=None):
    weights = continuity.open_weights(source, step)
    assert list(weights.shapes["a"]) == [2, 3]
    return weights.read("a", 0, 6).reshape(2, 3)


def a_checkpoint(directory, step=4, values=WEIGHT):
    return save_checkpoint(
        directory, step, [(checkpoints.MASTER, "a", 0, values.flatten())], {}, {"a": [2, 3]}, {"steps": step}
    )


def test_a_new_run_begins_from_a_checkpoint_a_run_or_an_exported_folder(tmp_path):
    run = tmp_path / "run"
    folder = a_checkpoint(run / "checkpoints")
    a_checkpoint(run / "checkpoints", 8, WEIGHT + 1)
    exported = tmp_path / "exported"
    exported.mkdir()
    save_file({"model.a": WEIGHT + 2}, exported / "model.safetensors")
    for source, expected in ((folder, WEIGHT), (run, WEIGHT + 1), (exported, WEIGHT + 2)):
        assert torch.equal(whole(source), expected), source
    checkpoints.mark_best(run / "checkpoints", 4, 1.0, "rows")
    assert torch.equal(whole(run), WEIGHT), "the best one of a run comes first"
    assert torch.equal(whole(run, step=8), WEIGHT + 1), "what rank 0 chose"
    weights = continuity.open_weights(exported)
    assert torch.equal(weights.read("a", 2, 3), (WEIGHT + 2).flatten()[2:5])


def test_a_host_that_does_not_see_the_weights_says_so_itself(tmp_path, monkeypatch):
    """As an error of one rank, which is told by that rank and not by rank 0."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda chosen, source: chosen.fill_(4))
    with pytest.raises(checkpoints.CheckpointError, match="this host does not: init_from"):
        continuity.begin_from(tmp_path / "nothing", None, torch.device("cpu"))


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    folder = a_checkpoint(tmp_path)
    with pytest.raises(ConfigError) as raised:
        found = continuity.open_weights(folder).shapes
        continuity.check_shapes(folder, found, {"a": torch.Size([3, 2]), "b": torch.Size([1])})
    assert "a: [2, 3] there, [3, 2] in this model" in str(raised.value) and "b: missing" in str(raised.value)
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        continuity.open_weights(tmp_path / "nothing")
    (folder / "replicated.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="0 bytes"):
        continuity.open_weights(folder)

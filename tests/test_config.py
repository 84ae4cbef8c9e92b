"""The run configuration: mistakes, batch arithmetic, and the engine settings that follow."""

from dataclasses import replace

import pytest
import yaml

from data_prep.config_file import ConfigError, load_config, to_yaml
from sutrain.config import PretrainConfig, batch_plan, learning_rate_schedule
from sutrain.engine import deepspeed_config
from sutrain.plan import micro_batches_in_words
from tests.conftest import ROOT


def load(path, *overrides):
    return load_config(PretrainConfig, path, overrides)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_shipped_config_is_valid_and_reads_back(path, tmp_path):
    config = load(path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config
    settings = [line for line in path.read_text().splitlines() if line.strip() and line.split("#")[0].strip()]
    bare = [line for line in settings if "#" not in line and not line.rstrip().endswith(":")]
    assert not bare, "every setting of a shipped configuration says what it is"


def test_a_path_may_begin_at_home_as_those_of_the_preparation_may(write_config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = {"run_dir": "~/runs/x", "init_from": "~/runs/y", "data.dir": "~/data"}
    config = load(
        write_config(),
        *(f"--{key}={path}" for key, path in paths.items()),
        "--data.others=[{dir: ~/other, weight: 1}]",
    )
    found = [config.run_dir, config.init_from, config.data.dir, config.data.others[0].dir]
    assert list(map(str, found)) == [
        f"/home/someone/{name}" for name in ("runs/x", "runs/y", "data", "other")
    ]


def test_all_mistakes_at_once(write_config):
    """Also those that only a check across keys finds, in sections that have other mistakes."""
    path = write_config(
        steps=5,
        schedule={"warmup_steps": 9, "shape": "cosine"},
        optimizer={"nmae": "lamb", "settings": {"clip_treshold": 2}},
        model={"hidden_size": 31, "head_size": 15},
        batch={"global_tokens": 64},
    )
    with pytest.raises(ConfigError) as raised:
        load(path, "--zero.stage=4", "--checkpiont.every_steps=3")
    lines = str(raised.value).splitlines()
    expected = (
        "optimizer.nmae: unknown key; did you mean 'name'?",
        "unknown setting 'clip_treshold'; did you mean clip_threshold",
        "model.head_size",
        "give exactly one of global_sequences and global_tokens",
        "zero.stage: input should be 0, 1, 2 or 3, found 4",
        "checkpiont: unknown key; did you mean 'checkpoint'?",
    )
    for text in expected:
        assert sum(text in line for line in lines) == 1, (text, lines)


def test_a_check_across_sections_runs_beside_other_mistakes(write_config):
    with pytest.raises(ConfigError) as raised:
        load(write_config(steps=5, schedule={"warmup_steps": 9}), "--zero.stage=7")
    assert "zero.stage" in str(raised.value) and "warmup_steps" in str(raised.value)


def test_small_numbers_may_be_written_without_a_dot(write_config):
    config = load(write_config(optimizer={"learning_rate": "1e-3", "settings": {"epsilon_scale": "1e-3"}}))
    assert config.optimizer.settings == {"epsilon_scale": 0.001}
    assert (
        load(write_config(), "--optimizer.settings.epsilon_scale=1e-3").optimizer.settings["epsilon_scale"]
        == 0.001
    )


def test_small_numbers_may_be_nested_in_settings(write_config):
    settings = {"betas": [0.9, "1e-3"], "per_tensor": {"*bias*": {"learning_rate_scale": "1e-2"}}}
    read = load(write_config(optimizer={"name": "adamw", "settings": settings})).optimizer.settings
    assert read == {"betas": [0.9, 0.001], "per_tensor": {"*bias*": {"learning_rate_scale": 0.01}}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optimizer.settings.per_tensor={'*': 0.1}", r"per_tensor '\*': 0.1, expected \{setting: value\}"),
        ("--optimizer.settings.per_tensor=[a]", r"per_tensor is \['a'\], expected \{glob"),
        (
            "--optimizer.settings.per_tensor={'*': {weight_decay: no}}",
            "weight_decay is False, expected a number",
        ),
        ("--optimizer.settings.per_tensor={'*': {adapt: 1}}", "adapt is 1, expected true or false"),
        ("--optimizer.settings.logical_tensors=3", "logical_tensors is 3, expected"),
        ("--optimizer.settings.logical_tensors={a: 0}", "'a': 0, expected a number of parts"),
        ("--optimizer.settings.epsilon_scale=[1]", r"epsilon_scale is \[1\], expected a number"),
        ("--optimizer.settings.weight_decay=0.5", "weight_decay belongs one level up"),
        ("--optimizer.learning_rate=.inf", "learning_rate: input should be a finite number"),
        (f"--seed={2**64}", "seed: input should be less than"),
        ("--zero.stage=0", "zero.stage 0 accumulates bf16 gradients in bf16 only"),
    ],
)
def test_values_that_would_fail_later_are_refused(write_config, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load(write_config(), override)


def test_settings_of_the_optimizer_are_checked_before_anything_starts(write_config):
    with pytest.raises(ConfigError, match="unknown setting 'clip_treshold'; did you mean clip_threshold"):
        load(write_config(optimizer={"settings": {"clip_treshold": 2}}))


def test_a_schedule_that_does_not_fit_the_run_is_refused(write_config):
    with pytest.raises(ConfigError, match="warmup_steps"):
        load(write_config(steps=5, schedule={"warmup_steps": 9}))


def test_global_batch_in_sequences_or_tokens(write_config):
    by_rows = batch_plan(load(write_config()), 32, world_size=3, rank=1)
    assert (by_rows.global_sequences, by_rows.accumulation) == (12, 2)
    by_tokens = load(write_config(batch={"global_sequences": None, "global_tokens": 384}))
    assert batch_plan(by_tokens, 32, 2, 0).global_sequences == 12


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"global_sequences": None, "global_tokens": 100, "micro_sequences": 1}, "use 96 or 128"),
        (
            {"length_warmup": {100: 5}},
            r"length_warmup\.100: rows of 32 tokens cannot be cut into 5; use a divisor",
        ),
    ],
)
def test_impossible_batch_arithmetic_says_what_is_possible(write_config, batch, expected):
    with pytest.raises(ConfigError, match=expected):
        batch_plan(load(write_config(batch=batch)), 32, 1, 0)


def test_stages_of_a_warm_up_that_have_no_step_are_all_named(write_config):
    stages = {"size_warmup": {0: 8, 100: 0}, "length_warmup": {-5: 16}}
    with pytest.raises(ConfigError) as raised:
        load(write_config(batch=stages, steps=0))
    size, length, steps = sorted(str(raised.value).splitlines(), key=lambda line: "steps" in line)
    assert "batch.size_warmup" in size and "0: a stage until 0 samples are consumed has no step" in size
    assert "100: 0, expected 1 or more" in size
    assert "batch.length_warmup" in length and "-5: a stage until" in length and "steps" in steps


def test_a_global_batch_need_not_divide_and_the_engine_is_told_of_sizes_that_do(write_config):
    config = load(write_config(batch={"global_sequences": 11, "micro_sequences": 2}))
    plan = batch_plan(config, 32, 2, 0)
    engine = deepspeed_config(config, plan)
    assert plan.global_sequences == 11 and plan.accumulation == 3
    assert engine["train_batch_size"] == 12 and engine["gradient_accumulation_steps"] == 3
    assert micro_batches_in_words(plan).endswith("at most, which would hold 12: micro-batches are smaller, 8.3% of the "
                                                 "ranks' time idle")  # fmt: skip
    assert (
        micro_batches_in_words(replace(plan, global_sequences=12)) == "= 2 ranks x 3 micro-batches x 2 rows"
    )


def test_engine_defaults_that_change_the_mathematics_are_written_out(write_config):
    config = load(write_config())
    engine = deepspeed_config(config, batch_plan(config, 32, 2, 0))
    assert engine["gradient_clipping"] == 0.0, "unset it would be 1.0"
    assert engine["data_types"]["grad_accum_dtype"] == "fp32", "unset, bf16 gradients accumulate in bf16"
    assert engine["communication_data_type"] == "fp32"
    assert engine["train_batch_size"] == 12 and engine["gradient_accumulation_steps"] == 3
    assert engine["zero_optimization"]["round_robin_gradients"] is False


def test_the_schedule_is_that_of_the_config(write_config):
    schedule = learning_rate_schedule(load(write_config(schedule={"warmup_steps": 4, "final_share": 0.5})))
    assert schedule(0) == 0.25 and schedule(11) == 0.5


def test_overrides_of_top_level_keys(write_config):
    assert load(write_config(), "--steps=7", "--run_dir=elsewhere").steps == 7
    assert yaml.safe_load(to_yaml(load(write_config(), "--steps=7")))["steps"] == 7


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"name": "adamw", "learning_rate": 1e-3}, "su_adam"),
        ({"name": "lamb", "learning_rate": 1e-3}, "su_lamb"),
        ({"name": "adafactor", "learning_rate": 1e-3}, "su_lamb"),
        ({"name": "adafactor", "learning_rate": 1e-3, "settings": {"parameter_scale": False}}, "su_adam"),
        ({"name": "egd", "learning_rate": 1e-1}, "su_sgd"),
    ],
    ids=str,
)
def test_an_automatic_initialisation_becomes_the_row_of_the_optimizer(write_config, optimizer, expected):
    model = {"residual": "deepnorm", "initialisation": "auto"}
    config = load_config(PretrainConfig, write_config(model=model, optimizer=optimizer))
    assert config.model.initialisation == expected
    assert f"initialisation: {expected}" in to_yaml(config)  # what the run's folder will hold


def test_a_model_that_this_training_does_not_serve_is_refused(write_config):
    with pytest.raises(ConfigError, match="masking has no effect with model.context causal"):
        load_config(PretrainConfig, write_config(model={"context": "causal"}, masking={"predict_share": 0.2}))
    model, adamw = {"initialisation": "auto"}, {"name": "adamw", "learning_rate": 1e-3}
    with pytest.raises(ConfigError, match="set residual to deepnorm"):
        load_config(PretrainConfig, write_config(model=model, optimizer=adamw))

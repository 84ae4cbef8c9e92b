"""What the configuration becomes for DeepSpeed, at every stage and precision."""

import gc
import importlib
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import loss_scaler

from data_prep.config_file import ConfigError, load_config
from sutrain.config import PretrainConfig, batch_plan
from sutrain.engine import _MUON, deepspeed_config, quicken_start, step_engine, tensor_shapes
from sutrain.models.configuration import parameter_count
from tests.models.tiny import VARIANTS
from tests.test_pretrain import launch, write_run


def engine_settings(path, *overrides):
    config = load_config(PretrainConfig, path, overrides)
    return deepspeed_config(config, batch_plan(config, 32, 2, 0))


def test_stage_3_cuts_as_it_is_told(write_config):
    overrides = ("--zero.stage=3", "--zero.sub_group_parameters=7000", "--zero.whole_below_parameters=10")
    zero = engine_settings(write_config(), *overrides)["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["stage3_param_persistence_threshold"]) == (
        3,
        7000,
        10,
    )
    assert zero["zero_quantized_weights"] is zero["zero_quantized_gradients"] is False
    assert zero["zero_hpz_partition_size"] == 1 and "offload_optimizer" not in zero


def test_two_layers_tell_the_shapes_of_any_number_of_them():
    for model in VARIANTS.values():
        deep = replace(model, num_layers=5)
        numbers = sum(math.prod(shape) * tensors for shape, tensors in tensor_shapes(deep).items())
        assert numbers == parameter_count(deep), model


def test_fp16_scales_as_it_is_told(write_config):
    path = write_config(
        precision="fp16", loss_scale={"initial": 4096.0, "grow_after_updates": 77, "hysteresis": 3}
    )
    settings = engine_settings(path)
    fp16 = settings["fp16"]
    assert fp16["enabled"] and not settings["bf16"]["enabled"]
    assert (fp16["loss_scale"], fp16["initial_scale_power"], fp16["loss_scale_window"]) == (0, 12, 77)
    assert (fp16["hysteresis"], fp16["min_loss_scale"], fp16["consecutive_hysteresis"]) == (3, 1, False)
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_bf16_leaves_infinite_gradients_to_the_optimizer(write_config, offload):
    settings = engine_settings(write_config(zero={"stage": 2, "offload": offload}))
    assert settings["bf16"]["check_grad_overflow"] is not offload
    assert settings["zero_optimization"].get("offload_optimizer", {}).get("device") == (
        "cpu" if offload else None
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"zero": {"stage": 0, "offload": True}}, "offload needs stage 1, 2 or 3"),
        ({"zero": {"stage": 2, "sub_group_parameters": 5}}, "sub_group_parameters has no effect at stage 2"),
        (
            {"zero": {"stage": 1, "whole_below_parameters": 5}},
            "whole_below_parameters has no effect at stage 1",
        ),
        ({"precision": "fp16", "zero": {"stage": 0}}, "accumulates fp16 gradients in fp16 only"),
        ({"gradient_precision": "fp16"}, "gradient_precision fp16 needs precision fp16"),
        ({"loss_scale": {"hysteresis": 3}}, "loss_scale has no effect with precision bf16"),
        ({"precision": "fp16", "loss_scale": {"initial": 1000.0}}, "must be a power of two, found 1000"),
        ({"precision": "fp16", "zero": {"stage": 2, "offload": True}}, "never recovers from an overflow"),
    ],
)
def test_combinations_without_effect_or_way_out_are_refused(write_config, sections, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(PretrainConfig, write_config(**sections), [])


def test_gradients_that_overflow_at_the_least_scale_give_a_clear_line(monkeypatch):
    """DeepSpeed's own scaler and its own exception; who logs is all it wants of a process group."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    scaler = loss_scaler.DynamicLossScaler(1.0, 10, 1.0, 1, False)
    with pytest.raises(ValueError, match="gradients overflow fp16 at loss_scale.least"):
        step_engine(SimpleNamespace(step=lambda: scaler.update_scale(True)))


def test_other_errors_of_the_engine_are_not_touched():
    def step():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        step_engine(SimpleNamespace(step=step))


@pytest.fixture
def unfreeze():
    """For the tests that follow, what quicken_start put out of the collector's sight is back in it."""
    yield
    gc.unfreeze()


def test_collections_of_garbage_pass_over_what_was_imported(unfreeze):
    quicken_start()
    assert gc.get_freeze_count() > 100_000, "DeepSpeed collects four times when it starts"


def test_deepspeed_finds_no_muon_unless_it_was_there_before(monkeypatch, unfreeze):
    muon = "deepspeed.runtime.zero.muon.muon_optimizer"
    monkeypatch.delitem(sys.modules, muon, raising=False)
    quicken_start()
    assert not issubclass(torch.optim.Adam, importlib.import_module(muon).MuonWithAuxAdam)
    for name in _MUON:
        monkeypatch.delitem(sys.modules, name)
    there = importlib.import_module(muon)
    assert issubclass(there.MuonWithAuxAdam, torch.optim.Optimizer)
    quicken_start()
    assert importlib.import_module(muon) is there


def test_parameters_that_an_optimizer_has_twice_are_named_in_linear_time(unfreeze):
    quicken_start()
    module = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20_000)))
    engine = SimpleNamespace(module=module)
    # torch refuses duplicates itself, so the list is changed behind its back.
    optimizer = torch.optim.SGD(module.parameters())
    started = time.process_time()
    DeepSpeedEngine._check_for_duplicates(engine, optimizer)
    assert time.process_time() - started < 5, "the engine's own takes minutes"
    optimizer.param_groups[0]["params"].append(module[7].weight)
    with pytest.raises(ValueError, match="has 7.weight more than once"):
        DeepSpeedEngine._check_for_duplicates(engine, optimizer)


def test_kernels_that_do_not_run_here_are_refused_in_one_line(dataset, tmp_path):
    optimizer = {"name": "adafactor", "learning_rate": 0.05, "settings": {"kernels": "triton"}}
    process = launch(write_run(tmp_path, dataset, optimizer=optimizer), 0)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert [line for line in output.splitlines() if line.startswith("error: kernels triton")], output

"""Model, optimizer and engine, and what the run asks of DeepSpeed: every default written out that changes the
mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sys
import types
from collections import Counter
from typing import Any

import torch

from sutrain.batch_plan import BatchPlan
from sutrain.compiled import compile_layers
from sutrain.config import PretrainConfig
from sutrain.models.configuration import EncoderConfig, parameter_count
from sutrain.objectives.training_model import TrainingModel
from sutrain.optim import build, build_optimizer
from sutrain.optim.base import FragmentOptimizer
from sutrain.recompute import apply_budget

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Of weights and activations, by the names of the configuration."""


def build_engine(
    config: PretrainConfig, plan: BatchPlan, row_tokens: int, device: torch.device
) -> tuple[Any, FragmentOptimizer, str]:
    """DeepSpeed's engine around a new model, its optimizer, and a line about what is computed again.

    Call it with communication started and torch seeded. Raises ValueError, BudgetError among others, for settings that
    do not fit the model.
    """
    import deepspeed  # after the environment is prepared: it reads it while importing

    model = TrainingModel.on(device, config.model)
    optimizer = build_optimizer(
        config.optimizer.name, model.named_parameters(), **config.optimizer.arguments()
    )
    room = (config.memory.activation_mib, plan.micro_sequences, row_tokens)
    kind = (DTYPES[config.precision], device, config.zero.stage)
    recomputation = apply_budget(model.encoder, *room, *kind)
    compile_layers(model.encoder, config.compile_layers, config.zero.stage)
    settings = deepspeed_config(config, plan)
    quicken_start()
    with contextlib.redirect_stdout(None):  # what it prints has no switch
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    return engine, optimizer, recomputation


def whole_state_numbers(config: PretrainConfig) -> int:
    """How many numbers of optimizer state there are, all ranks together, but for rows and columns of factored matrices.
    Tensors count as they are in the model, not as logical_tensors may divide them."""
    name, settings, parameters = (
        config.optimizer.name,
        config.optimizer.settings,
        parameter_count(config.model),
    )
    return build.whole_state_numbers(name, settings, parameters, lambda: tensor_shapes(config.model))


def tensor_shapes(model: EncoderConfig) -> Counter[tuple[int, ...]]:
    """{shape: how many of the model's parameters have it}. Layers are alike, so that two of them tell of a thousand,
    which would take seconds to make."""
    one, two = (
        Counter(tuple(tensor.shape) for tensor in TrainingModel.on(torch.device("meta"), part).parameters())
        for part in (dataclasses.replace(model, num_layers=layers) for layers in (1, 2))
    )
    return one + Counter({shape: (two[shape] - one[shape]) * (model.num_layers - 1) for shape in two})


def deepspeed_config(config: PretrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """The engine's settings.

    Clipping is off because our optimizers clip from sums they compute anyway (unset, the engine clips at 1.0);
    gradients are averaged over ranks by the engine and divided by nothing else (the loss is normalised by the
    global count of predicted tokens instead of by accumulation steps).
    """
    return {
        # Of its own arithmetic; where the global batch does not divide, some micro-batches have fewer rows.
        "train_batch_size": plan.micro_sequences * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_sequences,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": config.gradient_precision,
        "torch_autocast": {"enabled": False},
        "bf16": {
            "enabled": config.precision == "bf16",
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
            # With offload the engine would never get rid of an infinite gradient; the optimizer looks for it too.
            "check_grad_overflow": not config.zero.offload,
        },
        "fp16": {
            "enabled": config.precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(math.log2(config.loss_scale.initial)),
            "loss_scale_window": config.loss_scale.grow_after_updates,
            "hysteresis": config.loss_scale.hysteresis,
            "consecutive_hysteresis": False,
            "min_loss_scale": config.loss_scale.least,
            "fp16_master_weights_and_grads": False,
        },
        "data_types": {"grad_accum_dtype": config.gradient_precision},
        "zero_optimization": {
            "stage": config.zero.stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "reduce_scatter": True,
            **({"offload_optimizer": _OFFLOAD} if config.zero.offload else {}),
            **(_stage_3(config) if config.zero.stage == 3 else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


_MUON = {  # module: what DeepSpeed takes from it
    "deepspeed.runtime.zero.muon.muon_optimizer": "MuonWithAuxAdam",
    "deepspeed.runtime.zero.muon.original_muon": "muon_update",
}


def quicken_start() -> None:
    """Call it before deepspeed.initialize: three of its checks take longer than everything else that it does.

    It imports its Muon to see that an optimizer is something else, and at the first gradients, and with it all of
    torch's compiler: a second and 100 MB in every rank. It finds a class that no optimizer is of. And it looks for
    parameters that an optimizer has twice in time that grows with their square: 40 s where a thousand layers have
    16,000. And to tell how much memory there is it collects garbage four times, each time through everything that was
    imported, a second in all: what is there now is put out of the collector's sight, for it stays to the end.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    for name, member in _MUON.items():
        if name not in sys.modules:
            stand_in = types.ModuleType(name)
            stand_in.__dict__[member] = type(member, (), {})
            sys.modules[name] = stand_in
    DeepSpeedEngine._check_for_duplicates = _check_for_duplicates
    gc.freeze()


def _check_for_duplicates(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """What the engine's own does, by counting once. Raises ValueError naming the parameters."""
    times = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    twice = [name for name, parameter in engine.module.named_parameters() if times[id(parameter)] > 1]
    if twice:
        raise ValueError(f"the optimizer has {', '.join(twice)} more than once")


def step_engine(engine: Any) -> None:
    """engine.step(). Raises ValueError where gradients overflow fp16 whatever the loss scale."""
    try:
        engine.step()
    except Exception as error:  # the engine has no class of its own for it
        if "loss scale already at minimum" not in str(error):
            raise
        raise ValueError(
            "gradients overflow fp16 at loss_scale.least: the run has diverged, or the model needs precision bf16"
        ) from None


_OFFLOAD = {"device": "cpu", "pin_memory": torch.accelerator.is_available(), "ratio": 1.0}


def _stage_3(config: PretrainConfig) -> dict[str, Any]:
    return {
        "sub_group_size": config.zero.sub_group_parameters,
        "stage3_param_persistence_threshold": config.zero.whole_below_parameters,
        "zero_hpz_partition_size": 1,  # no second copy of the weights
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "stage3_gather_16bit_weights_on_model_save": False,  # checkpoints are ours
    }

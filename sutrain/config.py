"""The configuration of a pretraining run: a typed tree, and everything that is derived from it.

The user states what the run is (global batch, optimizer, precision, …); ranks, accumulation and the DeepSpeed
settings follow from it. Units are in the names; steps are optimizer updates, never micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from data_prep.config_file import ConfigError, Section
from sutrain.data import BatchPlan
from sutrain.models.configuration import EncoderConfig
from sutrain.optim import Schedule, ScheduleError, build_optimizer, build_schedule


class Data(Section):
    dir: Path = Field(description="folder with the prepared shards (it holds manifest.json)")
    prefetch_updates: int = Field(2, ge=1, description="updates read ahead by the loader")


class Masking(Section):
    predict_share: float = Field(0.15, gt=0, lt=1, description="share of words to predict")
    mask_share: float = Field(0.8, ge=0, le=1, description="share of the predicted words shown as [MASK]")
    keep_share: float = Field(0.1, ge=0, le=1, description="share of the predicted words left as they are")
    whole_words: bool = Field(
        True, description="mask all tokens of a word together (needs word starts in the shards)"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Masking:
        if self.mask_share + self.keep_share > 1 + 1e-9:
            raise ValueError("mask_share + keep_share must not be above 1")
        return self


class Batch(Section):
    global_sequences: int | None = Field(None, ge=1, description="rows per update over all ranks")
    global_tokens: int | None = Field(
        None, ge=1, description="or: tokens per update; a multiple of the row length"
    )
    micro_sequences: int = Field(ge=1, description="rows per rank in one forward and backward pass")

    @model_validator(mode="after")
    def _one_size(self) -> Batch:
        if (self.global_sequences is None) == (self.global_tokens is None):
            raise ValueError("give exactly one of global_sequences and global_tokens")
        return self


class Optimizer(Section):
    name: Literal["adafactor", "lamb", "adamw"] = Field("adafactor", description="update rule")
    learning_rate: float = Field(
        gt=0, description="peak; AdaFactor and LAMB multiply it by the size of each tensor, AdamW does not"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, multiplied by the learning rate")
    clip_global_norm: float | None = Field(
        None, gt=0, description="limit on the global gradient norm; none: off"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the optimizer, by their names in docs/optimizers.md",
    )

    @field_validator("settings")
    @classmethod
    def _numbers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads 1e-3 (without a dot) as text; people write small numbers that way."""
        return {key: _as_number(value) for key, value in settings.items()}

    @model_validator(mode="after")
    def _settings_exist(self) -> Optimizer:
        twice = sorted({"learning_rate", "weight_decay", "clip_global_norm"} & set(self.settings))
        if twice:
            raise ValueError(f"settings: {', '.join(twice)} belongs one level up, beside name")
        # per_tensor names tensors of the real model, so it is checked when that is built.
        settings = {key: value for key, value in self.arguments().items() if key != "per_tensor"}
        try:
            build_optimizer(self.name, [("probe", torch.nn.Parameter(torch.zeros(1)))], **settings)
        except TypeError as error:
            raise ValueError(f"settings: a value of the wrong type ({error})") from None
        return self

    def arguments(self) -> dict[str, Any]:
        """What build_optimizer wants besides the name and the parameters."""
        own = {"learning_rate", "weight_decay", "clip_global_norm"}
        return {key: getattr(self, key) for key in own} | self.settings


class LearningRate(Section):
    shape: Literal["constant", "linear", "cosine", "inverse_sqrt", "stable_decay", "piecewise_linear"] = (
        Field("linear", description="what the learning rate does after the warm-up")
    )
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up from 0")
    final_share: float = Field(0.0, ge=0, le=1, description="share of the peak left at the last update")
    decay_steps: int | None = Field(None, ge=1, description="stable_decay: updates of decay at the end")
    points: dict[int, float] | None = Field(None, description="piecewise_linear: {update: multiplier}")


class Zero(Section):
    stage: Literal[0, 1, 2] = Field(
        1, description="DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too"
    )


class Evaluation(Section):
    every_steps: int = Field(100, ge=1, description="updates between evaluations on held-out rows")
    sequences: int = Field(512, ge=1, description="held-out rows used, the same every time")


class Checkpoints(Section):
    every_steps: int = Field(500, ge=1, description="updates between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints kept besides the best one")


class Monitor(Section):
    host: str = Field("127.0.0.1", description="address the metrics endpoint listens on")
    port: int = Field(9700, ge=0, le=65535, description="port of /metrics on rank 0; 0: off")
    progress_seconds: float = Field(10.0, gt=0, description="seconds between progress lines in a log")
    probe_every_steps: int = Field(
        50, ge=0, description="updates between probes of model update and attention entropy; 0: none"
    )
    probe_sequences: int = Field(
        8, ge=1, description="held-out rows a probe looks at, the same ones every time"
    )
    layers_every_steps: int = Field(
        1,
        ge=1,
        description="updates between tables of norms by layer in metrics.jsonl (100 kB at 1000 layers)",
    )
    max_layers: int = Field(
        64, ge=1, description="layers with series of their own; deeper models get quantiles"
    )


class PretrainConfig(Section):
    """A whole run; `run_dir` is where everything it makes goes."""

    run_dir: Path = Field(description="folder of the run: config, metrics, checkpoints, report")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initialisation, order, masks and dropout")
    steps: int = Field(ge=1, description="optimizer updates of the whole run")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations; masters are fp32"
    )
    gradient_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="in which gradients accumulate and are reduced over ranks"
    )
    data: Data
    model: EncoderConfig
    masking: Masking = Masking()
    batch: Batch
    optimizer: Optimizer
    schedule: LearningRate = LearningRate()
    zero: Zero = Zero()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainConfig:
        problems = []
        try:
            learning_rate_schedule(self)
        except ScheduleError as error:
            problems += [f"schedule: {line}" for line in str(error).splitlines()]
        if self.zero.stage == 0 and self.precision == "bf16" and self.gradient_precision == "fp32":
            problems.append(
                "zero.stage 0 accumulates bf16 gradients in bf16 only: use stage 1, or gradient_precision bf16"
            )
        if self.precision == "fp32" and self.gradient_precision == "bf16":
            problems.append("gradient_precision bf16 needs precision bf16")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def learning_rate_schedule(config: PretrainConfig) -> Schedule:
    """Multiplier of the peak learning rate by updates already made. Raises ScheduleError."""
    settings = config.schedule
    return build_schedule(
        settings.shape,
        config.steps,
        warmup_steps=settings.warmup_steps,
        final_share=settings.final_share,
        decay_steps=settings.decay_steps,
        points=settings.points,
    )


def batch_plan(config: PretrainConfig, row_tokens: int, world_size: int, rank: int) -> BatchPlan:
    """Ranks and micro-batches of the global batch. Raises ConfigError with the nearest sizes that divide."""
    batch = config.batch
    if batch.global_tokens is None:
        assert batch.global_sequences is not None, "checked by the Batch section"
        sequences = batch.global_sequences
    else:
        if batch.global_tokens % row_tokens:
            lower = batch.global_tokens // row_tokens * row_tokens
            raise ConfigError(
                f"batch.global_tokens: {batch.global_tokens} is not a multiple of the {row_tokens} tokens of a row; "
                f"use {lower or row_tokens} or {lower + row_tokens}"
            )
        sequences = batch.global_tokens // row_tokens
    pass_sequences = batch.micro_sequences * world_size
    if sequences % pass_sequences:
        lower = sequences // pass_sequences * pass_sequences
        nearest = f"{lower} or {lower + pass_sequences}" if lower else str(pass_sequences)
        raise ConfigError(
            f"batch: {sequences} rows a step do not divide into micro-batches of {batch.micro_sequences} on "
            f"{world_size} ranks; use batch.global_sequences {nearest}, or another batch.micro_sequences"
        )
    return BatchPlan(sequences, batch.micro_sequences, world_size, rank)


def deepspeed_config(config: PretrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """The engine's settings, with every default written out that changes the mathematics.

    Clipping is off because our optimizers clip from sums they compute anyway (unset, the engine clips at 1.0);
    gradients are averaged over ranks by the engine and divided by nothing else (the loss is normalised by the
    global count of predicted tokens instead of by accumulation steps).
    """
    bf16 = config.precision == "bf16"
    return {
        "train_batch_size": plan.global_sequences,
        "train_micro_batch_size_per_gpu": plan.micro_sequences,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": config.gradient_precision,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": config.gradient_precision},
        "zero_optimization": {
            "stage": config.zero.stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "reduce_scatter": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }

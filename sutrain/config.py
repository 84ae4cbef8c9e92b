"""The configuration of a pretraining run: a typed tree, and everything that is derived from it.

The user states what the run is (global batch, optimizer, precision, …); ranks, accumulation and the DeepSpeed
settings follow from it. Units are in the names; steps are optimizer updates, never micro-batches.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from data_prep.config_file import ConfigError, Section
from sutrain.batch_plan import BatchPlan
from sutrain.models.configuration import EncoderConfig, EncoderConfigError
from sutrain.models.depth import resolve_auto
from sutrain.optim import Schedule, ScheduleError, build_schedule
from sutrain.optim.build import check_settings
from sutrain.precision import impossible_precisions
from sutrain.precision import resolve as resolve_precision

HomePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path that may begin with ~, which a shell leaves alone behind `--run_dir=`."""


class OtherData(Section):
    dir: HomePath = Field(description="folder with shards of the same tokenizer and row length")
    weight: float = Field(gt=0, description="share of the samples, relative to the others")


class Data(Section):
    dir: HomePath = Field(description="folder with the prepared shards (it holds manifest.json)")
    weight: float = Field(
        1.0, gt=0, description="share of the samples from this folder, relative to `others`"
    )
    others: list[OtherData] = Field(
        default_factory=list, description="further data sets to mix in, by weight"
    )
    remote: str | None = Field(
        None, description="URL of the shards where they are not in dir (s3://…); dir then mirrors and caches"
    )
    cache_bytes: int = Field(10_000_000_000, ge=0, description="of blocks from `remote` kept in dir")
    prefetch_updates: int = Field(2, ge=1, description="updates read ahead by the loader")
    workers: int = Field(
        1, ge=0, le=64, description="processes of a rank that read ahead; the samples do not depend on it"
    )


class Masking(Section):
    predict_share: float = Field(0.15, gt=0, lt=1, description="share of words to predict")
    mask_share: float = Field(0.8, ge=0, le=1, description="share of the predicted words shown as [MASK]")
    keep_share: float = Field(0.1, ge=0, le=1, description="share of the predicted words left as they are")
    whole_words: bool = Field(
        True,
        description="mask all tokens of a word together (needs word starts in the shards, or a tokenizer)",
    )
    style: Literal["words", "spans"] = Field("words", description="single words, or spans of several words")
    span_stop: float = Field(0.2, gt=0, le=1, description="spans: chance that a span ends after each word")
    span_longest: int = Field(10, ge=1, le=100, description="spans: words at most")

    @model_validator(mode="after")
    def _shares_fit(self) -> Masking:
        if self.mask_share + self.keep_share > 1 + 1e-9:
            raise ValueError("mask_share + keep_share must not be above 1")
        return self


def _with_an_end(stages: dict[int, int]) -> dict[int, int]:
    mistakes = [
        f"{until}: a stage until {until} samples are consumed has no step; the keys say where stages end"
        for until in stages
        if until < 1
    ]
    mistakes += [f"{until}: {value}, expected 1 or more" for until, value in stages.items() if value < 1]
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return stages


Stages = Annotated[dict[int, int], AfterValidator(_with_an_end)]
"""{samples consumed: value until then} of a warm-up."""


class Batch(Section):
    global_sequences: int | None = Field(None, ge=1, description="rows per update over all ranks")
    global_tokens: int | None = Field(
        None, ge=1, description="or: tokens per update; a multiple of the row length"
    )
    micro_sequences: int = Field(ge=1, description="rows per rank in one forward and backward pass")
    size_warmup: Stages = Field(
        default_factory=dict,
        description="{samples consumed: rows per update until then} before the full size",
    )
    length_warmup: Stages = Field(
        default_factory=dict, description="{samples consumed: tokens that rows are cut to until then}"
    )

    @model_validator(mode="after")
    def _one_size(self) -> Batch:
        if (self.global_sequences is None) == (self.global_tokens is None):
            raise ValueError("give exactly one of global_sequences and global_tokens")
        return self


class Optimizer(Section):
    name: Literal["adafactor", "lamb", "adamw", "egd"] = Field("adafactor", description="update rule")
    learning_rate: float = Field(
        gt=0,
        description="peak; AdaFactor and LAMB multiply it by the size of each tensor, AdamW and EGD do not",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, multiplied by the learning rate")
    clip_global_norm: float | None = Field(
        None, gt=0, description="limit on the global gradient norm; null: off"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the optimizer, by their names in docs/optimizers.md",
    )

    @field_validator("settings")
    @classmethod
    def _numbers(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads 1e-3 (without a dot) as text; people write small numbers that way."""
        return _as_number(settings)

    @model_validator(mode="after")
    def _settings_exist(self) -> Optimizer:
        twice = sorted({"learning_rate", "weight_decay", "clip_global_norm"} & set(self.settings))
        if twice:
            raise ValueError(f"settings: {', '.join(twice)} belongs one level up, beside name")
        check_settings(self.name, self.arguments())
        return self

    def arguments(self) -> dict[str, Any]:
        """What build_optimizer wants besides the name and the parameters."""
        own = {"learning_rate", "weight_decay", "clip_global_norm"}
        return {key: getattr(self, key) for key in own} | self.settings

    def family(self) -> Literal["sgd", "adam", "lamb"]:
        """What its steps are as large as: the gradient (EGD's gains are bounded), a sign, or the weight (depth.py)."""
        if self.name == "egd":
            return "sgd"
        relative = self.name != "adamw" and self.settings.get("parameter_scale", True)
        return "lamb" if relative else "adam"


class LearningRate(Section):
    shape: Literal["constant", "linear", "cosine", "inverse_sqrt", "stable_decay", "piecewise_linear"] = (
        Field("linear", description="what the learning rate does after the warm-up")
    )
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up from 0")
    final_share: float = Field(0.0, ge=0, le=1, description="share of the peak left at the last update")
    decay_steps: int | None = Field(None, ge=1, description="stable_decay: updates of decay at the end")
    points: dict[int, float] | None = Field(None, description="piecewise_linear: {update: multiplier}")


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 weights too"
    )
    offload: bool = Field(
        False,
        description="stages 1 to 3: masters and optimizer state in the hosts' memory, updated by their CPUs",
    )
    sub_group_parameters: int = Field(
        1_000_000_000, ge=1, description="stage 3: parameters a rank updates in one call of the optimizer"
    )
    whole_below_parameters: int = Field(
        100_000, ge=0, description="stage 3: smaller tensors stay whole on every rank between their uses"
    )

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Zero:
        problems = []
        if self.offload and self.stage == 0:
            problems.append("offload needs stage 1, 2 or 3")
        for name in ("sub_group_parameters", "whole_below_parameters"):
            if self.stage != 3 and getattr(self, name) != Zero.model_fields[name].default:
                problems.append(f"{name} has no effect at stage {self.stage}: leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class LossScale(Section):
    initial: float = Field(65536.0, ge=1, description="first factor on the loss; a power of two")
    grow_after_updates: int = Field(1000, ge=1, description="updates without an overflow before it doubles")
    hysteresis: int = Field(2, ge=1, description="overflows before it halves (without ZeRO always 1)")
    least: int = Field(1, ge=1, description="the run stops when an overflow would take it below this")

    @field_validator("initial")
    @classmethod
    def _power_of_two(cls, initial: float) -> float:
        if not math.log2(initial).is_integer():
            raise ValueError(f"must be a power of two, found {initial:g}")
        return initial


class Memory(Section):
    activation_mib: float | None = Field(
        None,
        gt=0,
        description="limit on what a micro-batch's layers keep for the backward pass, MiB a rank; as many layers as "
        "needed are computed again; null: none is",
    )


class Evaluation(Section):
    every_steps: int = Field(100, ge=1, description="updates between evaluations on held-out rows")
    sequences: int = Field(512, ge=1, description="held-out rows used, the same every time")


class Checkpoints(Section):
    every_steps: int = Field(500, ge=1, description="updates between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints kept besides the best one")
    keep_every_hours: float | None = Field(
        None, gt=0, description="of the run: one checkpoint is kept for good each time"
    )
    stop_within_seconds: float = Field(
        90.0, gt=0, description="after SIGTERM: time for the last checkpoint to reach the disk"
    )


class Monitor(Section):
    host: str = Field("127.0.0.1", description="address the metrics endpoint listens on")
    port: int = Field(9700, ge=0, le=65535, description="port of /metrics on rank 0; 0: off")
    progress_seconds: float = Field(10.0, gt=0, description="seconds between progress lines in a log")
    probe_every_steps: int | None = Field(
        None, ge=0, description="updates between probes (docs/monitoring.md); 0: never; null: by probe_share"
    )
    probe_share: float = Field(0.02, gt=0, lt=1, description="share of the time that probes may take")
    probe_sequences: int = Field(
        8, ge=1, description="held-out rows a probe looks at, the same ones every time"
    )
    layers_every_steps: int = Field(
        1,
        ge=1,
        description="updates between tables of norms by layer in metrics.jsonl (100 kB at 1000 layers)",
    )
    max_layers: int = Field(
        48, ge=1, description="layers with series of their own; deeper models get quantiles"
    )
    also: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="log to these too (pip install tensorboard, or wandb)"
    )


class Acting(Section):
    skip_sigmas: float | None = Field(
        None,
        gt=0,
        description="refuse an update whose loss or gradient norm is so many robust standard deviations above its "
        "history; null: never",
    )
    stop_after_broken_steps: int | None = Field(
        None,
        ge=1,
        description="stop, with a dump, after so many steps in a row without a finite loss or without an update; "
        "null: go on",
    )


class PretrainConfig(Section):
    """A whole run; `run_dir` is where everything it makes goes."""

    run_dir: HomePath = Field(description="folder of the run: config, metrics, checkpoints, report")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initialisation, order, masks and dropout")
    determinism: bool = Field(False, description="on an accelerator: kernels of fixed order only, slower")
    steps: int = Field(ge=1, description="optimizer updates of the whole run")
    precision: Literal["bf16", "fp16", "fp32", "auto"] = Field(
        "bf16",
        description="of weights and activations; masters are fp32; auto: bf16 where the device has instructions for "
        "it, else fp32",
    )
    gradient_precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="in which gradients accumulate and are reduced over ranks"
    )
    loss_scale: LossScale = LossScale()
    compile_layers: bool = Field(False, description="torch.compile a layer's passes, once for all layers")
    init_from: HomePath | None = Field(
        None, description="begin a new run with the weights of a checkpoint, run or exported folder"
    )
    accept_changes: list[Literal["corpora", "seed", "masking"]] = Field(
        default_factory=list, description="go on from a checkpoint although these differ (docs/resume.md)"
    )
    start_timeout_seconds: float = Field(
        120.0, gt=0, le=1e6, description="for all ranks to meet at the start, and for the first all-reduce"
    )
    data: Data
    model: EncoderConfig
    masking: Masking = Masking()
    batch: Batch
    optimizer: Optimizer
    schedule: LearningRate = LearningRate()
    zero: Zero = Zero()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    monitor: Monitor = Monitor()
    acting: Acting = Acting()

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainConfig:
        problems = []
        # "auto" is written down as what it stands for, also in the run's config.yaml.
        object.__setattr__(self, "precision", resolve_precision(self.precision))
        if self.model.initialisation == "auto":
            try:
                object.__setattr__(self, "model", resolve_auto(self.model, self.optimizer.family()))
            except EncoderConfigError as error:
                problems += str(error).splitlines()
        if self.model.context != "bidirectional" and self.masking != Masking():
            problems.append(
                f"masking has no effect with model.context {self.model.context}, which predicts what follows: leave "
                "it out, or use context bidirectional"
            )
        try:
            learning_rate_schedule(self)
        except ScheduleError as error:
            problems += [f"schedule: {line}" for line in str(error).splitlines()]
        if self.monitor.probe_every_steps is not None and self.monitor.probe_share != Monitor().probe_share:
            problems.append(
                "monitor.probe_share has no effect beside probe_every_steps: leave one of them out"
            )
        zero = self.zero
        problems += impossible_precisions(self.precision, self.gradient_precision, zero.stage, zero.offload)
        if self.precision != "fp16" and self.loss_scale != LossScale():
            problems.append(
                f"loss_scale has no effect with precision {self.precision}: leave it out, or use fp16"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _as_number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_number(item) for item in value]
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
    """Ranks and micro-batches of the global batch; it need not divide. Raises ConfigError."""
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
    problems = [
        f"batch.length_warmup.{until}: rows of {row_tokens} tokens cannot be cut into {tokens}; use a divisor"
        for until, tokens in batch.length_warmup.items()
        if row_tokens % tokens
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return BatchPlan(
        sequences,
        batch.micro_sequences,
        world_size,
        rank,
        _stages(batch.size_warmup),
        _stages(batch.length_warmup),
    )


def _stages(until: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """{samples consumed: value until then} as (valid from, value), ended by a 0 for the full value."""
    ends = sorted(until)
    return tuple(zip([0, *ends], [*(until[end] for end in ends), 0], strict=True)) if ends else ()

"""The metric contract: every series that a run exports, in one list.

`metrics.jsonl`, the Prometheus endpoint, the dashboards, the alert rules and docs/monitoring.md all name the
same quantities. This file is where the names, units and meanings are written down; tests hold the others to
it. A key of `metrics.jsonl` is the name of its series without the prefix `sutrain_`; what is counted, is counted there
from the start of the run, here from the start of the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "sutrain_"


@dataclass(frozen=True)
class Series:
    """One exported quantity.

    `key` is its name in metrics.jsonl, `unit` is for people ("" where the number is a plain ratio or count)
    and `labels` are the Prometheus label names. The training step is a value (`sutrain_step`), never a label:
    a label would make a new series of every step.
    """

    key: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that Prometheus sees."""
        return PREFIX + self.key


STEP = (
    Series("step", "gauge", "steps", "Steps done so far, those whose update was skipped or refused included"),
    Series(
        "samples_consumed_total", "counter", "samples", "Training samples (rows) consumed by this process"
    ),
    Series("tokens_total", "counter", "tokens", "Training tokens consumed by this process, padding excluded"),
    Series(
        "loss", "gauge", "nats/token", "Training loss of the last step: mean over its global predicted tokens"
    ),
    Series("learning_rate", "gauge", "", "Learning rate of the last step"),
    Series("tokens_per_second", "gauge", "tokens/s", "Tokens of the last step over its wall time, all ranks"),
    Series(
        "mfu_ratio", "gauge", "", "Model FLOP/s over peak FLOP/s of all ranks (reference: sutrain_run_info)"
    ),
    Series("step_seconds", "gauge", "s", "Wall time of the last step"),
    Series("data_wait_seconds", "gauge", "s", "Part of the last step spent waiting for data"),
    Series("loss_scale", "gauge", "", "Loss scale (1 unless fp16)"),
    Series(
        "skipped_steps_total",
        "counter",
        "steps",
        "Updates that this process skipped because a gradient was not finite",
    ),
    Series(
        "refused_steps_total",
        "counter",
        "steps",
        "Updates that this process did not make because loss or gradient stood out too far (acting.skip_sigmas)",
    ),
)
POSITION = (
    Series("run_samples_consumed", "gauge", "samples", "Training samples (rows) that the run has consumed"),
    Series("run_tokens", "gauge", "tokens", "Training tokens that the run has consumed, padding excluded"),
)
"""The run's own totals, which go back when it goes on from a checkpoint, as no counter may."""
PROBE = (
    Series(
        "model_update",
        "gauge",
        "",
        "RMS change of the encoder's output by one update, on a fixed batch, in fp32",
    ),
    Series(
        "model_update_noise",
        "gauge",
        "",
        "RMS change of the same output when every weight is rounded anew in fp32: below three times this "
        "sutrain_model_update is rounding",
    ),
    Series(
        "logit_rms", "gauge", "", "RMS of the logits about their mean over the vocabulary, on a fixed batch"
    ),
    Series("logit_max", "gauge", "", "Largest logit above the mean over the vocabulary, on a fixed batch"),
)
PROBE_LAYERED = (
    Series(
        "attention_entropy", "gauge", "nats",
        "Mean entropy of a query's attention, on a fixed batch, in fp32", ("layer",),
    ),
    Series("activation_rms", "gauge", "", "RMS of the layer's output, on a fixed batch", ("layer",)),
    Series(
        "relative_change", "gauge", "",
        "Norm of what the layer changes over the norm of its input, on a fixed batch", ("layer",),
    ),
    Series(
        "mixer_branch_share", "gauge", "",
        "Norm of the mixer's branch over the norm of the residual it is added to", ("layer",),
    ),
    Series(
        "feed_forward_branch_share", "gauge", "",
        "Norm of the feed-forward branch over the norm of the residual it is added to", ("layer",),
    ),
    Series(
        "dead_units_share", "gauge", "",
        "Share of inner units that are next to nothing at every token of a fixed batch", ("layer",),
    ),
)  # fmt: skip
EVALUATION = (
    Series("validation_loss", "gauge", "nats/token", "Loss on the validation split at the last evaluation"),
    Series("validation_accuracy", "gauge", "", "Share right of the validation tokens that are not shown"),
    Series(
        "unigram_accuracy",
        "gauge",
        "",
        "Accuracy of always guessing the most frequent token: the floor to beat",
    ),
)
EVALUATION_BY = tuple(
    Series(f"validation_{what}_by_{of}", "gauge", unit, f"{text} of held-out tokens {where}", (of,))
    for what, unit, text in (("loss", "nats/token", "Loss"), ("accuracy", "", "Accuracy"))
    for of, where in (
        ("length", "in documents of up to that many tokens in a row"),
        ("source", "from that source corpus"),
    )
)
# Whole-model norms. In metrics.jsonl they are plain `grad_norm`, `weight_norm`, ...; the Prometheus names
# carry "global", because there the plain names are the labelled series below.
GLOBAL = (
    Series("global_grad_norm", "gauge", "", "L2 norm of the gradient of all parameters, before clipping"),
    Series("global_weight_norm", "gauge", "", "L2 norm of all parameters"),
    Series("global_update_norm", "gauge", "", "L2 norm of the last change of all parameters"),
    Series("global_update_ratio", "gauge", "", "Global update norm over global weight norm"),
)
LAYERED = (
    Series("grad_norm", "gauge", "", "L2 norm of the gradient of this part of this layer", ("layer", "part")),
    Series(
        "weight_norm", "gauge", "", "L2 norm of the weights of this part of this layer", ("layer", "part")
    ),
    Series("update_norm", "gauge", "", "L2 norm of the last change of these weights", ("layer", "part")),
    Series("update_ratio", "gauge", "", "Update norm over weight norm", ("layer", "part")),
    Series(
        "direction_rms", "gauge", "",
        "RMS of the update before clip and learning rate, AdaFactor's RMS(U)", ("layer", "part"),
    ),
    Series(
        "clipped_share", "gauge", "",
        "Share of these weights in tensors whose last update was clipped (AdaFactor)", ("layer", "part"),
    ),
    Series("trust_ratio", "gauge", "", "LAMB's trust ratio, geometric mean over tensors", ("layer", "part")),
)  # fmt: skip
PARAMETERS = Series(
    "parameters", "gauge", "", "Number of weights; a norm over its square root is an RMS", ("layer", "part")
)
PER_RATE = Series(
    "update_ratio_per_rate",
    "gauge",
    "",
    "Update norm over learning rate times weight norm",
    ("layer", "part"),
)
OVER_DEPTH = tuple(
    Series(
        f"{series.key}_over_depth",
        "gauge",
        series.unit,
        f"{series.help}: quantile over all layers",
        ("part", "quantile"),
    )
    for series in (*LAYERED, PER_RATE)
)
# Maxima over the last minute (window.py): a scrape sees one step in many.
WINDOW_LAYERED = Series(
    "update_ratio_max", "gauge", "", "Largest update ratio of the last minute", ("layer", "part")
)
WINDOW = (
    Series("loss_max", "gauge", "nats/token", "Largest training loss of the last minute"),
    Series("global_grad_norm_max", "gauge", "", "Largest whole-model gradient norm of the last minute"),
    Series("step_seconds_max", "gauge", "s", "Longest step of the last minute"),
)
DEAD_LAYERS = Series(
    "dead_layers", "gauge", "layers", "Layers whose update ratio is below a thousandth of the median layer's",
    ("part",),
)  # fmt: skip
DEPTH_SLOPE = Series(
    "update_depth_slope", "gauge", "",
    "Slope of log update norm against log depth (layer 1..N): 0 is even, above 0 it grows with depth",
    ("part",),
)  # fmt: skip
UPDATE_SPIKES = Series(
    "update_spikes_total", "counter", "", "Steps whose update stood out of this group's own history",
    ("layer", "part"),
)  # fmt: skip
DIRECTION_SPIKES = Series(
    "direction_spikes_total", "counter", "",
    "Steps on which a group's direction, before clip or trust ratio, stood out of its own history", ("part",),
)  # fmt: skip
LOSS_SPIKES = Series("loss_spikes_total", "counter", "", "Steps whose loss stood out of its own history")
SKIPPED_IN_A_ROW = Series(
    "skipped_steps_in_a_row", "gauge", "steps", "Skipped updates since the last good one"
)
RANK = (
    Series("rank_step_seconds", "gauge", "s", "Wall time of the rank's last step", ("rank",)),
    Series("rank_data_wait_seconds", "gauge", "s", "Part of it spent waiting for data", ("rank",)),
    Series(
        "rank_forward_seconds", "gauge", "s",
        "Part of it spent in forward passes, where no rank waits for another (ZeRO 0 to 2)", ("rank",),
    ),
    Series(
        "rank_progress", "gauge", "steps",
        "Steps done, with stages as quarters; in a run that hangs the lowest is waited for", ("rank",),
    ),
    Series(
        "rank_heartbeat_timestamp_seconds", "gauge", "s", "Unix time at which the rank last spoke", ("rank",)
    ),
)  # fmt: skip
STORAGE = (
    Series(
        "checkpoint_step", "gauge", "steps", "Step of the last checkpoint that this process wrote or read"
    ),
    Series("checkpoint_every_steps", "gauge", "steps", "Steps between checkpoints, as configured"),
    Series(
        "checkpoint_timestamp_seconds", "gauge", "s", "Unix time of that checkpoint, of the start before it"
    ),
    Series("disk_free_ratio", "gauge", "", "Free share of the disk with the run's folder"),
    Series("disk_free_bytes", "gauge", "bytes", "Free bytes of it"),
)
TOTAL_STEPS = Series("total_steps", "gauge", "steps", "Steps of the whole run, as configured")
HEARTBEAT = Series(
    "heartbeat_timestamp_seconds", "gauge", "s", "Unix time at which the training loop last spoke"
)
RUN_INFO = Series(
    "run_info", "gauge", "", "Always 1; its labels say what is running", ("run", "mfu_reference")
)

ALL: tuple[Series, ...] = (
    *STEP, *POSITION, *PROBE, *PROBE_LAYERED, *EVALUATION, *EVALUATION_BY, *GLOBAL, *LAYERED, PARAMETERS, *OVER_DEPTH,
    WINDOW_LAYERED, *WINDOW, DEAD_LAYERS, DEPTH_SLOPE, UPDATE_SPIKES, DIRECTION_SPIKES, LOSS_SPIKES, SKIPPED_IN_A_ROW,
    *RANK, *STORAGE, TOTAL_STEPS, HEARTBEAT, RUN_INFO,
)  # fmt: skip

"""The metric contract: every series that a run exports, in one list.

`metrics.jsonl`, the Prometheus endpoint, the dashboards, the alert rules and docs/monitoring.md all name the
same quantities. This file is where the names, units and meanings are written down; tests hold the others to
it. A key of `metrics.jsonl` is the name of its series without the prefix `sutrain_`.
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
    Series("step", "gauge", "steps", "Optimizer updates done so far"),
    Series(
        "samples_consumed_total", "counter", "samples", "Training samples (rows) consumed, the run's position"
    ),
    Series("tokens_total", "counter", "tokens", "Training tokens consumed, padding excluded"),
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
    Series("skipped_steps_total", "counter", "steps", "Updates skipped because a gradient was not finite"),
)
PROBE = (
    Series(
        "model_update",
        "gauge",
        "",
        "RMS change of the encoder's output by one update, on a fixed batch, in fp32",
    ),
)
ATTENTION_ENTROPY = Series(
    "attention_entropy", "gauge", "nats", "Mean entropy of a query's attention, on a fixed batch, in fp32",
    ("layer",),
)  # fmt: skip
EVALUATION = (
    Series("validation_loss", "gauge", "nats/token", "Loss on the validation split at the last evaluation"),
    Series("validation_accuracy", "gauge", "", "Share of masked validation tokens predicted right"),
    Series(
        "unigram_accuracy",
        "gauge",
        "",
        "Accuracy of always guessing the most frequent token: the floor to beat",
    ),
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
)
OVER_DEPTH = tuple(
    Series(
        f"{series.key}_over_depth",
        "gauge",
        series.unit,
        f"{series.help}: quantile over all layers",
        ("part", "quantile"),
    )
    for series in LAYERED
)
DEPTH_SLOPE = Series(
    "update_depth_slope", "gauge", "",
    "Slope of log update norm against log depth (layer 1..N): 0 is even, above 0 it grows with depth",
    ("part",),
)  # fmt: skip
UPDATE_SPIKES = Series(
    "update_spikes_total", "counter", "", "Steps whose update stood out of this group's own history",
    ("layer", "part"),
)  # fmt: skip
LOSS_SPIKES = Series("loss_spikes_total", "counter", "", "Steps whose loss stood out of its own history")
SKIPPED_IN_A_ROW = Series(
    "skipped_steps_in_a_row", "gauge", "steps", "Skipped updates since the last good one"
)
HEARTBEAT = Series(
    "heartbeat_timestamp_seconds", "gauge", "s", "Unix time at which the training loop last spoke"
)
RUN_INFO = Series(
    "run_info", "gauge", "", "Always 1; its labels say what is running", ("run", "mfu_reference")
)

ALL: tuple[Series, ...] = (
    *STEP, *PROBE, *EVALUATION, *GLOBAL, *LAYERED, *OVER_DEPTH,
    ATTENTION_ENTROPY, DEPTH_SLOPE, UPDATE_SPIKES, LOSS_SPIKES, SKIPPED_IN_A_ROW, HEARTBEAT, RUN_INFO,
)  # fmt: skip

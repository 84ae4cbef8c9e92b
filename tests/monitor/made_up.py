"""A run as the trainer would report it: made up, but with the shape of a real one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sutrain.monitor.log import MetricsLog
from sutrain.monitor.series import PROBE, PROBE_LAYERED
from sutrain.monitor.spikes import Spikes, SpikeWatch
from sutrain.monitor.statistics import GroupTable, TensorGroups

COLUMNS = ("weight_square_sum", "grad_square_sum", "update_square_sum", "numel")
OWN = ("update_rms", "clip_factor", "trust_ratio")
"""Columns that single optimizers add; the made-up one has all."""


def groups_of(layers: int) -> TensorGroups:
    """A post-norm encoder with affine norms and an untied head."""
    names, shapes = ["encoder.embeddings.token.weight"], [(3000, 64)]
    for i in range(layers):
        for matrix in ("query", "key", "value", "output"):
            names.append(f"encoder.layers.{i}.mixer.{matrix}.weight")
            shapes.append((64, 64))
        names += [f"encoder.layers.{i}.feed_forward.{matrix}.weight" for matrix in ("up", "down")]
        shapes += [(256, 64), (64, 256)]
        names += [f"encoder.layers.{i}.{norm}.weight" for norm in ("mixer_norm", "feed_forward_norm")]
        shapes += [(64,), (64,)]
    return TensorGroups([*names, "head.weight"], [*shapes, (3000, 64)])


def made_up_run(
    layers: int = 8,
    steps: int = 400,
    seed: int = 0,
    evaluate_every_steps: int = 50,
    peak_rate: float = 2e-3,
    spike_at: tuple[int, ...] = (),
) -> Iterator[tuple[dict, GroupTable, dict | None]]:
    """(record, table, evaluation or None) of every step.

    Warm-up over a tenth of the run, then a linear decay; updates follow the learning rate and shrink with
    depth; at each step of `spike_at` the lower layers move 8 times as far, and the loss jumps two steps
    later.
    """
    groups, random = groups_of(layers), np.random.default_rng(seed)
    numel = np.array([math.prod(shape) for shape in groups.shapes], dtype=np.float64)
    depth = np.array([int(groups.keys[g][0] or 0) + 1 for g in groups.group_of_T], dtype=np.float64)
    warmup, tokens = steps // 10, 0
    for step in range(1, steps + 1):
        rate = peak_rate * min(step / warmup, (steps - step + 1) / (steps - warmup))
        progress = 1 - math.exp(-3.0 * step / steps)
        loss = 8.0 - 4.2 * progress + 0.05 * random.standard_normal()
        noise = np.exp(0.12 * random.standard_normal((3, len(numel))))
        weight = 0.04 * (1 + step / steps) * numel**0.5 * noise[0] ** 0.1
        grad = 0.3 * numel**0.5 / 60 * depth**-0.4 * (1.4 - progress) * noise[1]
        update = rate * numel**0.5 * depth**-0.25 * (1.2 - progress) * noise[2]
        if step in spike_at:
            update = np.where(depth <= max(1, layers // 3), 8 * update, update)
        if step - 2 in spike_at:
            loss, grad = 1.5 * loss, 4 * grad
        sums = np.stack([weight**2, grad**2, update**2, numel], axis=1)
        seconds = 0.21 + 0.02 * abs(random.standard_normal())
        tokens += 16 * 128
        record = {
            "step": step,
            "samples_consumed_total": 16 * step,
            "tokens_total": tokens,
            "loss": loss,
            "learning_rate": rate,
            "tokens_per_second": 16 * 128 / seconds,
            "mfu_ratio": 0.09 / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": 0.004,
            "loss_scale": 1.0,
            "skipped_steps_total": 0,
            "refused_steps_total": 0,
        }
        evaluation = None
        if step % evaluate_every_steps == 0:
            evaluation = {
                "step": step,
                "validation_loss": loss + 0.08,
                "validation_accuracy": 0.05 + 0.42 * progress,
                "unigram_accuracy": 0.062,
                "validation_loss_by_length": {"32": loss + 0.3, "64": loss},
                "validation_accuracy_by_length": {"32": 0.1, "64": 0.2},
                "validation_loss_by_source": {"law": loss},
                "validation_accuracy_by_source": {"law": 0.2},
            }
        own = np.stack([noise[2], np.minimum(1.0, 1 / noise[1]), 0.3 * noise[0]], axis=1)
        yield record, groups.table(np.hstack([sums, own]), (*COLUMNS, *OWN), rate), evaluation


def probe_of(layers: int, value: float = 1.0) -> dict:
    """A probe with every number that there is."""
    whole = {series.key: 0.01 * value for series in PROBE}
    return whole | {series.key: [value + layer for layer in range(layers)] for series in PROBE_LAYERED}


def write_run(directory: Path, **settings) -> list[Spikes]:
    """A whole run's metrics.jsonl in `directory`; returns the verdict on every step."""
    directory.mkdir(parents=True, exist_ok=True)
    verdicts, watch = [], None
    with MetricsLog(directory / "metrics.jsonl") as log:
        total = settings.get("steps", 400)
        log.run(0, {"world_size": 1, "total_steps": total, "mfu_reference": "made up", "time_seconds": 1.7e9})
        for record, table, evaluation in made_up_run(**settings):
            watch = watch or SpikeWatch(table.groups)
            verdicts.append(watch.judge(record["loss"], record["learning_rate"], table))
            log.step({**record, "time_seconds": 1.7e9 + 0.25 * record["step"]}, table, verdicts[-1])
            if evaluation:
                log.evaluation(evaluation)
    return verdicts

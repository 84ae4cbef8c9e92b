"""What a run's numbers say, in words: the lines at the head of the report.

Every line is a judgement that can be checked: it names the numbers it rests on. `good`, `note` and `bad` say
how to take it; the thresholds stand here in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .log import RunLog
from .progress import duration

WITHOUT_UPDATE = 0.02  # share of the steps whose update was skipped, or refused
DATA_BOUND_SHARE = 0.1  # of a step's time spent waiting for data
THROUGHPUT_DROP = 0.8  # last tenth of the run over the whole run
OVERFIT = 1.02  # validation loss now over its best, medians of three evaluations
MINIMUM_STEPS = 20  # before a run's curves are judged: medians over its ends are then single steps
MINIMUM_SLOPES = 20  # tables of layers before a slope over depth is spoken of
SLOPE_RISE = 0.5  # of log update against log depth, over its lowest: as the alarm SutrainUpdateDrift
MODEL_UPDATE_GROWTH = 3.0  # last probes over the first half
COLLAPSED_ENTROPY = 0.1  # nats
DEAD_UNITS = 0.3  # of a layer's inner units
EDGE = 0.05  # share of the run that "at the beginning" and "at the end" mean


@dataclass(frozen=True)
class Verdict:
    """One judgement; `text` is a full sentence."""

    level: Literal["good", "note", "bad"]
    text: str


def verdicts(run: RunLog) -> list[Verdict]:
    """All judgements on a run, the most important first."""
    found = [
        *_completeness(run),
        *_loss(run),
        *_accuracy(run),
        *_spikes(run),
        *_throughput(run),
        *_depth(run),
        *_probes(run),
    ]
    return found + [Verdict("note", f"About the log: {note}.") for note in run.notes]


def headline(run: RunLog) -> str:
    """One line for a picture's title: the last validation accuracy, or the loss without evaluations."""
    _, accuracy = run.series("validation_accuracy", "evaluations")
    steps = f"{run.steps[-1]['step']:,} steps"
    if len(accuracy):
        return f"{accuracy[-1]:.1%} of held-out tokens right after {steps}"
    return f"loss {_edges(run.series('loss')[1])[1]:.3f} after {steps}"


def _edges(values: np.ndarray) -> tuple[float, float]:
    """Medians over the first and the last EDGE of a curve, NaN left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    width = max(1, round(EDGE * len(values)))
    return float(np.median(values[:width])), float(np.median(values[-width:]))


def _lowest_level(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(step, value) of the lowest median over an EDGE of a finite curve: a single batch may be an easy one."""
    width = max(1, round(EDGE * len(values)))
    starts = range(0, len(values) - width + 1, max(1, width // 2))
    levels = [float(np.median(values[i : i + width])) for i in starts]
    lowest = int(np.argmin(levels))
    return float(steps[starts[lowest] + width // 2]), levels[lowest]


def _completeness(run: RunLog) -> list[Verdict]:
    last, record = run.steps[-1]["step"], run.steps[-1]
    total = next((header["total_steps"] for header in reversed(run.runs) if "total_steps" in header), None)
    resumed = [header["step"] for header in run.runs if header["step"] > 0]
    text = f"{last:,} steps done"
    level: Literal["good", "note", "bad"] = "good"
    if total is not None:
        text = f"All {total:,} steps done" if last >= total else f"{last:,} of {total:,} steps done"
        level = "good" if last >= total else "note"
    text += f", {run.updates_applied:,} updates applied"
    if "tokens_total" in record:
        text += f", {record['tokens_total']:,.0f} tokens"
    if resumed:
        text += f"; resumed at step {', '.join(f'{step:,}' for step in resumed)}"
    found = [Verdict(level, text + ".")]
    for key, words in (
        ("skipped_steps_total", "skipped because a gradient was not finite"),
        ("refused_steps_total", "refused because loss or gradient stood out too far (acting.skip_sigmas)"),
    ):
        count = record.get(key, 0)
        if count:
            share = count / last
            level = "bad" if share > WITHOUT_UPDATE else "note"
            found.append(Verdict(level, f"{count:,} updates ({share:.1%}) were {words}."))
    return found


def _loss(run: RunLog) -> list[Verdict]:
    steps, loss = run.series("loss")
    broken = steps[~np.isfinite(loss)]
    if len(broken):
        return [
            Verdict(
                "bad", f"The loss was not finite on {len(broken):,} step(s), first on step {broken[0]:,.0f}."
            )
        ]
    if len(loss) < MINIMUM_STEPS:
        return [Verdict("note", f"{len(loss):,} step(s) are too few to judge the loss.")]
    first, last = _edges(loss)
    at, lowest = _lowest_level(steps, loss)
    text = f"Training loss went from {first:.3f} to {last:.3f} nats per predicted token"
    if last >= first:
        return [Verdict("bad", text + ": it did not fall.")]
    if last > 1.15 * lowest and last - lowest > 0.3:
        return [Verdict("bad", f"{text}, but it had been at {lowest:.3f} (about step {at:,.0f}).")]
    return [Verdict("good", text + ".")]


def _accuracy(run: RunLog) -> list[Verdict]:
    _, accuracy = run.series("validation_accuracy", "evaluations")
    _, floor = run.series("unigram_accuracy", "evaluations")
    if not len(accuracy):
        return [
            Verdict(
                "note",
                "There is no evaluation yet; the training loss alone cannot tell learning from memory.",
            )
        ]
    text = f"The model gets {accuracy[-1]:.1%} of the held-out tokens right"
    if len(floor) and floor[-1] > 0:
        times = accuracy[-1] / floor[-1]
        better = times > 1
        text += f", {times:.1f} times the unigram baseline of {floor[-1]:.1%}" if better else (
            f", no more than the unigram baseline of {floor[-1]:.1%}: it has learnt frequencies, not language"
        )  # fmt: skip
        found = [Verdict("good" if better else "bad", text + ".")]
    else:
        found = [Verdict("good", text + ".")]
    _, validation = run.series("validation_loss", "evaluations")
    middle = np.array(
        [np.median(validation[i : i + 3]) for i in range(len(validation) - 2)]
    )  # one may be unlucky
    if len(middle) and middle[-1] > OVERFIT * middle.min():
        found.append(
            Verdict("bad", f"Validation loss is rising: {middle[-1]:.3f}, after {middle.min():.3f} before.")
        )
    return found


def _spikes(run: RunLog) -> list[Verdict]:
    loss = [line["step"] for line in run.steps if "loss_spike" in line]
    update = [line["step"] for line in run.steps if "update_spikes" in line]
    if not loss and not update:
        return [Verdict("good", "No step's loss or update stood out of its own history.")]
    found = []
    if update:
        where = _where([row for line in run.steps for row in line.get("update_spikes", [])])
        found.append(
            Verdict("note", f"Updates spiked on {len(update)} step(s) ({_some(update)}), mostly in {where}.")
        )
    if loss:
        led = sum(any(0 <= step - before <= 20 for before in update) for step in loss)
        text = f"The loss spiked on {len(loss)} step(s) ({_some(loss)})"
        text += f"; {led} of them within 20 steps after an update spike" if led else ""
        found.append(Verdict("bad" if len(loss) > 3 else "note", text + "."))
    return found


def _some(steps: list[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:5])
    return f"step {shown}" + (", …" if len(steps) > 5 else "")


def _where(rows: list[list]) -> str:
    """The group with the most spikes and, if there are more groups, how many."""
    counts: dict[tuple[str, str], int] = {}
    for layer, part, _ in rows:
        counts[layer, part] = counts.get((layer, part), 0) + 1
    (layer, part), _ = max(counts.items(), key=lambda item: item[1])
    name = f"layer {layer} {part.replace('_', '-')}" if layer else f"the {part}"
    return name if len(counts) == 1 else f"{name} ({len(counts)} groups in all)"


def _throughput(run: RunLog) -> list[Verdict]:
    _, rate = run.series("tokens_per_second")
    if not len(rate):
        return []
    usual = float(np.median(rate))
    text = f"Throughput {usual:,.0f} tokens/s"
    _, mfu = run.series("mfu_ratio")
    if len(mfu):
        reference = next(
            (h["mfu_reference"] for h in reversed(run.runs) if "mfu_reference" in h), "unknown reference"
        )
        text += f", {np.median(mfu):.1%} of peak ({reference})"
    _, seconds = run.series("step_seconds")
    if len(seconds):
        text += f"; training steps took {duration(float(seconds.sum()))} in all"
    found = [Verdict("good", text + ".")]
    tail = float(np.median(rate[-max(1, len(rate) // 10) :]))
    if len(rate) >= 50 and tail < THROUGHPUT_DROP * usual:
        found.append(
            Verdict(
                "bad",
                f"The last tenth of the run was slower: {tail:,.0f} tokens/s, {tail / usual:.0%} of usual.",
            )
        )
    _, waited = run.series("data_wait_seconds")
    if len(waited) == len(seconds) and len(seconds) and waited.sum() > DATA_BOUND_SHARE * seconds.sum():
        found.append(
            Verdict("bad", f"{waited.sum() / seconds.sum():.0%} of the step time went into waiting for data.")
        )
    return found


def _depth(run: RunLog) -> list[Verdict]:
    """How evenly the layers move, at the end of the run: DeepNet's question (arXiv 2203.00555)."""
    found = []
    for part in ("mixer", "feed_forward"):
        _, layers, values = run.heat_map("update_norm", part)
        if len(layers) < 3 or len(run.steps) < MINIMUM_STEPS:
            continue
        tail = values[:, -max(1, values.shape[1] // 4) :]
        mean = np.array(
            [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in tail]
        )
        if np.isfinite(mean).sum() < 3 or mean[np.isfinite(mean)].min() <= 0:
            continue
        spread = np.nanmax(mean) / np.nanmin(mean)
        highest, lowest = layers[int(np.nanargmax(mean))], layers[int(np.nanargmin(mean))]
        name = part.replace("_", "-")
        text = (
            f"In the last quarter of the run the {name} of layer {highest} moved most and that of "
            f"layer {lowest} least, {spread:,.1f} times apart."
        )
        found.append(Verdict("note" if spread > 10 else "good", text))
        found += _slope(run, part, name)
    return found


def _slope(run: RunLog, part: str, name: str) -> list[Verdict]:
    """Does the update grow with depth, and since when? (The slope is that of statistics.depth_slope.)"""
    steps, layers, values = run.heat_map("update_norm", part)
    known = np.isfinite(values).all(0) & (values > 0).all(0)
    if known.sum() < MINIMUM_SLOPES:
        return []
    x = np.log(layers + 1.0) - np.log(layers + 1.0).mean()
    slope = x @ np.log(values[:, known]) / (x @ x)
    half = max(1, len(slope) // 40)
    smooth = np.array([np.median(slope[max(0, i - half) : i + half + 1]) for i in range(len(slope))])
    if smooth[-1] - smooth.min() < SLOPE_RISE or smooth[-1] < SLOPE_RISE:
        return []
    since = int(steps[known][np.flatnonzero(smooth - smooth.min() < SLOPE_RISE / 2)[-1]])
    text = (
        f"The update of the {name} layers grows with depth: slope {smooth[-1]:+.1f}, from step {since:,} on."
    )
    return [Verdict("bad", text)]


def _probes(run: RunLog) -> list[Verdict]:
    """What probes say at the end: the function, attention, units."""
    found = []
    _, update = run.series("model_update", "probes")
    if len(update) >= 8:
        usual, last = float(np.median(update[: len(update) // 2])), float(np.median(update[-3:]))
        if usual > 0 and last > MODEL_UPDATE_GROWTH * usual:
            text = f"One update changes the function {last / usual:.1f} times as much as in the first half of the run"
            found.append(Verdict("bad", f"{text} ({last:.2g}, after {usual:.2g})."))
    if not run.probes:
        return found
    last_probe = run.probes[-1]
    entropy = [x for x in last_probe.get("attention_entropy", []) if isinstance(x, float)]
    collapsed = [str(layer) for layer, x in enumerate(entropy) if x < COLLAPSED_ENTROPY]
    if collapsed:
        text = f"Attention has collapsed onto single tokens in layer {', '.join(collapsed[:5])}"
        found.append(Verdict("bad", f"{text}: entropy below {COLLAPSED_ENTROPY} nats."))
    dead = [x for x in last_probe.get("dead_units_share", []) if isinstance(x, float)]
    if dead and max(dead) > DEAD_UNITS:
        text = f"{max(dead):.0%} of the inner units of layer {int(np.argmax(dead))} are dead"
        found.append(Verdict("note", f"{text}: next to nothing at every token of the probe."))
    return found

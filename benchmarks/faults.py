"""Which fault is seen by which number, and how long before the loss shows it: small real models, faults on purpose.

    python benchmarks/faults.py --data runs/demo/data

Every run is compared with its own twin without the fault: same seed, same data, same thresholds. The thresholds are
those of sutrain/monitor/spikes.py and statistics.py, written down before these seeds and faults were run. An alarm on a
clean run is a false one; the lead is the number of updates from the first alarm to the first update on which the loss
is more than a tenth above that of its twin.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as stats
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results
from sutrain.config import Masking
from sutrain.data import Batch, Samples, load_manifest
from sutrain.labelling import word_masking
from sutrain.launch import environment
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.spikes import ROBUST_SIGMAS, UPDATE_FACTOR, RollingHistory, SpikeWatch, safe_log
from sutrain.monitor.statistics import TensorGroups
from sutrain.optim import STATISTICS, FragmentMap, FragmentOptimizer, build_optimizer

OUTPUT = Path(__file__).parent / "results/faults.json"
RATES = {"adamw": 1e-3, "lamb": 1e-2, "adafactor": 2e-2}
CLEAN_SEEDS, FAULT_SEEDS = range(100, 110), (200, 201)
UPDATES, FAULT_AT, WARMUP, ROWS, TOKENS = 200, 120, 20, 8, 64
LOSS_LEFT = 1.1
DETECTORS = ("update", "loss", "gradient", "direction", "model update", "dead layer", "skipped")


class Experiment:
    """One model in training; faults reach into it through these fields."""

    def __init__(self, data: Path, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        manifest = load_manifest(data)
        masking = word_masking(manifest, Masking(), seed, stream="masks")
        self.samples = Samples(data, "train", seed, masking)
        config = EncoderConfig(
            vocab_size=manifest.vocab_size, hidden_size=48, num_layers=4, num_heads=3, head_size=16,
            feed_forward_size=128, max_row_tokens=manifest.row_tokens, hidden_dropout=0.0, attention_dropout=0.0,
            norm="rms_gain",
        )  # fmt: skip
        self.model = MaskedLanguageModel(config)
        fragments = FragmentMap.whole(self.model.named_parameters())
        self.optimizer: FragmentOptimizer = build_optimizer(
            name, self.model.named_parameters(), learning_rate=RATES[name]
        )
        self.optimizer.attach(fragments)
        self.groups = TensorGroups(fragments.names, [list(shape) for shape in fragments.shapes.values()])
        self.first = seed * 7 % 64 * UPDATES * ROWS
        self.rate = RATES[name]
        kept = self.samples.batch(self.first + UPDATES * ROWS, 4)
        self.kept = kept.inputs_NL[:, :TOKENS], kept.document_NL[:, :TOKENS]

    def batch(self, update: int) -> Batch:
        batch = self.samples.batch(self.first + update * ROWS, ROWS)
        for name in ("inputs_NL", "labels_NL", "hidden_NL", "document_NL"):
            setattr(batch, name, getattr(batch, name)[:, :TOKENS].contiguous())
        return batch

    def backward(self, batch: Batch) -> float:
        """Mean loss of the batch, as seen before the update; gradients are left behind."""
        self.model.zero_grad()
        positions = batch.labels_NL >= 0
        hidden = self.model(batch.inputs_NL, batch.document_NL)[positions]
        loss = torch.nn.functional.cross_entropy(self.model.logits(hidden), batch.labels_NL[positions])
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def function(self) -> torch.Tensor:
        return self.model(*self.kept)[self.kept[1] > 0]


class Fault:
    """What is done to the batch, before the backward pass and before the update, from update FAULT_AT on."""

    def __init__(self, only_once: bool = False, **hooks: Callable[..., None]) -> None:
        self.only_once, self.hooks = only_once, hooks

    def at(self, moment: str, update: int, *arguments: object) -> None:
        begun = update == FAULT_AT if self.only_once else update >= FAULT_AT
        if begun and moment in self.hooks:
            self.hooks[moment](*arguments)


def raise_rate(run: Experiment) -> None:
    run.optimizer.param_groups[0]["lr"] *= 30


def stale_second_moments(run: Experiment) -> None:
    """As after gradients that were ten times smaller for long."""
    state = run.optimizer.state_by_name()
    for key, value in state.replicated.items():
        if "mean|" in key and "momentum" not in key:
            value.mul_(0.01)
    for key, _, _, values in state.sliced:
        if key == "second_moment":
            values.mul_(0.01)


def corrupt_layer(run: Experiment) -> None:
    with torch.no_grad():
        weight = run.model.encoder.layers[1].feed_forward.up.weight  # type: ignore[union-attr, operator]
        weight.copy_(10 * weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


def label_noise(batch: Batch, vocab_size: int) -> None:
    wrong = (batch.labels_NL >= 0) & (torch.rand(batch.labels_NL.shape) < 0.5)
    batch.labels_NL[wrong] = torch.randint(5, vocab_size, (int(wrong.sum()),))


def corrupt_batch(batch: Batch, vocab_size: int) -> None:
    predicted = batch.labels_NL >= 0
    batch.inputs_NL.copy_(torch.randint(5, vocab_size, batch.inputs_NL.shape))
    batch.labels_NL[predicted] = torch.randint(5, vocab_size, (int(predicted.sum()),))


def freeze_layer(run: Experiment) -> None:
    for name, parameter in run.model.named_parameters():
        if "layers.2." in name and parameter.grad is not None:
            parameter.grad.zero_()
    for key, name, _, values in run.optimizer.state_by_name().sliced:
        if "layers.2." in name and key in ("first_moment", "momentum"):
            values.zero_()


def overflow(run: Experiment) -> None:
    if torch.rand(()) < 0.5:
        next(run.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]


FAULTS = {
    "learning rate x 30": Fault(update=raise_rate),
    "learning rate x 30, one update": Fault(only_once=True, update=raise_rate),
    "stale second moments": Fault(only_once=True, update=stale_second_moments),
    "a layer's weights corrupted": Fault(only_once=True, forward=corrupt_layer),
    "label noise, half of the labels": Fault(batch=label_noise),
    "a corrupted batch": Fault(only_once=True, batch=corrupt_batch),
    "a frozen layer": Fault(update=freeze_layer),
    "an overflow storm": Fault(update=overflow),
}


def train(data: Path, name: str, seed: int, fault: Fault | None) -> tuple[list[float], dict[str, list[int]]]:
    """(loss of every update, {detector: updates on which it spoke}) of one run."""
    run = Experiment(data, name, seed)
    watch = SpikeWatch(run.groups)
    norms, own, change = RollingHistory(len(run.groups)), RollingHistory(len(run.groups)), RollingHistory(1)
    fault = fault or Fault()
    losses: list[float] = []
    alarms: dict[str, list[int]] = {detector: [] for detector in DETECTORS}
    before = run.function()

    def stands_out(history: RollingHistory, values: np.ndarray) -> bool:
        factor, sigmas = history.compare(safe_log(values))
        history.add(safe_log(values))
        return bool(((factor > UPDATE_FACTOR) & (sigmas > ROBUST_SIGMAS)).any())

    for update in range(UPDATES):
        batch = run.batch(update)
        fault.at("batch", update, batch, run.samples.manifest.vocab_size)
        fault.at("forward", update, run)
        losses.append(run.backward(batch))
        run.optimizer.param_groups[0]["lr"] = run.rate * min(1.0, (update + 1) / WARMUP)
        fault.at("update", update, run)
        done = run.optimizer.updates
        run.optimizer.step()
        skipped = run.optimizer.updates == done
        if skipped:
            run.optimizer.statistics.fill_(math.nan)
        rate = run.optimizer.learning_rate
        table = run.groups.table(run.optimizer.statistics, STATISTICS, rate)
        spikes = watch.judge(losses[-1], rate, table)
        after = run.function()
        model_update = float((after - before).square().mean().sqrt())
        before = after
        direction = table.direction_rms if name == "adafactor" else 1.0 / table.trust_ratio
        # What is gone after a corrupted weight is no update; ‖ΔF‖ is judged relative to the rate, as updates are.
        spoke = {
            "update": len(spikes.updates) > 0,
            "loss": spikes.loss_factor is not None,
            "gradient": stands_out(norms, table.grad_norm),
            "direction": name != "adamw" and stands_out(own, direction),
            "model update": stands_out(
                change, np.array([model_update / (run.rate * min(1.0, (update + 1) / WARMUP))])
            ),
            "dead layer": any(table.dead_layers(part) for part in run.groups.layer_groups),
            "skipped": skipped,
        }
        for detector, spoken in spoke.items():
            if spoken:
                alarms[detector].append(update)
    return losses, alarms


def first_from(updates: list[int], start: int) -> int | None:
    return next((update for update in updates if update >= start), None)


def judge(data: Path, name: str) -> Iterator[dict[str, object]]:
    """One row a fault, and one for the clean runs."""
    false: dict[str, int] = dict.fromkeys(DETECTORS, 0)
    for seed in CLEAN_SEEDS:
        _, alarms = train(data, name, seed, None)
        for detector, updates in alarms.items():
            false[detector] += len(updates)
    yield {
        "optimizer": name,
        "fault": f"none, {len(CLEAN_SEEDS)} clean runs of {UPDATES}",
        "false_alarms": false,
    }
    twins = {seed: train(data, name, seed, None)[0] for seed in FAULT_SEEDS}
    for fault_name, fault in FAULTS.items():
        found: dict[str, list[int | None]] = {detector: [] for detector in DETECTORS}
        left: list[int | None] = []
        for seed in FAULT_SEEDS:
            losses, alarms = train(data, name, seed, fault)
            off = [u for u in range(UPDATES) if not losses[u] <= LOSS_LEFT * twins[seed][u]]
            left.append(first_from(off, FAULT_AT))
            for detector in DETECTORS:
                found[detector].append(first_from(alarms[detector], FAULT_AT))
        yield {"optimizer": name, "fault": fault_name, "loss_left_its_band": left, "first_alarm": found}


def cell(row: dict, detector: str) -> str:
    """Updates after the fault of the first alarm (median of the seeds), and what it is ahead of the loss."""
    if "false_alarms" in row:
        return str(row["false_alarms"][detector])
    first = row["first_alarm"][detector]
    if None in first:
        return "–" if set(first) == {None} else f"{sum(f is not None for f in first)} of {len(first)}"
    delay = stats.median(f - FAULT_AT for f in first)
    pairs = zip(first, row["loss_left_its_band"], strict=True)
    leads = [left - alarm for alarm, left in pairs if left is not None]
    return f"+{delay:g}" + (f" (lead {stats.median(leads):g})" if len(leads) == len(first) else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="prepared data (make demo)")
    parser.add_argument("--optimizer", choices=RATES, action="append", help="default: all three")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--join", action="store_true", help="keep what the output file has of other optimizers"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.optimizer or RATES:
        print(f"\n| {name} | loss off | " + " | ".join(DETECTORS) + " |", flush=True)
        print("|" + "---|" * (len(DETECTORS) + 2), flush=True)
        for row in judge(options.data, name):
            rows.append(row)
            left = row.get("loss_left_its_band")
            known = [u - FAULT_AT for u in left if u is not None] if left else []  # type: ignore[attr-defined]
            off = f"+{stats.median(known):g}" if known else "–"
            print(
                f"| {row['fault']} | {off} | " + " | ".join(cell(row, d) for d in DETECTORS) + " |",
                flush=True,
            )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = environment(1)
    machine = {key: facts[key] for key in ("processor", "cores", "python", "packages")}
    if options.join and options.output.exists():
        others = json.loads(options.output.read_text())["rows"]
        rows += [row for row in others if row["optimizer"] not in (options.optimizer or RATES)]
    results = [
        {
            "name": f"false_alarms_{row['optimizer']}_{detector.replace(' ', '_')}",
            "value": row["false_alarms"][detector],
            "unit": "updates",
            "goal": 0,
            "better": "lower",
        }
        for row in rows
        if "false_alarms" in row
        for detector in ("update", "loss", "dead layer")
    ]
    content = {"commit": commit, "machine": machine, "command": "python benchmarks/faults.py"}
    write_results(options.output, {**content, "rows": rows, "results": results})


if __name__ == "__main__":
    main()

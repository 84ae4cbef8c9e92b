"""What a run will be, before it is started: `python -m sutrain.plan --config X [--ranks N] [--section.key=value …]`.

Shows the resolved configuration, parameters, memory a rank needs by ZeRO stage, FLOPs, how the global batch is spread
over ranks, how often the data is seen, and the learning rate over all updates (`--picture FILE` draws that into a PNG
or SVG file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data_prep.config_file import field_help, load_config, split_arguments, to_yaml
from data_prep.shards import Manifest
from sutrain.batch_plan import BatchPlan
from sutrain.config import PretrainConfig, batch_plan, learning_rate_schedule
from sutrain.data import MixedSamples, open_manifest, open_samples
from sutrain.engine import deepspeed_config, whole_state_numbers
from sutrain.labelling import labelling_of, predicted_share
from sutrain.launch import check_model_fits_data
from sutrain.mixture import PERIOD
from sutrain.models.configuration import flops_per_token, parameter_count
from sutrain.monitor.probe_interval import planned_interval
from sutrain.objectives.training_model import TrainingModel
from sutrain.optim.adafactor import settings_of_preset
from sutrain.optim.build import build_optimizer
from sutrain.optim.schedule import RelativeStep

BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank that do not depend on the batch: model weights, gradients, masters and optimizer state."""

    weights: int
    gradients: int
    masters: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer


def state_bytes(config: PretrainConfig, parameters: int, stage: int, world_size: int) -> StateBytes:
    """Accounting of the ZeRO paper (arXiv 1910.02054 §3): stage 1 shards masters and optimizer state, 2 gradients too,
    3 weights too. With zero.offload, masters and optimizer state are in the host's memory.

    AdaFactor's factored state is rows + columns a matrix, under one percent from width 256 on, and counted as zero;
    its momentum, second moments that are not factored (of tensors below min_dim_size_to_factor, or of all), and the two
    tensors of the others are 4 bytes a parameter each.
    """
    short = config.precision != "fp32"
    share = world_size if stage >= 1 else 1
    gradient_bytes = 4 if config.gradient_precision == "fp32" else 2
    return StateBytes(
        weights=parameters * (2 if short else 4) // (world_size if stage >= 3 else 1),
        gradients=parameters * gradient_bytes // (world_size if stage >= 2 else 1),
        # In fp32 without ZeRO, and where each rank has no more than its slice, weights are their own masters.
        masters=parameters * 4 // share if short or stage in (1, 2) or config.zero.offload else 0,
        optimizer=4 * whole_state_numbers(config) // share,
    )


def plan_table(config: PretrainConfig, ranks: int, columns: int = 80) -> Table:
    """Everything that follows from a configuration on `ranks` ranks, for a terminal of so many columns. Raises
    ValueError (ConfigError, DataError, or of settings that do not fit the model)."""
    manifest = open_manifest(config.data)
    check_model_fits_data(config.model, manifest, config.data.dir)
    check_settings_of_tensors(config)
    plan = batch_plan(config, manifest.row_tokens, ranks, 0)
    parameters = parameter_count(config.model)
    samples = plan.samples_after(config.steps)
    tokens = samples * manifest.row_tokens

    table = Table(title=f"{config.run_dir} on {ranks} ranks", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("precision", f"{config.precision}, gradients {config.gradient_precision}")
    for stage in (0, 1, 2, 3):
        need = state_bytes(config, parameters, stage, ranks)
        chosen = "  <- this run" if stage == config.zero.stage else ""
        parts = (
            f"weights {_mib(need.weights)}, gradients {_mib(need.gradients)}, masters {_mib(need.masters)}"
        )
        line = f"{_mib(need.total)} MiB a rank ({parts}, optimizer {_mib(need.optimizer)}){chosen}"
        table.add_row(f"state at ZeRO {stage}", line)
    table.add_row("global batch", f"{plan.global_sequences:,} rows x {manifest.row_tokens} tokens")
    table.add_row("", micro_batches_in_words(plan))
    table.add_row("training", f"{config.steps:,} updates, {samples:,} rows, {tokens:,} tokens")
    for number, words in enumerate(data_in_words(config, manifest, samples)):
        table.add_row("" if number else "data", words)
    table.add_row("arithmetic", arithmetic_in_words(config, plan, manifest.row_tokens))
    table.add_row("probes", probes_in_words(config, -(-plan.global_sequences // ranks), manifest))
    width = min(56, max(1, columns - 32))  # 22 are the table's frame and first column, 10 the axis
    table.add_row("learning rate", drawn(learning_rate_by_update(config), config.steps, width))
    table.add_row("", learning_rate_in_words(config))
    return table


def check_settings_of_tensors(config: PretrainConfig) -> None:
    """Raises ValueError unless the settings that choose tensors by globs fit the model, as training will see it."""
    if not {"per_tensor", "logical_tensors"} & set(config.optimizer.settings):
        return  # everything else was checked with the configuration, and a thousand layers take seconds
    model = TrainingModel.on(torch.device("meta"), config.model)
    try:
        build_optimizer(config.optimizer.name, model.named_parameters(), **config.optimizer.arguments())
    except ValueError as error:
        raise ValueError(
            "optimizer.settings: " + str(error).replace("\n", "\noptimizer.settings: ")
        ) from None


def micro_batches_in_words(plan: BatchPlan) -> str:
    """How the global batch is spread; where it does not divide, how much of the ranks' time that leaves idle."""
    room = plan.world_size * plan.accumulation * plan.micro_sequences
    words = f"= {plan.world_size} ranks x {plan.accumulation} micro-batches x {plan.micro_sequences} rows"
    if room == plan.global_sequences:
        return words
    busiest = max(sum(n for _, n in replace(plan, rank=rank).ranges(0)) for rank in range(plan.world_size))
    idle = 1 - plan.global_sequences / (busiest * plan.world_size)
    return f"{words} at most, which would hold {room:,}: micro-batches are smaller, {idle:.1%} of the ranks' time idle"


def data_in_words(config: PretrainConfig, manifest: Manifest, samples: int) -> list[str]:
    """How often each data set is seen, a line each. Raises DataError for sets that cannot be mixed."""
    opened = open_samples(config.data, config.seed, labelling_of(config, manifest, stream="masks"))
    if not isinstance(opened, MixedSamples):
        rows = opened.rows_per_epoch
        return [f"{rows:,} rows; seen {samples / rows:.2f} times"]
    return [
        f"{corpus.manifest.directory}: {corpus.rows_per_epoch:,} rows, {places / PERIOD:.1%} of the samples; "
        f"seen {samples * places / PERIOD / corpus.rows_per_epoch:.2f} times"
        for corpus, places in zip(opened.corpora, opened.mixture.places, strict=True)
    ]


def samples_by_length(plan: BatchPlan, samples: int, row_tokens: int) -> dict[int, int]:
    """{tokens of a row: samples trained on in rows of that length} over the first `samples` of a run, which end with an
    update; an update is of one length, the one at its first sample."""
    ends = sorted({at for at, _ in (*plan.size_warmup, *plan.length_warmup) if 0 < at < samples} | {samples})
    found: dict[int, int] = {}
    position = 0
    for end in ends:
        sequences, tokens = plan.sequences_at(position), plan.tokens_at(position) or row_tokens
        made = max(0, -(-(end - position) // sequences)) * sequences
        found[tokens] = found.get(tokens, 0) + made
        position += made
    return {tokens: count for tokens, count in found.items() if count}


def arithmetic_in_words(config: PretrainConfig, plan: BatchPlan, row_tokens: int) -> str:
    """FLOPs of a token and of the whole run; a length warm-up computes attention over shorter rows."""
    spent = samples_by_length(plan, plan.samples_after(config.steps), row_tokens)
    flops = {tokens: flops_per_token(config.model, tokens, predicted_share(config)) for tokens in spent}
    total = sum(flops[tokens] * samples * row_tokens for tokens, samples in spent.items())
    each = [f"{flops[tokens] / 1e6:,.1f}" for tokens in spent]
    if len(spent) == 1:
        return f"{each[0]} MFLOP a token, {total / 1e15:,.3g} PFLOP in all"
    lengths = ", ".join(f"{number} in rows of {tokens}" for number, tokens in zip(each, spent, strict=True))
    return f"MFLOP a token: {lengths}; {total / 1e15:,.3g} PFLOP in all"


def probes_in_words(config: PretrainConfig, rows_a_rank: int, manifest: Manifest) -> str:
    monitor = config.monitor
    if monitor.probe_every_steps == 0:
        return "none"
    if monitor.probe_every_steps is not None:
        return f"every {monitor.probe_every_steps:,} updates"
    held_out = min(config.evaluation.sequences, manifest.splits["validation"].rows)
    rows = min(monitor.probe_sequences, held_out)
    every = planned_interval(rows, rows_a_rank, monitor.probe_share)
    return (
        f"about every {every:,} updates by FLOPs ({rows} rows in fp32); measured at the start, for "
        f"{monitor.probe_share:.1%} of the time at most"
    )


def learning_rate_by_update(config: PretrainConfig) -> Callable[[int], float]:
    """Updates already made -> the learning rate of the next, with what AdaFactor itself makes of it."""
    peak, schedule = config.optimizer.learning_rate, learning_rate_schedule(config)
    settings = config.optimizer.settings
    settings = settings_of_preset(settings) if config.optimizer.name == "adafactor" else {}
    relative = RelativeStep(settings.get("warmup_initialisation", False))

    def learning_rate(update: int) -> float:
        value = peak * schedule(update)
        if settings.get("relative_step"):
            return value * relative(update + 1)
        return min(value, (update + 1) ** -0.5) if settings.get("inverse_sqrt_cap") else value

    return learning_rate


def learning_rate_in_words(config: PretrainConfig) -> str:
    schedule, name = config.schedule, config.optimizer.name
    words = [f"{schedule.shape}, {schedule.warmup_steps:,} updates of warm-up"]
    settings = settings_of_preset(config.optimizer.settings) if name == "adafactor" else {}
    if settings.get("relative_step"):
        words.append("times AdaFactor's relative step")
    if settings.get("inverse_sqrt_cap"):
        words.append("at most 1/√t")
    if name == "lamb" or (name == "adafactor" and settings.get("parameter_scale", True)):
        words.append("times the size of each tensor")
    return ", ".join(words)


def drawn(learning_rate: Callable[[int], float], steps: int, width: int, height: int = 6) -> str:
    """A curve over all updates as lines of block characters, with the largest value and both ends of the time axis."""
    width = min(width, steps)
    updates = [round(i * (steps - 1) / max(1, 32 * width - 1)) for i in range(32 * width)]
    every = [learning_rate(update) for update in updates]
    values = [max(every[i : i + 32]) for i in range(0, len(every), 32)]  # so that no peak is missed
    top = max(values) or 1.0
    eighths = [round(value / top * height * len(BLOCKS)) for value in values]
    lines = []
    for row in reversed(range(height)):
        inside = [min(len(BLOCKS), max(0, level - row * len(BLOCKS))) for level in eighths]
        label = f"{top:.3g}" if row == height - 1 else "0" if row == 0 else ""
        lines.append(f"{label:>8} ┤" + "".join(BLOCKS[level - 1] if level else " " for level in inside))
    last = f"{steps:,}"
    return "\n".join([*lines, f"{'update':>8} └1{last:>{max(1, width - 1)}}"])


def draw_picture(learning_rate: Callable[[int], float], steps: int, title: str, path: Path) -> None:
    """The same curve as PNG or SVG, by the suffix of `path`. Raises ValueError for another one."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture: {path} is neither .png nor .svg")
    from matplotlib.figure import Figure

    updates = sorted({round(i * (steps - 1) / 1999) for i in range(2000)})
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="optimizer updates", ylabel="learning rate")
    axes.plot([update + 1 for update in updates], [learning_rate(update) for update in updates])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    overrides, rest = split_arguments(sys.argv[1:], "config", "ranks", "picture")
    parser = argparse.ArgumentParser(
        prog="python -m sutrain.plan",
        description=__doc__,
        epilog="keys of the configuration:\n" + field_help(PretrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file, such as configs/pretrain/demo.yaml"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="ranks the run will have, all hosts together (2)"
    )
    parser.add_argument(
        "--show", action="store_true", help="also print the resolved configuration and DeepSpeed's"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the learning rate into a .png or .svg file"
    )
    options = parser.parse_args(rest)
    console = Console(highlight=False)
    try:
        if options.ranks < 1:
            raise ValueError(f"--ranks: {options.ranks}, expected at least 1")
        config = load_config(PretrainConfig, options.config, overrides)
        table = plan_table(config, options.ranks, console.width)
        if options.show:
            console.print(to_yaml(config))
            plan = batch_plan(config, open_manifest(config.data).row_tokens, options.ranks, 0)
            console.print_json(data=deepspeed_config(config, plan))
        console.print(table)
        if options.picture is not None:
            words = learning_rate_in_words(config)
            draw_picture(learning_rate_by_update(config), config.steps, words, options.picture)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


if __name__ == "__main__":
    main()

"""What a run will be, before it is started: `python -m sutrain.plan --config X [--ranks N] [--section.key=value …]`.

Shows the resolved configuration, parameters, memory a rank needs by ZeRO stage, FLOPs, how the global batch is spread
over ranks, how often the data is seen, and the learning-rate schedule.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.config_file import field_help, load_config, split_arguments, to_yaml
from sutrain.config import PretrainConfig, batch_plan, deepspeed_config, learning_rate_schedule
from sutrain.data import load_manifest
from sutrain.launch import check_model_fits_data
from sutrain.models.configuration import flops_per_token, parameter_count

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
    """Accounting of the ZeRO paper (arXiv 1910.02054 §3): stage 1 shards masters and optimizer state, 2 gradients too.

    AdaFactor's factored state is rows + columns a matrix, under one percent from width 256 on, and counted as zero;
    its momentum and the moments of LAMB and AdamW are 4 bytes a parameter each.
    """
    bf16 = config.precision == "bf16"
    moments = {"adafactor": 1 if config.optimizer.settings.get("momentum") else 0, "lamb": 2, "adamw": 2}
    share = world_size if stage >= 1 else 1
    gradient_bytes = 4 if config.gradient_precision == "fp32" or not bf16 else 2
    return StateBytes(
        weights=parameters * (2 if bf16 else 4),
        gradients=parameters * gradient_bytes // (world_size if stage >= 2 else 1),
        # In fp32 without ZeRO the weights are their own masters.
        masters=parameters * 4 // share if bf16 or stage else 0,
        optimizer=parameters * 4 * moments[config.optimizer.name] // share,
    )


def plan_table(config: PretrainConfig, ranks: int) -> Table:
    """Everything that follows from a configuration on `ranks` ranks. Raises ConfigError or DataError."""
    manifest = load_manifest(config.data.dir)
    check_model_fits_data(config.model, manifest, config.data.dir)
    plan = batch_plan(config, manifest.row_tokens, ranks, 0)
    parameters = parameter_count(config.model)
    flops = flops_per_token(config.model, manifest.row_tokens, config.masking.predict_share)
    rows = manifest.splits["train"].rows
    samples = config.steps * plan.global_sequences
    tokens = samples * manifest.row_tokens

    table = Table(title=f"{config.run_dir} on {ranks} ranks", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("parameters", f"{parameters:,}")
    for stage in (0, 1, 2):
        need = state_bytes(config, parameters, stage, ranks)
        chosen = "  <- this run" if stage == config.zero.stage else ""
        parts = (
            f"weights {_mib(need.weights)}, gradients {_mib(need.gradients)}, masters {_mib(need.masters)}"
        )
        line = f"{_mib(need.total)} MiB a rank ({parts}, optimizer {_mib(need.optimizer)}){chosen}"
        table.add_row(f"state at ZeRO {stage}", line)
    table.add_row("global batch", f"{plan.global_sequences:,} rows x {manifest.row_tokens} tokens")
    table.add_row("", f"= {ranks} ranks x {plan.accumulation} micro-batches x {plan.micro_sequences} rows")
    table.add_row("training", f"{config.steps:,} updates, {samples:,} rows, {tokens:,} tokens")
    table.add_row("data", f"{rows:,} rows; seen {samples / rows:.2f} times")
    table.add_row(
        "arithmetic", f"{flops / 1e6:,.1f} MFLOP a token, {flops * tokens / 1e15:,.3g} PFLOP in all"
    )
    schedule = learning_rate_schedule(config)
    table.add_row("learning rate", f"{config.optimizer.learning_rate:g} x {drawn(schedule, config.steps)}")
    table.add_row("", f"{config.schedule.shape}, {config.schedule.warmup_steps:,} updates of warm-up")
    return table


def drawn(schedule, steps: int, width: int = 48) -> str:
    """A schedule over all its updates in one line of block characters."""
    values = [schedule(min(steps - 1, round(i * (steps - 1) / (width - 1)))) for i in range(width)]
    top = max(values) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(value / top * len(BLOCKS)))] for value in values)


def main() -> None:
    overrides, rest = split_arguments(sys.argv[1:], PretrainConfig)
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
    options = parser.parse_args(rest)
    console = Console(highlight=False)
    try:
        if options.ranks < 1:
            raise ValueError(f"--ranks: {options.ranks}, expected at least 1")
        config = load_config(PretrainConfig, options.config, overrides)
        table = plan_table(config, options.ranks)
        if options.show:
            console.print(to_yaml(config))
            plan = batch_plan(config, load_manifest(config.data.dir).row_tokens, options.ranks, 0)
            console.print_json(data=deepspeed_config(config, plan))
        console.print(table)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


if __name__ == "__main__":
    main()

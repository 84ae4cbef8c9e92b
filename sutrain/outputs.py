"""What a run writes and shows while it trains: its folder, metrics.jsonl, the Prometheus endpoint, the terminal.

Rank 0 has one `RunOutputs`; a finished step is handed to it once and reaches all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from data_prep.config_file import to_yaml
from sutrain.config import PretrainConfig
from sutrain.launch import environment
from sutrain.models.configuration import flops_per_token
from sutrain.monitor.exporter import Exporter
from sutrain.monitor.log import FILE_NAME, MetricsLog
from sutrain.monitor.mfu import Peak, mfu_ratio
from sutrain.monitor.progress import Progress
from sutrain.monitor.spikes import SpikeWatch
from sutrain.monitor.statistics import TensorGroups
from sutrain.optim import STATISTICS


class RunOutputs:
    """Opens everything. `resumed_from` is the step of the checkpoint that the run goes on from, None at a start;
    `facts` (world_size, row_tokens, …) go into the first record of metrics.jsonl.

    Raises ValueError when the endpoint cannot listen, naming the setting.
    """

    def __init__(
        self,
        config: PretrainConfig,
        shapes: Mapping[str, torch.Size],
        peak: Peak,
        resumed_from: int | None,
        facts: Mapping[str, Any],
    ):
        folder = config.run_dir
        self.groups = TensorGroups(list(shapes), [list(shape) for shape in shapes.values()])
        self.exporter = Exporter(
            config.monitor.host,
            config.monitor.port,
            self.groups,
            {"run": folder.name, "mfu_reference": peak.source},
            config.monitor.max_layers,
        )
        if config.monitor.port:
            self.exporter.start()
            print(f"metrics: http://{config.monitor.host}:{self.exporter.port}/metrics", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(facts["world_size"]), indent=1))
        self.flops_per_token = flops_per_token(
            config.model, facts["row_tokens"], config.masking.predict_share
        )
        self.peak_flops = peak.flops_per_second * facts["world_size"]
        steps_done = resumed_from or 0
        # What was logged after the checkpoint that the run goes on from is dropped; without one, everything.
        self.metrics = MetricsLog(
            folder / FILE_NAME,
            resume_from_step=-1 if resumed_from is None else resumed_from,
            layers_every_steps=config.monitor.layers_every_steps,
        )
        self.metrics.run(
            steps_done, {**facts, "mfu_reference": peak.source, "flops_per_token": self.flops_per_token}
        )
        self.spike_watch = SpikeWatch(self.groups)
        self.progress = Progress(
            config.steps, steps_done, plain_every_seconds=config.monitor.progress_seconds
        )

    def step(
        self, record: Mapping[str, Any], statistics_TS: torch.Tensor, seconds: float, waited: float
    ) -> None:
        """One finished update: `record` from the loop, the optimizer's sums [T, S], wall time, and the part of it
        spent waiting for data."""
        table = self.groups.table(statistics_TS, STATISTICS)
        tokens_per_second = record["step_tokens"] / seconds
        full = {
            key: value for key, value in record.items() if key not in ("step_tokens", "stop_requested")
        } | {
            "tokens_per_second": tokens_per_second,
            "mfu_ratio": mfu_ratio(self.flops_per_token, tokens_per_second, self.peak_flops),
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "loss_scale": 1.0,
        }
        spikes = self.spike_watch.judge(full["loss"], full["learning_rate"], table)
        self.metrics.step(full, table, spikes)
        self.exporter.step(full, table, spikes)
        self.progress.step(full | table.global_norms, spikes)

    def probe(self, step: int, result: Mapping[str, Any]) -> None:
        """One probe: model update and attention entropy by layer."""
        self.metrics.probe({"step": step, **result})
        self.exporter.probe(result)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """One evaluation, as the Evaluator returns it."""
        self.metrics.evaluation(result)
        self.exporter.evaluation(result)
        self.progress.evaluation(result)

    def heartbeat(self) -> None:
        """Say that the loop is alive after something that is neither a step nor an evaluation."""
        self.exporter.heartbeat()

    def close(self) -> None:
        """Leave terminal, log and port in order."""
        self.progress.close()
        self.metrics.close()
        self.exporter.close()

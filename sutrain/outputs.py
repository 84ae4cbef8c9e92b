"""What a run writes and shows while it trains: its folder, metrics.jsonl, the Prometheus endpoint, the terminal.

Rank 0 has one `RunOutputs`; a finished step is handed to it once and reaches all of them, in a thread of its own: the
loop waits neither for the numbers to leave the device nor for anything that is done with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from data_prep.config_file import to_yaml
from data_prep.shards import Manifest
from sutrain.checkpoint import by_age
from sutrain.config import PretrainConfig
from sutrain.labelling import predicted_share
from sutrain.launch import environment
from sutrain.models.configuration import flops_per_token
from sutrain.monitor.acting import write_dump
from sutrain.monitor.exporter import Exporter
from sutrain.monitor.log import FILE_NAME, MetricsLog, last_steps, set_aside
from sutrain.monitor.mfu import Peak, mfu_ratio
from sutrain.monitor.progress import Progress
from sutrain.monitor.ranks import RankBoard
from sutrain.monitor.sinks import Sink, open_sinks
from sutrain.monitor.spikes import WINDOW_STEPS, SpikeWatch
from sutrain.monitor.statistics import GroupTable, TensorGroups
from sutrain.monitor.worker import HostCopy, Worker
from sutrain.optim import STATISTICS

READS = ("seed", "masking", "batch")
"""Sections of the configuration on which it depends, with the data, what a step reads; a run may go on with others."""
_INTERNAL = ("step_tokens", "row_tokens", "stop_requested")


class RunOutputs:
    """Opens everything. `resumed_from` is the step of the checkpoint that the run goes on from, None at a start;
    `facts` (world_size, train_rows, totals_before: samples, tokens, … of that checkpoint, …) go into the first record
    of metrics.jsonl; `board` has the ranks' states; `evaluated_again`: the weights of `resumed_from` will be.

    Raises ValueError when the endpoint cannot listen, naming the setting, or when a library for `monitor.also` is
    not installed. An error while something is written is raised by one of the next calls.
    """

    def __init__(
        self,
        config: PretrainConfig,
        manifest: Manifest,
        shapes: Mapping[str, torch.Size],
        peak: Peak,
        resumed_from: int | None,
        facts: Mapping[str, Any],
        board: RankBoard | None = None,
        evaluated_again: bool = False,
    ):
        facts = {
            **facts,
            "total_steps": config.steps,
            "parameters": sum(shape.numel() for shape in shapes.values()),
            "row_tokens": manifest.row_tokens,
            "data": data_facts(manifest),
            "reads": config.model_dump(mode="json", include=set(READS)),
        }
        folder = config.run_dir
        self.run_dir = folder
        steps_done = resumed_from or 0
        self.groups = TensorGroups(list(shapes), [list(shape) for shape in shapes.values()])
        self.exporter = Exporter(
            config.monitor.host,
            config.monitor.port,
            self.groups,
            {"run": folder.name, "mfu_reference": peak.source},
            config.monitor.max_layers,
            folder,
            config.checkpoint.every_steps,
            steps_done,
            facts.get("totals_before"),
            config.steps,
        )
        self.exporter.board = board
        if config.monitor.port:
            self.exporter.start()
            print(f"metrics: http://{config.monitor.host}:{self.exporter.port}/metrics", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(facts["world_size"]), indent=1))
        self.flops_per_token = partial(flops_per_token, config.model, masked_share=predicted_share(config))
        self.peak_flops = peak.flops_per_second * facts["world_size"]
        if resumed_from is None and (kept := set_aside(folder / FILE_NAME)):
            print(
                f"no checkpoint to go on from: the log of the run that was here is kept as {kept}", flush=True
            )
        self.metrics = MetricsLog(
            folder / FILE_NAME,
            resume_from_step=resumed_from,
            layers_every_steps=config.monitor.layers_every_steps,
            evaluated_again=evaluated_again,
        )
        if lines := self.metrics.damaged:
            print(
                f"warning: {folder / FILE_NAME}: {lines:,} line(s) with a damaged beginning were cut off its end",
                flush=True,
            )
        self.spike_watch = SpikeWatch(self.groups)
        self.spike_watch.restore(last_steps(folder / FILE_NAME, WINDOW_STEPS + 1))
        self.metrics.run(
            steps_done,
            {
                **facts,
                "mfu_reference": peak.source,
                "flops_per_token": self.flops_per_token(manifest.row_tokens),
            },
        )
        self.sinks: list[Sink] = open_sinks(config.monitor.also, folder, resumed_from)
        self.progress = Progress(
            config.steps, steps_done, plain_every_seconds=config.monitor.progress_seconds
        )
        self.last_table: GroupTable | None = None
        self.worker = Worker("monitor")

    def step(
        self, record: Mapping[str, Any], statistics_TS: torch.Tensor, seconds: float, waited: float
    ) -> None:
        """One finished update: `record` from the loop, the optimizer's sums [T, S], wall time, and the part of it
        spent waiting for data. Returns at once."""
        self.exporter.heartbeat()
        self.worker.do(self._step, dict(record), HostCopy(statistics_TS), seconds, waited)

    def _step(self, record: dict[str, Any], statistics: HostCopy, seconds: float, waited: float) -> None:
        table = self.groups.table(statistics.numbers(), STATISTICS, record["learning_rate"])
        tokens_per_second = record["step_tokens"] / seconds
        flops = self.flops_per_token(record["row_tokens"])  # fewer while a length warm-up cuts the rows
        full = {
            "refused_steps_total": 0,
            **{key: value for key, value in record.items() if key not in _INTERNAL},
            "tokens_per_second": tokens_per_second,
            "mfu_ratio": mfu_ratio(flops, tokens_per_second, self.peak_flops),
            "step_seconds": seconds,
            "data_wait_seconds": waited,
        }
        self.last_table = table
        spikes = self.spike_watch.judge(full["loss"], full["learning_rate"], table)
        self.metrics.step(full, table, spikes)
        self.exporter.step(full, table, spikes)
        for sink in self.sinks:
            sink.step(full, table)
        self.progress.step(full | table.global_norms, spikes)

    def probe(self, step: int, result: Mapping[str, Any]) -> None:
        """One probe, as Probe.after returns it."""
        self.worker.do(self.metrics.probe, {"step": step, **result})
        self.worker.do(self.exporter.probe, result)
        for sink in self.sinks:
            self.worker.do(sink.values, step, result)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """One evaluation, as the Evaluator returns it."""
        self.worker.do(self.metrics.evaluation, result)
        self.worker.do(self.exporter.evaluation, result)
        self.worker.do(self.progress.evaluation, result)
        for sink in self.sinks:
            self.worker.do(sink.values, result["step"], result)

    def heartbeat(self) -> None:
        """Say that the loop is alive after something that is neither a step nor an evaluation."""
        self.exporter.heartbeat()

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is complete."""
        self.exporter.checkpoint(step)

    def finished(self) -> None:
        """All steps are done and kept: let the one who scrapes see the last of it."""
        self.worker.wait()
        self.exporter.wait_for_scrape()

    def dump(self, record: Mapping[str, Any], last_good_step: int) -> str:
        """Write what is needed to look into a run that is being stopped; returns where."""
        self.worker.wait()
        layers = self.last_table.as_columns() if self.last_table is not None else {}
        folders = by_age(self.run_dir / "checkpoints")
        good = [path for path in folders if int(path.name.removeprefix("step-")) <= last_good_step]
        return str(write_dump(self.run_dir, record["step"], record, layers, good[0] if good else None))

    def close(self) -> None:
        """Write what is still waiting; leave terminal, log and port in order."""
        try:
            self.worker.close()
        finally:
            self.progress.close()
            self.metrics.close()
            for sink in self.sinks:
                sink.close()
            self.exporter.close()


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """What the report says about the data: its hash, and documents and tokens by split and by source."""
    splits = {
        name: {"rows": s.rows, "documents": s.documents, "tokens": s.tokens}
        for name, s in manifest.splits.items()
    }
    sources = [
        {key: value for key, value in source.items() if isinstance(value, str | int | float)}
        for source in manifest.sources
    ]
    return {"content_hash": manifest.content_hash, "splits": splits, "sources": sources}

"""What watching costs: steps with and without it, paired and interleaved, on a small model and on one of 1000 layers.

    python benchmarks/monitoring.py                # writes benchmarks/results/monitoring.json

A step of training is a forward pass, a backward pass and an update. Around it:

    statistics   the optimizer's sums, their copy to the host, norms, spikes, metrics.jsonl, the endpoint's snapshot
    probes       two forward passes in fp32 and their numbers, on the default number of rows, by the interval that
                 `monitor.probe_share` makes of the first updates (probe_interval.py, as in training)

Both are the real parts (`RunOutputs`' own steps, `Probe`), in one process with one thread for torch. Each pair of
steps trains on one batch, and which of the two comes first alternates, so that both meet the same machine. Seconds are
processor seconds of the process, all threads together: what the logging thread takes is counted in full although it may
hide behind the next step, and what other programs on the machine take is not. Shares are medians over medians, with a
bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results
from sutrain.config import Monitor
from sutrain.launch import environment
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.exporter import Exporter, series_count
from sutrain.monitor.log import FILE_NAME, MetricsLog
from sutrain.monitor.probe_interval import SETTLED_AFTER
from sutrain.monitor.probes import Probe
from sutrain.monitor.series import PROBE_LAYERED
from sutrain.monitor.spikes import SpikeWatch
from sutrain.monitor.statistics import TensorGroups
from sutrain.monitor.worker import HostCopy, Worker
from sutrain.optim import STATISTICS, FragmentMap, build_optimizer

OUTPUT = Path(__file__).parent / "results/monitoring.json"
GOALS = {"statistics_share": 0.01, "probes_share": 0.02}
SMALL = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "feed_forward_size": 1024}
DEEP = {"hidden_size": 64, "num_layers": 1000, "num_heads": 1, "feed_forward_size": 128}
ROWS, TOKENS, VOCABULARY = 16, 128, 6000


class Bench:
    """A model in training and everything that watches it."""

    def __init__(self, shape: dict[str, int], folder: Path, rows: int) -> None:
        torch.manual_seed(0)
        self.config = EncoderConfig(
            vocab_size=VOCABULARY, head_size=64, max_row_tokens=TOKENS, hidden_dropout=0.0, attention_dropout=0.0,
            residual="deepnorm", initialisation="deepnorm", norm="layer_norm", **shape,
        )  # fmt: skip
        self.model = MaskedLanguageModel(self.config)
        self.fragments = FragmentMap.whole(self.model.named_parameters())
        self.optimizer = build_optimizer("adafactor", self.model.named_parameters(), learning_rate=1e-3)
        self.optimizer.attach(self.fragments)
        self.groups = TensorGroups(self.fragments.names, [list(s) for s in self.fragments.shapes.values()])
        self.watch, self.worker = SpikeWatch(self.groups), Worker("monitor")
        self.metrics = MetricsLog(folder / FILE_NAME, resume_from_step=-1)
        self.exporter = Exporter("127.0.0.1", 0, self.groups, folder=folder).start()
        self.rows, self.steps = rows, 0
        documents = torch.ones(Monitor().probe_sequences, TOKENS, dtype=torch.long)
        tokens = torch.randint(5, VOCABULARY, documents.shape)
        settings = Monitor()
        often = (settings.probe_every_steps, settings.probe_share)
        self.probe = Probe(self.config, self.fragments, tokens, documents, *often)

    def train(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        tokens, labels = batch
        hidden = self.model(tokens, torch.ones_like(tokens))[:, ::7].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(self.model.logits(hidden), labels[:, ::7].flatten())
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def look(self, loss: float) -> None:
        """What RunOutputs does with a step, waited for."""
        self.steps += 1
        self.worker.do(
            self._log,
            {"step": self.steps, "loss": loss, "learning_rate": 1e-3},
            HostCopy(self.optimizer.statistics),
        )
        self.worker.wait()

    def _log(self, record: dict, copy: HostCopy) -> None:
        table = self.groups.table(copy.numbers(), STATISTICS, record["learning_rate"])
        spikes = self.watch.judge(record["loss"], record["learning_rate"], table)
        self.metrics.step(record, table, spikes)
        self.exporter.step(record, table, spikes)

    def close(self) -> None:
        self.worker.close()
        self.metrics.close()
        self.exporter.close()


def seconds_of(function, *arguments) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def share(extra: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    """Median extra time over median step, and its bootstrap interval (2.5 and 97.5 %)."""
    draws = np.random.default_rng(0).integers(0, len(extra), (2000, len(extra)))
    found = np.median(extra[draws], axis=1) / np.median(whole[draws], axis=1)
    return float(np.median(extra) / np.median(whole)), *map(float, np.quantile(found, (0.025, 0.975)))


def measure(
    name: str, shape: dict[str, int], rows: int, pairs: int, seconds: float, probes: int, folder: Path
) -> list[dict]:
    folder.mkdir()
    bench = Bench(shape, folder, rows)
    tokens = torch.randint(5, VOCABULARY, (pairs + SETTLED_AFTER, rows, TOKENS))
    batches = [(t, torch.roll(t, 1, 1)) for t in tokens]
    # Compile, allocate, fill the history, settle the interval.
    for number, batch in enumerate(batches[:SETTLED_AFTER]):
        began = time.perf_counter()
        if number == 0:
            bench.probe.before()
            began = time.perf_counter()
        bench.look(bench.train(batch))
        took = time.perf_counter() - began
        if number == 0:
            bench.probe.after()
        bench.probe.finished(took)
    every = bench.probe.interval.every_steps
    assert every is not None, "settled by now"
    plain, watched, looks = [], [], []
    deadline = time.monotonic() + seconds
    for number, batch in enumerate(batches[SETTLED_AFTER:]):
        if time.monotonic() > deadline:
            break
        for with_it in (number % 2 == 0, number % 2 == 1):
            began = time.process_time()
            loss = bench.train(batch)
            if with_it:
                looks.append(seconds_of(bench.look, loss))
            (watched if with_it else plain).append(time.process_time() - began)
    probed = [seconds_of(bench.probe.before) + seconds_of(bench.probe.after) for _ in range(probes + 1)][1:]
    plain_S, watched_S = np.array(plain), np.array(watched)
    paired = share(watched_S - plain_S, plain_S)
    direct = share(np.array(looks), plain_S)
    probe_share = float(np.median(probed)) / every / float(np.median(plain_S))
    print(
        f"{name}: step {np.median(plain_S) * 1e3:.1f} ms, {len(plain)} pairs; with statistics "
        f"{paired[0]:+.4f} [{paired[1]:+.4f}, {paired[2]:+.4f}] of it; of these the part after the update "
        f"{np.median(looks) * 1e3:.2f} ms = {direct[0]:.4f} [{direct[1]:.4f}, {direct[2]:.4f}]; "
        f"a probe {np.median(probed) * 1e3:.0f} ms, every {every} steps {probe_share:.4f}",
        flush=True,
    )
    scrapes = []
    for _ in range(20):
        scrapes.append(seconds_of(lambda: [list(f.samples) for f in bench.exporter.collect()]))
    log_bytes = (folder / FILE_NAME).stat().st_size / bench.steps
    count = series_count(bench.groups, optimizer_columns=2, probed=len(PROBE_LAYERED))
    print(
        f"{name}: {count} series, scrape {np.median(scrapes) * 1e3:.1f} ms, {log_bytes / 1000:.1f} kB a step",
        flush=True,
    )
    extra_bytes = 4 * len(bench.fragments.names) * len(STATISTICS)
    bench.close()
    return [
        {"name": f"statistics_share_{name}", "value": round(direct[0], 5), "unit": "of a step",
         "goal": GOALS["statistics_share"], "better": "lower", "interval_95": [round(x, 5) for x in direct[1:]]},
        {"name": f"statistics_paired_share_{name}", "value": round(paired[0], 5), "unit": "of a step", "goal": None,
         "better": "lower", "interval_95": [round(x, 5) for x in paired[1:]]},
        {"name": f"statistics_copied_bytes_{name}", "value": extra_bytes, "unit": "bytes a step", "goal": None,
         "better": "lower"},
        {"name": f"probes_share_{name}", "value": round(probe_share, 5), "unit": "of a step",
         "goal": GOALS["probes_share"], "better": "lower"},
        {"name": f"probe_every_steps_{name}", "value": every, "unit": "updates", "goal": None, "better": "lower"},
        {"name": f"pairs_{name}", "value": len(plain), "unit": "pairs", "goal": None, "better": "higher"},
        {"name": f"series_{name}", "value": count, "unit": "series", "goal": 2000, "better": "lower"},
        {"name": f"scrape_seconds_{name}", "value": round(float(np.median(scrapes)), 4), "unit": "s", "goal": 0.1,
         "better": "lower"},
        {"name": f"metrics_bytes_a_step_{name}", "value": round(log_bytes), "unit": "bytes", "goal": 50_000,
         "better": "lower"},
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--deep-pairs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="for the pairs of one model, at most")
    parser.add_argument("--only", choices=("small", "deep"), help="one model; keeps the file's other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, limit = [], 60.0 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "deep":
            results += measure("small", SMALL, ROWS, options.pairs, limit, 5, Path(folder) / "small")
        if options.only != "small":
            results += measure("1000_layers", DEEP, 1, options.deep_pairs, limit, 2, Path(folder) / "deep")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if options.only and OUTPUT.exists():
        measured = {entry["name"] for entry in results}
        kept = json.loads(OUTPUT.read_text())["results"]
        results = [entry for entry in kept if entry["name"] not in measured] + results
    facts = environment(1)
    machine = {key: facts[key] for key in ("processor", "cores", "python", "packages")}
    content = {
        "commit": commit,
        "machine": machine,
        "command": "python benchmarks/monitoring.py",
        "results": results,
    }
    write_results(OUTPUT, content)


if __name__ == "__main__":
    main()

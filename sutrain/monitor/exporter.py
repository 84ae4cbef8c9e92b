"""The Prometheus endpoint of a run: http://HOST:PORT/metrics, served by a thread of the rank that logs.

The training loop hands over a finished step; a scrape draws the step that was handed over last. Handing over
is one assignment of an immutable snapshot, so a scrape sees one step whole, never half of two, the loop never
waits for a scrape, and the text is made only when somebody asks for it.

The number of series is bounded. Up to `max_layers` layers have their own (layer, part) series; of a deeper
model `max_layers` layers evenly from first to last have. Quantiles over ALL layers are always there
(`*_over_depth{part,quantile}`), and spikes of layers without their own series count as layer="other", so sums
over all series are right at any depth.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from . import series as contract
from .ranks import RankBoard, RankState
from .series import (
    EVALUATION,
    EVALUATION_BY,
    GLOBAL,
    LAYERED,
    OVER_DEPTH,
    POSITION,
    PROBE,
    PROBE_LAYERED,
    STEP,
    WINDOW,
    Series,
)
from .spikes import Spikes
from .statistics import GroupTable, TensorGroups
from .window import RollingMaximum

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
MAX_LAYERS = 48
"""Layers with series of their own by default: a 1000-layer run then has fewer than 2,000 series."""
MAX_RANKS = 32
LAST_SCRAPE_SECONDS = 100.0
"""How long a finished run waits at most for the one who scrapes it: for intervals of up to a minute."""
_RANK_FIELDS = {"rank_heartbeat_timestamp_seconds": "time"}
_ANSWER_SECONDS = 0.5
"""For an answer whose text is made to reach the one who asked."""
OTHER = "other"


@dataclass(frozen=True)
class _Snapshot:
    """Everything a scrape may show; never changed, only replaced."""

    scalars: Mapping[str, float]
    table: GroupTable | None
    update_spikes_G: np.ndarray
    direction_spikes: Mapping[str, int]
    loss_spikes: int
    skipped_in_a_row: int
    heartbeat: float
    probed: Mapping[str, tuple[float, ...]]
    by: Mapping[str, Mapping[str, float]]
    """Evaluation by length and source: series key -> label -> value."""
    update_ratio_max_G: np.ndarray | None
    checkpoint: tuple[int, float]


class Exporter(Collector):
    """Serves the series of one run.

    `port` 0 takes any free port (`.port` says which).  `run_info` are labels of `sutrain_run_info` (`run`,
    `mfu_reference`).  `start()` raises ValueError, naming the setting, if the address cannot be listened on.
    Counters start at zero with the process, as Prometheus counters do: a run that goes on from an older checkpoint
    repeats steps, and a counter that goes back would be taken for one that began anew, all of it as an increase.
    `folder` is the run's, for the free space of its disk; `checkpoint_every_steps` and `total_steps` are as configured,
    `started_at_step` and
    `totals_before`, by the keys of the counters of series.STEP, are of the checkpoint that the run goes on from.
    `board`, once set, has the states of the ranks; above `MAX_RANKS` ranks only the most conspicuous are shown.
    """

    def __init__(
        self,
        host: str,
        port: int,
        groups: TensorGroups,
        run_info: Mapping[str, str] | None = None,
        max_layers: int = MAX_LAYERS,
        folder: Path | str = ".",
        checkpoint_every_steps: int = 0,
        started_at_step: int = 0,
        totals_before: Mapping[str, float] | None = None,
        total_steps: int = 0,
    ) -> None:
        self.board: RankBoard | None = None
        self._folder, self._checkpoint_every_steps = folder, checkpoint_every_steps
        self._total_steps = total_steps
        self._scrapes: tuple[float, ...] = ()  # when the last two ended
        self._scraped = threading.Event()
        self._maxima_G, self._maxima = RollingMaximum(), RollingMaximum()
        self.host, self.port = host, port
        self._groups = groups
        self._run_info = dict(run_info or {})
        chosen = chosen_layers(groups.layers, max_layers)
        self._chosen = chosen
        self._shown = [g for g, (layer, _) in enumerate(groups.keys) if not layer or int(layer) in chosen]
        self._hidden = {
            part: [
                g
                for g, (layer, p) in enumerate(groups.keys)
                if layer and int(layer) not in chosen and p == part
            ]
            for part in groups.layer_groups
        }
        now, none = time.time(), np.zeros(len(groups), dtype=np.int64)
        parts = {part: 0 for _, part in groups.keys}
        self._totals_before = dict(totals_before or {})
        scalars = {series.key: 0.0 for series in STEP if series.kind == "counter"}
        self._snapshot = _Snapshot(
            scalars, None, none, parts, 0, 0, now, {}, {}, None, (started_at_step, now)
        )
        self._writing = threading.Lock()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory and CPU time of the training process

    def start(self) -> Exporter:
        """Listen; returns itself."""
        if not 0 <= self.port <= 65535:
            raise ValueError(f"monitor.port: {self.port} is not a port; choose one from 1 to 65535")
        try:
            self._server, self._thread = start_http_server(self.port, self.host, self.registry)
        except OSError as error:
            raise ValueError(_address_problem(self.host, self.port, error)) from None
        self.port = self._server.server_port
        return self

    def wait_for_scrape(self) -> None:
        """Return when the last numbers have been fetched, or are not going to be: an interval and a half after the last
        scrape, at once where nobody scrapes once a minute. To be called by a run that has finished."""
        self._scraped.clear()
        scrapes = self._scrapes
        if len(scrapes) < 2:
            return
        earlier, last = scrapes
        patience = 1.5 * (last - earlier)
        left = patience - (time.monotonic() - last)
        if patience <= LAST_SCRAPE_SECONDS and left > 0 and self._scraped.wait(left):
            time.sleep(_ANSWER_SECONDS)

    def close(self) -> None:
        """Stop listening and free the port; further calls do nothing."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            assert self._thread is not None
            self._thread.join()
            self._server = None

    def __enter__(self) -> Exporter:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, record: Mapping[str, Any], table: GroupTable, spikes: Spikes | None = None) -> None:
        """Show a finished training step: scalars by the keys of series.STEP, others are left alone."""
        with self._writing:
            last = self._snapshot
            scalars = {**last.scalars, **self._scalars(record)}
            scalars |= {f"global_{key}": value for key, value in table.global_norms.items()}
            peaks = [scalars.get(series.key.removesuffix("_max"), math.nan) for series in WINDOW]
            # Prometheus has no maximum of NaN, and a loss that is none has an alarm of its own.
            peaks_W = self._maxima.add(np.where(np.isnan(peaks), np.nan, peaks))
            scalars |= {series.key: float(peak) for series, peak in zip(WINDOW, peaks_W, strict=True)}
            skipped = scalars["skipped_steps_total"] > last.scalars["skipped_steps_total"]
            update_spikes_G = last.update_spikes_G
            if spikes is not None and len(spikes.updates):
                update_spikes_G = update_spikes_G.copy()
                update_spikes_G[spikes.updates] += 1
            self._snapshot = replace(
                last,
                scalars=scalars,
                table=table,
                update_spikes_G=update_spikes_G,
                direction_spikes=self._counted(last.direction_spikes, spikes),
                loss_spikes=last.loss_spikes + (spikes is not None and spikes.loss_factor is not None),
                update_ratio_max_G=self._maxima_G.add(table.update_ratio),
                skipped_in_a_row=last.skipped_in_a_row + 1 if skipped else 0,
                heartbeat=time.time(),
            )

    def _scalars(self, record: Mapping[str, Any]) -> dict[str, float]:
        """STEP, with counters from the start of the process, and POSITION, of the run."""
        before = self._totals_before
        found = {s.key: float(record[s.key]) - before.get(s.key, 0) for s in STEP if s.key in record}
        totals = {series.key: f"{series.key.removeprefix('run_')}_total" for series in POSITION}
        return found | {key: float(record[total]) for key, total in totals.items() if total in record}

    def _counted(self, before: Mapping[str, int], spikes: Spikes | None) -> Mapping[str, int]:
        found = {self._groups.keys[g][1] for g in spikes.directions} if spikes is not None else set()
        return {part: count + (part in found) for part, count in before.items()} if found else before

    def probe(self, record: Mapping[str, Any]) -> None:
        """Show a probe: scalars by the keys of series.PROBE, numbers by layer by those of PROBE_LAYERED."""
        new = {series.key: float(record[series.key]) for series in PROBE if series.key in record}
        layered = {series.key: tuple(record[series.key]) for series in PROBE_LAYERED if series.key in record}
        with self._writing:
            last = self._snapshot
            self._snapshot = replace(last, scalars={**last.scalars, **new}, probed=layered)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation: by the keys of series.EVALUATION and EVALUATION_BY, others are left alone."""
        new = {series.key: float(record[series.key]) for series in EVALUATION if series.key in record}
        by = {series.key: dict(record[series.key]) for series in EVALUATION_BY if series.key in record}
        with self._writing:
            last = self._snapshot
            self._snapshot = replace(last, scalars={**last.scalars, **new}, by=by, heartbeat=time.time())

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is complete on disk."""
        with self._writing:
            self._snapshot = replace(self._snapshot, checkpoint=(step, time.time()), heartbeat=time.time())

    def heartbeat(self) -> None:
        """Say that the loop is alive during something long that is not a step (evaluation, checkpoint)."""
        with self._writing:
            self._snapshot = replace(self._snapshot, heartbeat=time.time())

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client for every scrape."""
        now = self._snapshot
        for series in (*STEP, *POSITION, *PROBE, *EVALUATION, *GLOBAL, *WINDOW):
            if series.key in now.scalars:
                yield _family(series, [((), now.scalars[series.key])])
        yield _family(contract.LOSS_SPIKES, [((), now.loss_spikes)])
        yield _family(contract.UPDATE_SPIKES, self._spike_counts(now.update_spikes_G))
        counts = [((part,), count) for part, count in now.direction_spikes.items()]
        yield _family(contract.DIRECTION_SPIKES, counts)
        yield _family(contract.SKIPPED_IN_A_ROW, [((), now.skipped_in_a_row)])
        yield _family(contract.TOTAL_STEPS, [((), self._total_steps)])
        yield _family(contract.HEARTBEAT, [((), now.heartbeat)])
        info = tuple(str(self._run_info.get(label, "")) for label in contract.RUN_INFO.labels)
        yield _family(contract.RUN_INFO, [(info, 1)])
        for series in PROBE_LAYERED:
            values = enumerate(now.probed.get(series.key, ()))
            yield _family(series, [((str(layer),), x) for layer, x in values if layer in self._chosen])
        for series in EVALUATION_BY:
            yield _family(series, [((label,), x) for label, x in now.by.get(series.key, {}).items()])
        yield from self._storage(now.checkpoint)
        yield from self._ranks()
        if now.table is not None:
            yield from self._layers(now.table)
        if now.update_ratio_max_G is not None:
            rows = [(self._groups.keys[g], now.update_ratio_max_G[g]) for g in self._shown]
            yield _family(contract.WINDOW_LAYERED, rows)
        self._scrapes = (*self._scrapes[-1:], time.monotonic())
        self._scraped.set()

    def _storage(self, checkpoint: tuple[int, float]) -> Iterator[Metric]:
        values = [checkpoint[0], self._checkpoint_every_steps, checkpoint[1], math.nan, math.nan]
        with contextlib.suppress(OSError):  # a disk that is away is no reason to say nothing of the rest
            disk = shutil.disk_usage(self._folder)
            values[3:] = [disk.free / disk.total, disk.free]
        for series, value in zip(contract.STORAGE, values, strict=True):
            if not math.isnan(value):
                yield _family(series, [((), value)])

    def _ranks(self) -> Iterator[Metric]:
        known = self.board.states if self.board is not None else {}
        states = {rank: known[rank] for rank in sorted(_conspicuous(known))}
        for series in contract.RANK:
            name = _RANK_FIELDS.get(series.key) or series.key.removeprefix("rank_")
            yield _family(series, [((str(rank),), getattr(states[rank], name)) for rank in states])

    def _layers(self, table: GroupTable) -> Iterator[Metric]:
        for series in LAYERED:
            values = getattr(table, series.key)
            yield _family(series, [(self._groups.keys[g], values[g]) for g in self._shown])
        sizes = [(self._groups.keys[g], self._groups.numel_G[g]) for g in self._shown]
        yield _family(contract.PARAMETERS, sizes)
        parts = list(self._groups.layer_groups)
        for series, layered in zip(OVER_DEPTH, (*LAYERED, contract.PER_RATE), strict=True):
            depths = {part: table.over_depth(layered.key, part, QUANTILES) for part in parts}
            rows = [
                ((part, f"{quantile:g}"), value)
                for part, values in depths.items()
                for quantile, value in zip(QUANTILES, values, strict=True)
            ]
            yield _family(series, rows)
        yield _family(contract.DEPTH_SLOPE, [((part,), table.depth_slope(part)) for part in parts])
        yield _family(contract.DEAD_LAYERS, [((part,), table.dead_layers(part)) for part in parts])

    def _spike_counts(self, counts_G: np.ndarray) -> list[tuple[tuple[str, ...], float]]:
        rows: list[tuple[tuple[str, ...], float]] = [(self._groups.keys[g], counts_G[g]) for g in self._shown]
        return rows + [
            ((OTHER, part), counts_G[hidden].sum()) for part, hidden in self._hidden.items() if hidden
        ]


def chosen_layers(layers: int, max_layers: int) -> set[int]:
    """Layers with series of their own: all, or `max_layers` of them evenly from the first to the last."""
    if layers <= max_layers:
        return set(range(layers))
    return {round(x) for x in np.linspace(0, layers - 1, max(0, max_layers))}


def series_count(
    groups: TensorGroups, max_layers: int = MAX_LAYERS, optimizer_columns: int = 0, probed: int = 0
) -> int:
    """Time series that a run of this model adds to a Prometheus, without `process_*`, ranks, and evaluation by
    length and source. `optimizer_columns` is how many of statistics.OPTIMIZER_COLUMNS its optimizer has, `probed` how
    many of series.PROBE_LAYERED its model."""
    chosen = chosen_layers(groups.layers, max_layers)
    shown = sum(1 for layer, _ in groups.keys if not layer or int(layer) in chosen)
    parts = len(groups.layer_groups)
    hidden = parts if groups.layers > max_layers else 0
    all_parts = len({part for _, part in groups.keys})
    single = all_parts + len((*STEP, *POSITION, *PROBE, *EVALUATION, *GLOBAL, *WINDOW, *contract.STORAGE)) + 5
    columns = 4 + optimizer_columns
    quantiles = parts * ((columns + 1) * len(QUANTILES) + 2)  # with the ratio per rate; slope and dead layers
    return single + (columns + 3) * shown + hidden + quantiles + probed * len(chosen)


def _conspicuous(states: Mapping[int, RankState], limit: int = MAX_RANKS) -> set[int]:
    """The ranks to show: all, or of many the first, the furthest behind and the slowest."""
    if len(states) <= limit:
        return set(states)
    behind = sorted(states, key=lambda rank: (states[rank].progress, states[rank].time))
    slowest = sorted(states, key=lambda rank: -states[rank].forward_seconds)
    return {0, *behind[: limit // 2], *slowest[: limit // 2 - 1]}


def _family(series: Series, rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """One metric family; labelled values that are NaN (not measured) are left out."""
    kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family = kind(
        series.name, series.help + (f" [{series.unit}]" if series.unit else ""), labels=series.labels
    )
    for labels, value in rows:
        if not series.labels or not math.isnan(value):
            family.add_metric(labels, float(value))
    return family


def _address_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"monitor.port: {port} on {host} is in use; choose another, e.g. --monitor.port={port + 1}"
    if error.errno == errno.EACCES:
        return f"monitor.port: {port} needs root; choose a port from 1024 up"
    return f"monitor.host: cannot listen on {host!r} ({error}); choose one of this machine, e.g. 127.0.0.1"

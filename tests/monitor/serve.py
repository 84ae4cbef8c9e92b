"""Serves a made-up run on /metrics until stdin closes: `python -m tests.monitor.serve LAYERS`."""

from __future__ import annotations

import itertools
import sys
import threading
import time

from sutrain.monitor.exporter import Exporter
from sutrain.monitor.spikes import SpikeWatch
from tests.monitor.made_up import groups_of, made_up_run, probe_of

STEPS = 1200


def main() -> None:
    layers = int(sys.argv[1])
    groups = groups_of(layers)
    watch, stop = SpikeWatch(groups), threading.Event()
    run = made_up_run(
        layers=layers, steps=STEPS, evaluate_every_steps=20, spike_at=tuple(range(100, STEPS, 60))
    )
    info = {"run": "made-up", "mfu_reference": "a made-up reference"}
    with Exporter("127.0.0.1", 0, groups, info, total_steps=STEPS) as exporter:
        print(exporter.port, flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        for record, table, evaluation in itertools.chain(run):
            exporter.step(record, table, watch.judge(record["loss"], record["learning_rate"], table))
            if evaluation:
                exporter.evaluation(evaluation)
                exporter.probe(probe_of(layers))
            if stop.wait(0.05):
                return
        while not stop.wait(0.5):
            exporter.heartbeat()
            time.sleep(0.01)


if __name__ == "__main__":
    main()

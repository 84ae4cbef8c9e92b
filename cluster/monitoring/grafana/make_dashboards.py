"""Writes dashboards/*.json.  Run after every change; a test compares the files with what this makes.

    python cluster/monitoring/grafana/make_dashboards.py

Needs grafana-foundation-sdk.  A row is a question, its panels are the answer; panels.py has their kinds.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path

from board_data_preparation import data_preparation
from board_depth import depth
from board_optimizer import optimizer
from board_overview import overview
from board_throughput import throughput
from panels import page

FOLDER = Path(__file__).parent / "dashboards"


def texts() -> dict[str, str]:
    """The dashboards by file name."""
    run = "sutrain_step"
    return {
        "overview.json": page(
            "sutrain-overview", "run overview", "Progress, learning and stability of runs.", overview(), run
        ),
        "depth.json": page(
            "sutrain-depth", "depth heat-maps", "Layers over time: how far they move and what they do.",
            depth(), run, part=True,
        ),
        "optimizer.json": page(
            "sutrain-optimizer", "optimizer", "What the optimizer does to gradients to make updates of them.",
            optimizer(), run, part=True,
        ),
        "throughput.json": page(
            "sutrain-throughput", "throughput and data", "Speed, ranks, waiting for data.", throughput(), run
        ),
        "data_preparation.json": page(
            "sutrain-data-preparation", "data preparation", "From raw text to shards.", data_preparation(),
            "data_prep_stage_share_ratio",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)

"""The pictures of what probes saw: the change of the function, logits, and layers over time."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .log import RunLog
from .pictures import STEPS, STYLE, axes_of, colour_of

# Scalars and numbers by layer of the probes that the report draws: title and unit.
PROBED = {
    "model_update": ("Change of the function by one update", "RMS (log)"),
    "logit_rms": ("Scale of the logits", "RMS"),
    "logit_max": ("Largest logit", "above the mean"),
}
PROBED_BY_LAYER = {
    "attention_entropy": ("attention entropy", "nats"),
    "activation_rms": ("activation RMS", ""),
    "relative_change": ("relative change by the layer", ""),
    "dead_units_share": ("share of dead units", ""),
}


def probe_curves(runs: Mapping[str, RunLog]) -> Figure | None:
    """What probes say of the whole model, runs over one another; None if no run was probed."""
    if not any(run.probes for run in runs.values()):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        for place, (key, (title, unit)) in enumerate(PROBED.items(), 1):
            axes = axes_of(figure, (1, len(PROBED), place), title, unit)
            for number, (name, run) in enumerate(runs.items()):
                x, y = run.series(key, "probes")
                axes.plot(x, y, "o-", color=colour_of(number), markersize=2.5, linewidth=1.2, label=name)
                noise = run.series("model_update_noise", "probes")[1]
                if key == "model_update" and len(noise):
                    axes.axhline(noise[-1], color=colour_of(number), ls="--", lw=0.8)
            if key == "model_update" and any(
                (run.series(key, "probes")[1] > 0).any() for run in runs.values()
            ):
                axes.set_yscale("log")
        if len(runs) > 1:
            figure.axes[0].legend()
    return figure


def probe_maps(run: RunLog) -> Figure | None:
    """Layer x time of what probes say of every layer; None if the run was probed less than twice."""
    found = {}
    for key, (title, unit) in PROBED_BY_LAYER.items():
        rows = [(line["step"], line[key]) for line in run.probes if isinstance(line.get(key), list)]
        if len(rows) > 1:
            found[f"{title}, {unit}" if unit else title] = rows
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        for axes, (title, rows) in zip(
            figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
        ):
            steps = np.array([step for step, _ in rows], dtype=np.float64)
            values = np.array([numbers for _, numbers in rows], dtype=np.float64).T
            between = (steps[1:] + steps[:-1]) / 2
            edges = np.concatenate([[2 * steps[0] - between[0]], between, [2 * steps[-1] - between[-1]]])
            layers = np.arange(len(values) + 1) - 0.5
            image = axes.pcolormesh(edges, layers, values, cmap="viridis", rasterized=True)
            axes.grid(False)
            axes.set_title(title)
            axes.set_xlabel(STEPS)
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            figure.colorbar(image, ax=axes).outline.set_visible(False)  # type: ignore[operator]
        figure.axes[0].set_ylabel("layer")
    return figure

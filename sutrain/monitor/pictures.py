"""The pictures of the report, as matplotlib figures without any global state (no pyplot).

Long runs are thinned for drawing, never by picking points: a curve becomes the median of its bins with the
band from their minimum to their maximum, so that no spike is lost; a heat-map cell is the geometric mean of
what falls into it.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from .log import RunLog
from .statistics import PARTS

COLOURS = ("#2563eb", "#d9480f", "#0f8a6a", "#8b3fd1", "#a16207", "#be185d", "#0e7490", "#4d5562")
INK, FAINT = "#1c2430", "#c9d0da"
MAX_POINTS, MAX_CELLS = 600, 400
STEPS = "optimizer updates"
TITLES = {
    "update_ratio": "update norm ÷ weight norm",
    "relative": "update ÷ weight over median",
    "update_norm": "update norm",
    "grad_norm": "gradient norm",
}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ebf0",
    "xtick.color": "#4d5562",
    "ytick.color": "#4d5562",
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "sutrain",  # ids in the SVG do not change from call to call
}


def colour_of(number: int) -> str:
    """The colour of the run with this number, in every picture and table."""
    return COLOURS[number % len(COLOURS)]


def data_uri(figure: Figure) -> str:
    """A figure as an inline SVG image."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=130, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def thinned(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, ...]:
    """(x, median, minimum, maximum) in at most `points` bins of equally many values; NaN is left out."""
    good = np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) <= points:
        return x, y, y, y
    bins = [b for b in np.array_split(np.arange(len(x)), points) if len(b)]
    return tuple(
        np.array([reduce(values[b]) for b in bins])
        for reduce, values in ((np.mean, x), (np.median, y), (np.min, y), (np.max, y))
    )


def smoothed(y: np.ndarray) -> np.ndarray:
    """Centred rolling median over a fortieth of the curve, for the eye."""
    half = max(1, len(y) // 80)
    return np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str | None, faint: float) -> None:
    x, middle, low, high = thinned(x, y)
    if not len(x):
        return
    if (high > low).any():
        axes.fill_between(x, low, high, color=colour, alpha=faint, linewidth=0)
    else:
        axes.plot(x, middle, color=colour, alpha=faint, linewidth=0.8)
    axes.plot(x, smoothed(middle), color=colour, linewidth=1.8, label=label)


def axes_of(figure: Figure, where: Any, title: str, unit: str) -> Axes:
    axes = figure.add_subplot(*where) if isinstance(where, tuple) else figure.add_subplot(where)
    axes.set_title(title)
    axes.set_xlabel(STEPS)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    return axes


def loss_curves(axes: Axes, runs: Mapping[str, RunLog]) -> None:
    """Training loss (faint: every step; strong: smoothed) and validation loss (points)."""
    for number, (name, run) in enumerate(runs.items()):
        _curve(axes, *run.series("loss"), colour_of(number), name if len(runs) > 1 else "training", 0.3)
        x, y = run.series("validation_loss", "evaluations")
        label = "validation" if number == 0 else None
        axes.plot(x, y, "o-", color=colour_of(number), mfc="white", markersize=4, linewidth=0.8, label=label)
    axes.legend()


def accuracy_curves(axes: Axes, runs: Mapping[str, RunLog]) -> None:
    """Validation accuracy over the baseline that knows nothing but token frequencies."""
    top = 0.0
    for number, (name, run) in enumerate(runs.items()):
        x, y = run.series("validation_accuracy", "evaluations")
        axes.plot(x, y, "o-", color=colour_of(number), markersize=4, linewidth=1.8, label=name)
        top = max([top, *y])
        _, floor = run.series("unigram_accuracy", "evaluations")
        if len(floor):
            axes.axhline(floor[-1], color=colour_of(number) if len(runs) > 1 else "#4d5562", ls="--", lw=1)
            if number == 0:
                place = axes.get_yaxis_transform()
                axes.annotate(
                    "unigram baseline", (0.99, floor[-1]), (0, 3), xycoords=place, textcoords="offset points",
                    ha="right", fontsize="small", color="#4d5562",
                )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.06 else 1))
    axes.set_ylim(bottom=0)
    if top == 0:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color="#8a94a3")
    elif len(runs) > 1:
        axes.legend(loc="upper left")


def _plain(axes: Axes, runs: Mapping[str, RunLog], key: str, log: bool = False) -> None:
    for number, (name, run) in enumerate(runs.items()):
        x, y = run.series(key)
        _curve(axes, x, np.where(y > 0, y, np.nan) if log else y, colour_of(number), name, 0.3)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend()


def _spike_marks(axes: Axes, run: RunLog) -> None:
    """A short mark at the foot for every step with an update spike, a long one for a spike of the loss."""
    for key, height, colour in (("update_spikes", 0.06, "#d9480f"), ("loss_spike", 0.14, "#b91c1c")):
        for line in run.steps:
            if key in line:
                axes.axvline(line["step"], ymax=height, color=colour, linewidth=1.1)


def curves(runs: Mapping[str, RunLog]) -> Figure:
    """Loss, accuracy, learning rate, throughput, gradient and update norm; runs over one another."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 10), layout="constrained")
        grid = figure.add_gridspec(3, 2)
        loss_curves(axes_of(figure, grid[0, 0], "Loss", "nats per predicted token"), runs)
        accuracy_curves(
            axes_of(figure, grid[0, 1], "Validation accuracy", "share right of what is not shown"), runs
        )
        axes = axes_of(figure, grid[1, 0], "Learning rate", "learning rate")
        _plain(axes, runs, "learning_rate")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes = axes_of(figure, grid[1, 1], "Throughput", "tokens/s, all ranks")
        _plain(axes, runs, "tokens_per_second")
        axes.yaxis.set_major_formatter(THOUSANDS)
        axes = axes_of(figure, grid[2, 0], "Gradient norm, whole model", "L2 norm (log)")
        _plain(axes, runs, "grad_norm", log=True)
        axes = axes_of(figure, grid[2, 1], "Update norm, whole model", "L2 norm (log)")
        _plain(axes, runs, "update_norm", log=True)
        if len(runs) == 1:
            for axes in figure.axes[-2:]:
                _spike_marks(axes, next(iter(runs.values())))
    return figure


def parts_of(run: RunLog) -> list[str]:
    """The parts that the layers of a run have, in reading order."""
    return [part for part in PARTS if len(run.heat_map("update_norm", part)[1])]


def in_blocks(values: np.ndarray, edges: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means over equal runs of columns, at most `cells` of them, and the edges of what is left.

    `values` [Y, X] with X + 1 `edges`; NaN and zeros are left out of the means.
    """
    width = -(-values.shape[1] // cells)
    if width == 1:
        return values, edges
    starts = np.arange(0, values.shape[1], width)
    logs = np.log(np.where(values > 0, values, np.nan))
    known = np.add.reduceat(np.isfinite(logs), starts, axis=1)
    total = np.add.reduceat(np.nan_to_num(logs), starts, axis=1)
    means = np.divide(total, known, out=np.full(total.shape, np.nan), where=known > 0)
    return np.exp(means), np.append(edges[starts], edges[-1])


def _heat(
    axes: Axes, run: RunLog, column: str, part: str, scale: Normalize, colours: str = "viridis"
) -> object:
    steps, layers, values = _map(run, column, part)
    step_edges = np.append(
        np.append(1.5 * steps[0] - 0.5 * steps[1], (steps[1:] + steps[:-1]) / 2), steps[-1] + 0.5
    )
    layer_edges = np.append(layers - 0.5, layers[-1] + 0.5)
    values, step_edges = in_blocks(values, step_edges, MAX_CELLS)
    values, layer_edges = in_blocks(values.T, layer_edges, MAX_CELLS)
    image = axes.pcolormesh(step_edges, layer_edges, values.T, norm=scale, cmap=colours, rasterized=True)
    axes.set_facecolor(FAINT)  # what is not known
    axes.grid(False)
    axes.set_title(part.replace("_", "-"))
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    return image


def _map(run: RunLog, column: str, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run's heat map; of "relative" every value of update_ratio over the median layer of the same step."""
    if column != "relative":
        return run.heat_map(column, part)
    steps, layers, values = run.heat_map("update_ratio", part)
    known = np.where(values > 0, values, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step on which nothing is known stays NaN
        return steps, layers, known / np.nanmedian(known, axis=0)


def colour_scale(runs: Iterable[RunLog], column: str, parts: Iterable[str] | None = None) -> Normalize | None:
    """One scale for all runs and parts (or some), or None if there is nothing to draw.

    It spans the 0.5 to 99.5 percentiles, so that a single spike does not bleach the rest; "relative" is
    symmetrical about 1 and reaches at least from 1/1.2 to 1.2.
    """
    maps = [
        _map(run, column, part)[2].ravel()
        for run in runs
        if len(run.tables.steps) > 1
        for part in (parts_of(run) if parts is None else parts)
    ]
    values = np.concatenate(maps) if maps else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return None
    low, high = np.quantile(values, (0.005, 0.995))
    if column == "relative":
        high = max(high, 1 / low, 1.2)
        return LogNorm(1 / high, high)
    return LogNorm(low, high) if high > low * 1.0001 else LogNorm(low / 2, high * 2)


def heat_maps(run: RunLog, column: str, scale: Normalize) -> Figure | None:
    """Layer x time pictures of one column, a panel for each part of the layers, all on one colour scale.

    None for a run with no layers or fewer than two tables.
    """
    parts = parts_of(run)
    if not parts or len(run.tables.steps) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, part in zip(panels, parts, strict=True):
            image = _heat(axes, run, column, part, scale, "RdBu_r" if column == "relative" else "viridis")
            axes.set_xlabel(STEPS)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panels[0].set_ylabel("layer (0 reads the input)")
        _colour_bar(figure, image, list(panels), TITLES[column])
    return figure


def _colour_bar(figure: Figure, image: object, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=panels, label=f"{label} (log)", pad=0.01)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]


def outside_layers(run: RunLog) -> Figure | None:
    """Curves of embeddings, head and final norm, which no heat map shows; None if no table was written."""
    tables = run.tables
    if not len(tables.steps):
        return None
    groups = [g for g, layer in enumerate(tables.layer) if not layer]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        columns = ("update_ratio", "grad_norm", "update_norm")
        for axes, column in zip(figure.subplots(1, 3), columns, strict=True):
            for number, (g, y) in enumerate(zip(groups, tables.rows(column, groups), strict=True)):
                y = np.where(y > 0, y, np.nan)
                _curve(axes, tables.steps, y, colour_of(number), tables.part[g], 0.3)
            axes.set_yscale("log")
            axes.set_title(TITLES[column])
            axes.set_xlabel(STEPS)
            axes.xaxis.set_major_formatter(THOUSANDS)
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend()
    return figure


def summary(name: str, run: RunLog, headline: str) -> Figure:
    """One picture of a run for a page that has room for one: curves left, layers over time right."""
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(13, 6.6), layout="constrained", facecolor="white")
        figure.suptitle(f"{name}: {headline}", x=0.012, ha="left", fontsize=13, fontweight="bold")
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.35))
        loss_curves(axes_of(figure, grid[0, 0], "Loss", "nats per predicted token"), {name: run})
        accuracy_curves(axes_of(figure, grid[1, 0], "Validation accuracy", "share right"), {name: run})
        maps = (
            ("update_ratio", "How far each layer moves", "viridis"),
            ("grad_norm", "What the loss asks of each layer", "magma"),
        )
        for row, (column, title, colours) in enumerate(maps):
            parts = parts_of(run)[:1]
            scale = colour_scale([run], column, parts)
            if scale is None:
                continue
            (part,) = parts
            axes = figure.add_subplot(grid[row, 1])
            image = _heat(axes, run, column, part, scale, colours)
            axes.set_title(f"{title}: {part.replace('_', '-')}")
            axes.set_xlabel(STEPS)
            axes.set_ylabel("layer")
            _colour_bar(figure, image, [axes], TITLES[column])
    return figure

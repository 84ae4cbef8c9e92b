"""Writes dashboards/training.json.  Run after every change; a test compares the file with what this makes.

    python cluster/monitoring/grafana/make_dashboards.py

Needs grafana-foundation-sdk.  A row is a question about the run, its panels are the answer; every panel has
a unit and says what to look for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models

OUTPUT = Path(__file__).parent / "dashboards" / "training.json"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = 'instance=~"$instance"'
PART = 'part="$part"'
LOG = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)


def query(expression: str, legend: str = "{{instance}}") -> prometheus.Dataquery:
    """A range query on the chosen data source."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).range().datasource(SOURCE)


def curve(
    title: str,
    description: str,
    unit: str,
    *queries: prometheus.Dataquery,
    logarithmic: bool = False,
    width: int = 8,
) -> timeseries.Panel:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(SOURCE)
        .height(8)
        .span(width)
        .line_width(1)
        .fill_opacity(0)
        .show_points(common_models.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if logarithmic:
        panel.scale_distribution(LOG)
    for number, one in enumerate(queries):
        panel.with_target(one.ref_id(chr(ord("A") + number)))
    return panel


def figure(title: str, description: str, unit: str, expression: str, decimals: int = 0) -> stat.Panel:
    """One number."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .decimals(decimals)
        .datasource(SOURCE)
        .height(4)
        .span(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(common_models.BigValueColorMode.NONE)
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .with_target(query(expression).ref_id("A"))
    )


def by_layer(column: str) -> str:
    """One series a layer of the chosen part; numbers are padded ("007"), because rows are sorted as text."""
    padded = f'{column}{{{RUN}, {PART}, layer=~"[0-9]+"}}'
    for digits in ("[0-9]", "[0-9]{1,2}", "[0-9]{1,3}"):
        padded = f'label_replace({padded}, "layer", "0$1", "layer", "({digits})")'
    return f"max by (layer) ({padded})"


def layers(title: str, description: str, column: str) -> heatmap.Panel:
    """Layer x time."""
    colour = (
        heatmap.HeatmapColorOptions()
        .mode(heatmap_models.HeatmapColorMode.SCHEME)
        .scheme("Viridis")
        .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.4)
        .steps(64)
        .reverse(False)
    )
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .height(10)
        .span(12)
        .calculate(False)
        .color(colour)
        .cell_gap(0)
        .cell_values(heatmap.CellValues().unit("short").decimals(5))
        .y_axis(heatmap.YAxisConfig().axis_label("layer").unit("short"))
        .unit("short")
        .with_target(query(by_layer(column), "{{layer}}").ref_id("A"))
    )


def quantiles(column: str) -> str:
    return f"{column}_over_depth{{{RUN}, {PART}}}"


def rows() -> list[tuple[str, list[Callable]]]:
    """(question, panels)"""
    return [
        (
            "How does it stand?",
            [
                figure("Updates", "Optimizer updates done.", "locale", f"sutrain_step{{{RUN}}}"),
                figure("Tokens", "Training tokens consumed.", "short", f"sutrain_tokens_total{{{RUN}}}", 2),
                figure(
                    "Loss",
                    "Training loss of the last step, nats per predicted token.",
                    "none",
                    f"sutrain_loss{{{RUN}}}",
                    3,
                ),
                figure(
                    "Validation accuracy",
                    "Masked tokens of the validation split predicted right.",
                    "percentunit",
                    f"sutrain_validation_accuracy{{{RUN}}}",
                    1,
                ),
                figure(
                    "Throughput",
                    "Tokens per second over all ranks.",
                    "locale",
                    f"sutrain_tokens_per_second{{{RUN}}}",
                ),
                figure(
                    "Last sign of life",
                    "Time since the loop finished a step or evaluation. Alarm: 10 minutes.",
                    "s",
                    f"sutrain:heartbeat_age_seconds{{{RUN}}}",
                ),
            ],
        ),
        (
            "Does it learn?",
            [
                curve(
                    "Loss",
                    "Nats per predicted token. Validation should follow training down; a gap that grows is "
                    "memorising.",
                    "none",
                    query(f"sutrain_loss{{{RUN}}}", "training {{instance}}"),
                    query(f"sutrain_validation_loss{{{RUN}}}", "validation {{instance}}"),
                ),
                curve(
                    "Validation accuracy",
                    "Above the unigram baseline the model knows more than how frequent each token is.",
                    "percentunit",
                    query(f"sutrain_validation_accuracy{{{RUN}}}", "model {{instance}}"),
                    query(f"sutrain_unigram_accuracy{{{RUN}}}", "unigram baseline {{instance}}"),
                ),
                curve(
                    "Learning rate",
                    "As the schedule has it.",
                    "sci",
                    query(f"sutrain_learning_rate{{{RUN}}}"),
                ),
            ],
        ),
        (
            "How far does each layer move? ($part)",
            [
                layers(
                    "Update ÷ weight by layer",
                    "Bright rows are rewritten, dark rows stand still; a bright column "
                    "is a step on which everything jumped.",
                    "sutrain_update_ratio",
                ),
                layers(
                    "Gradient norm by layer",
                    "Vanishing or exploding gradients show as a gradient of colour over depth.",
                    "sutrain_grad_norm",
                ),
                curve(
                    "Update ÷ weight over depth",
                    "Quantiles over ALL layers of the part (0 = least, 1 = most). "
                    "Lines that fan out mean that some layers run away from the others.",
                    "sci",
                    query(quantiles("sutrain_update_ratio"), "{{quantile}} {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Update norm over depth",
                    "As left, absolute. It jumps before the loss does.",
                    "sci",
                    query(quantiles("sutrain_update_norm"), "{{quantile}} {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Slope over depth",
                    "Slope of log update norm against log depth. Near 0: even. Rising towards "
                    "1: the update grows with depth, what DeepNorm is there to prevent.",
                    "none",
                    query(f"sutrain_update_depth_slope{{{RUN}}}", "{{part}} {{instance}}"),
                ),
                curve(
                    "Change of the function",
                    "RMS change of the encoder's output by one update, on a fixed batch, computed in fp32 every "
                    "monitor.probe_every_steps updates. What DeepNet bounds; it should not grow.",
                    "sci",
                    query(f"sutrain_model_update{{{RUN}}}", "{{instance}}"),
                    width=12,
                    logarithmic=True,
                ),
                curve(
                    "Attention entropy by layer",
                    "Mean entropy of a query's attention in nats, on the same batch. Near 0: attention has "
                    "collapsed onto single tokens. Near the log of the document's length: it looks at nothing.",
                    "none",
                    query(f"sutrain_attention_entropy{{{RUN}}}", "layer {{layer}} {{instance}}"),
                    width=12,
                ),
                curve(
                    "Gradient norm over depth",
                    "Quantiles over all layers of the part.",
                    "sci",
                    query(quantiles("sutrain_grad_norm"), "{{quantile}} {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Weight norm over depth",
                    "Should grow slowly or settle; steady fast growth means too little "
                    "weight decay or too high a rate.",
                    "sci",
                    query(quantiles("sutrain_weight_norm"), "{{quantile}} {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Weights outside the layers",
                    "Update ÷ weight of embeddings, head and final norm.",
                    "sci",
                    query(f'sutrain_update_ratio{{{RUN}, layer=""}}', "{{part}} {{instance}}"),
                    logarithmic=True,
                ),
            ],
        ),
        (
            "Is it stable?",
            [
                curve(
                    "Spikes in 5 minutes",
                    "Judged by the run on every step against its own history. Updates first, "
                    "loss after, is the usual order.",
                    "short",
                    query(
                        f"sum by (instance, part) (sutrain:update_spikes:increase5m{{{RUN}}})",
                        "updates {{part}} {{instance}}",
                    ),
                    query(f"sutrain:loss_spikes:increase5m{{{RUN}}}", "loss {{instance}}"),
                ),
                curve(
                    "Whole-model norms",
                    "Gradient before clipping, and what was truly added to the weights.",
                    "sci",
                    query(f"sutrain_global_grad_norm{{{RUN}}}", "gradient {{instance}}"),
                    query(f"sutrain_global_update_norm{{{RUN}}}", "update {{instance}}"),
                    query(f"sutrain_global_weight_norm{{{RUN}}}", "weights {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Skipped updates and loss scale",
                    "Skips in a row are the alarm: 5. A loss scale that keeps halving means the same.",
                    "short",
                    query(f"sutrain_skipped_steps_in_a_row{{{RUN}}}", "skipped in a row {{instance}}"),
                    query(f"sutrain_skipped_steps_total{{{RUN}}}", "skipped in all {{instance}}"),
                    query(f"sutrain_loss_scale{{{RUN}}}", "loss scale {{instance}}"),
                ),
            ],
        ),
        (
            "Is it fast?",
            [
                curve(
                    "Tokens per second",
                    "Over all ranks, with the median of the last 30 minutes; the alarm is at 0.7 of it.",
                    "short",
                    query(f"sutrain_tokens_per_second{{{RUN}}}", "last step {{instance}}"),
                    query(f"sutrain:tokens_per_second:median30m{{{RUN}}}", "median {{instance}}"),
                ),
                curve(
                    "Model FLOP/s utilisation",
                    "Relative to the reference in the legend: a vendor's dense bf16 "
                    "rate, or a matrix product measured on this machine.",
                    "percentunit",
                    query(
                        f"sutrain_mfu_ratio{{{RUN}}} * on (instance) group_left (mfu_reference) "
                        f"sutrain_run_info",
                        "{{instance}} of {{mfu_reference}}",
                    ),
                ),
                curve(
                    "Time of a step",
                    "The difference between the two is computing and communicating.",
                    "s",
                    query(f"sutrain_step_seconds{{{RUN}}}", "step {{instance}}"),
                    query(f"sutrain_data_wait_seconds{{{RUN}}}", "waiting for data {{instance}}"),
                ),
                curve(
                    "Share of time waiting for data",
                    "Above a few percent the devices idle. Alarm: 20 %.",
                    "percentunit",
                    query(f"sutrain:data_wait_share{{{RUN}}}"),
                    width=12,
                ),
                curve(
                    "Memory of the logging process",
                    "Host memory of rank 0. A steady climb is a leak.",
                    "bytes",
                    query(f"process_resident_memory_bytes{{{RUN}}}"),
                    width=12,
                ),
            ],
        ),
    ]


def training() -> dashboard.Dashboard:
    """The dashboard of one or several runs."""
    page = (
        dashboard.Dashboard("sutrain: training")
        .uid("sutrain-training")
        .description("A pretraining run: progress, learning, layers, stability and speed.")
        .tags(["sutrain"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(
            _labels("instance", "run", "label_values(sutrain_step, instance)").multi(True).include_all(True)
        )
        .with_variable(_labels("part", "part", 'label_values(sutrain_update_norm{layer!=""}, part)'))
    )
    number = 0
    for title, panels in rows():
        page.with_row(dashboard.Row(title).id(number := number + 1))
        for panel in panels:
            page.with_panel(panel.id(number := number + 1))
    return page


def _labels(name: str, label: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(values).datasource(SOURCE)
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(
        models.VariableSort.ALPHABETICAL_ASC
    )


def text() -> str:
    """The dashboard as JSON."""
    encoded = json.loads(JSONEncoder().encode(training().build()))
    # The SDK writes fields that Grafana's own schema does not have.
    encoded.pop("style", None)
    for variable in encoded["templating"]["list"]:
        for key in [key for key in variable if key == "id" or key.startswith("auto")]:
            del variable[key]
    return json.dumps(encoded, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
    print(OUTPUT)

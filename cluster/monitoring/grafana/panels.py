"""The kinds of panels that the dashboards are made of, and the pages they stand on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models

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


def by_layer(column: str, part: str = PART) -> str:
    """One series a layer of the chosen part; numbers are padded ("007"), because rows are sorted as text."""
    chosen = ", ".join(filter(None, (RUN, part, 'layer=~"[0-9]+"')))
    padded = f"{column}{{{chosen}}}"
    for digits in ("[0-9]", "[0-9]{1,2}", "[0-9]{1,3}"):
        padded = f'label_replace({padded}, "layer", "0$1", "layer", "({digits})")'
    return f"max by (layer) ({padded})"


def layers(title: str, description: str, column: str, unit: str = "short", part: str = PART) -> heatmap.Panel:
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
        .cell_values(heatmap.CellValues().unit(unit).decimals(5))
        .y_axis(heatmap.YAxisConfig().axis_label("layer").unit("short"))
        .unit(unit)
        .with_target(query(by_layer(column, part), "{{layer}}").ref_id("A"))
    )


def quantiles(column: str) -> str:
    return f"{column}_over_depth{{{RUN}, {PART}}}"


Rows = Sequence[tuple[str, Sequence[Callable]]]


def page(uid: str, title: str, description: str, rows: Rows, instance_of: str, part: bool = False) -> str:
    """A dashboard as JSON. `instance_of` is a series that every run has; `part` adds the choice of a part."""
    board = (
        dashboard.Dashboard(f"sutrain: {title}")
        .uid(uid)
        .description(description)
        .tags(["sutrain"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("other dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["sutrain"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(
            _labels("instance", "run", f"label_values({instance_of}, instance)").multi(True).include_all(True)
        )
    )
    if part:
        board.with_variable(_labels("part", "part", 'label_values(sutrain_update_norm{layer!=""}, part)'))
    number = 0
    for question, panels in rows:
        board.with_row(dashboard.Row(question).id(number := number + 1))
        for panel in panels:
            board.with_panel(panel.id(number := number + 1))
    encoded = json.loads(JSONEncoder().encode(board.build()))
    # The SDK writes fields that Grafana's own schema does not have.
    encoded.pop("style", None)
    for panel in encoded["panels"]:
        tooltip = panel.get("options", {}).get("tooltip", {})
        if tooltip.pop("show", False):
            tooltip["mode"] = "single"
    for variable in encoded["templating"]["list"]:
        for key in [key for key in variable if key == "id" or key.startswith("auto")]:
            del variable[key]
    return json.dumps(encoded, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _labels(name: str, label: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(values).datasource(SOURCE)
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(
        models.VariableSort.ALPHABETICAL_ASC
    )

"""Data preparation: from raw text to shards."""

from __future__ import annotations

from panels import RUN, Rows, curve, figure, query


def data_preparation() -> Rows:
    """(question, panels) of each row."""
    return [
        (
            "How far is it?",
            [
                figure(
                    "Stage done", "Share of the current stage.", "percentunit",
                    f"max by (stage) (data_prep_stage_share_ratio{{{RUN}}})",
                ),
                figure(
                    "Written", "Records that went into the output.", "locale",
                    f'sum(data_prep_records_total{{{RUN}, outcome="written"}})',
                ),
                figure(
                    "Quarantined", "Share of records that could not be read. Alarm: 1 %.", "percentunit",
                    f"max(data_prep:lost_share{{{RUN}}})", 2,
                ),
                figure(
                    "Last sign of life", "Alarm: 5 minutes, unless finished.", "s",
                    f"max(data_prep:heartbeat_age_seconds{{{RUN}}})",
                ),
            ],
        ),
        (
            "Is it moving?",
            [
                curve(
                    "Share of the stage done", "A stage after the other from 0 to 1.", "percentunit",
                    query(f"data_prep_stage_share_ratio{{{RUN}}}", "{{stage}} {{instance}}"),
                ),
                curve(
                    "Work done", "Of the current stage, in its unit.", "short",
                    query(f"data_prep_stage_work{{{RUN}}}", "{{stage}}, {{unit}} {{instance}}"),
                ),
                curve(
                    "Tasks", "Done, and in all.", "short",
                    query(f"data_prep_stage_tasks{{{RUN}}}", "{{stage}} {{state}} {{instance}}"),
                ),
                curve(
                    "Records by outcome",
                    "Every record is written, dropped for a counted reason, or quarantined.",
                    "short", query(f"data_prep_records_total{{{RUN}}}", "{{outcome}} {{instance}}"), width=12,
                ),
                curve(
                    "Records per second", "Over the scrapes of a minute.", "short",
                    query(
                        f"clamp_min(deriv(data_prep_records_total{{{RUN}}}[$__rate_interval]), 0)",
                        "{{outcome}} {{instance}}",
                    ),
                    width=12,
                ),
            ],
        ),
    ]  # fmt: skip

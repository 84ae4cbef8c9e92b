"""Throughput and data: speed, ranks, waiting for data."""

from __future__ import annotations

from panels import RUN, Rows, curve, query


def throughput() -> Rows:
    """(question, panels) of each row."""
    return [
        (
            "Is it fast?",
            [
                curve(
                    "Tokens per second",
                    "Over all ranks, with the run's median of the last 30 minutes; the alarm is at 0.7 of it.",
                    "short",
                    query(f"sutrain_tokens_per_second{{{RUN}}}", "last step {{instance}}"),
                    query(f"sutrain:tokens_per_second:median30m{{{RUN}}}", "median {{instance}}"),
                ),
                curve(
                    "Model FLOP/s utilisation",
                    "Relative to the reference in the legend: a vendor's dense bf16 rate, or a matrix product "
                    "measured on this machine.",
                    "percentunit",
                    query(
                        f"sutrain_mfu_ratio{{{RUN}}} * on (instance) group_left (mfu_reference) sutrain_run_info",
                        "{{instance}} of {{mfu_reference}}",
                    ),
                ),
                curve(
                    "Time of a step",
                    "The difference between the first two is computing and communicating.",
                    "s",
                    query(f"sutrain_step_seconds{{{RUN}}}", "step {{instance}}"),
                    query(f"sutrain_data_wait_seconds{{{RUN}}}", "waiting for data {{instance}}"),
                    query(f"sutrain_step_seconds_max{{{RUN}}}", "longest of a minute {{instance}}"),
                ),
                curve(
                    "Share of time waiting for data",
                    "Over five minutes. Above a few percent the devices idle. Alarm: 20 %.",
                    "percentunit", query(f"sutrain:data_wait_share{{{RUN}}}"), width=12,
                ),
                curve(
                    "Samples per second", "Rows consumed, over the scrapes of a minute.", "short",
                    query(f"rate(sutrain_samples_consumed_total{{{RUN}}}[$__rate_interval])"), width=12,
                ),
            ],
        ),
        (
            "Which rank holds the others up?",
            [
                curve(
                    "Forward passes, to the lower quartile",
                    "Time in forward passes, where no rank waits for another, medians of five minutes. Alarm: 1.4 "
                    "times the others.",
                    "short", query(f"sutrain:rank_forward_seconds:relative{{{RUN}}}", "rank {{rank}} {{instance}}"),
                ),
                curve(
                    "Forward passes by rank", "The same in seconds.", "s",
                    query(f"sutrain_rank_forward_seconds{{{RUN}}}", "rank {{rank}} {{instance}}"),
                ),
                curve(
                    "Waiting for data by rank", "One rank alone: its disk or network.", "s",
                    query(f"sutrain_rank_data_wait_seconds{{{RUN}}}", "rank {{rank}} {{instance}}"),
                ),
                curve(
                    "Step time by rank", "Ranks wait for each other, so these run together.", "s",
                    query(f"sutrain_rank_step_seconds{{{RUN}}}", "rank {{rank}} {{instance}}"),
                ),
                curve(
                    "Behind the first rank",
                    "Steps, with the stages of a step as quarters. In a run that hangs the highest is waited for.",
                    "none",
                    query(
                        f"max by (instance) (sutrain_rank_progress{{{RUN}}}) - on (instance) group_right () "
                        f"sutrain_rank_progress{{{RUN}}}",
                        "rank {{rank}} {{instance}}",
                    ),
                ),
                curve(
                    "Last sign of life by rank", "Alarm: 5 minutes.", "s",
                    query(f"sutrain:rank_heartbeat_age_seconds{{{RUN}}}", "rank {{rank}} {{instance}}"),
                ),
            ],
        ),
        (
            "What does it cost the host?",
            [
                curve(
                    "Memory of the logging process", "Host memory of rank 0. A steady climb is a leak.", "bytes",
                    query(f"process_resident_memory_bytes{{{RUN}}}"), width=12,
                ),
                curve(
                    "Processor time of the logging process", "Cores that rank 0 keeps busy.", "short",
                    query(f"rate(process_cpu_seconds_total{{{RUN}}}[$__rate_interval])"), width=12,
                ),
            ],
        ),
    ]  # fmt: skip

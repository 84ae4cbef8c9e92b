"""Run overview: progress, learning, stability."""

from __future__ import annotations

from panels import RUN, Rows, curve, figure, query

SCI = "sci"


def overview() -> Rows:
    """(question, panels) of each row."""
    return [
        (
            "How does it stand?",
            [
                figure("Steps", "Steps done, skipped and refused ones included.", "locale", f"sutrain_step{{{RUN}}}"),
                figure("Tokens", "Training tokens consumed by the run.", "short", f"sutrain_run_tokens{{{RUN}}}", 2),
                figure(
                    "Loss", "Training loss of the last step, nats per predicted token.", "none",
                    f"sutrain_loss{{{RUN}}}", 3,
                ),
                figure(
                    "Validation accuracy", "Masked tokens of the validation split predicted right.",
                    "percentunit", f"sutrain_validation_accuracy{{{RUN}}}", 1,
                ),
                figure(
                    "Throughput", "Tokens per second over all ranks.", "locale",
                    f"sutrain_tokens_per_second{{{RUN}}}",
                ),
                figure(
                    "Last sign of life",
                    "Time since the loop finished a step or evaluation. Alarm: 10 minutes.",
                    "s", f"sutrain:heartbeat_age_seconds{{{RUN}}}",
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
                curve("Learning rate", "As the schedule has it.", SCI, query(f"sutrain_learning_rate{{{RUN}}}")),
                curve(
                    "Held-out loss by length",
                    "By tokens of the document in the row (up to the number). Short documents are harder; a long "
                    "class that gets worse while the others get better is a problem of positions.",
                    "none", query(f"sutrain_validation_loss_by_length{{{RUN}}}", "{{length}} {{instance}}"),
                ),
                curve(
                    "Held-out accuracy by length", "As left, share of [MASK] predicted right.", "percentunit",
                    query(f"sutrain_validation_accuracy_by_length{{{RUN}}}", "{{length}} {{instance}}"),
                ),
                curve(
                    "Held-out loss by source",
                    "By corpus. One that stops falling while the others go on is exhausted or badly weighted.",
                    "none", query(f"sutrain_validation_loss_by_source{{{RUN}}}", "{{source}} {{instance}}"),
                ),
                curve(
                    "Held-out accuracy by source", "As left, share of [MASK] predicted right.", "percentunit",
                    query(f"sutrain_validation_accuracy_by_source{{{RUN}}}", "{{source}} {{instance}}"),
                ),
            ],
        ),
        (
            "Is it stable?",
            [
                curve(
                    "Spikes in 5 minutes",
                    "Judged by the run on every step against its own history. Updates first, loss after, is the "
                    "usual order.",
                    "short",
                    query(
                        f"sum by (instance, part) (sutrain:update_spikes:increase5m{{{RUN}}})",
                        "updates {{part}} {{instance}}",
                    ),
                    query(
                        f"sum by (instance) (sutrain:direction_spikes:increase5m{{{RUN}}})", "directions {{instance}}"
                    ),
                    query(f"sutrain:loss_spikes:increase5m{{{RUN}}}", "loss {{instance}}"),
                ),
                curve(
                    "Largest of the last minute",
                    "Loss and gradient norm of the worst step of a minute: what falls between two scrapes.",
                    "short",
                    query(f"sutrain_loss_max{{{RUN}}}", "loss {{instance}}"),
                    query(f"sutrain_global_grad_norm_max{{{RUN}}}", "gradient {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Skipped, refused, loss scale",
                    "Skips in a row are the alarm: 5. A loss scale that keeps halving means the same. Refused are "
                    "updates that acting.skip_sigmas held back.",
                    "short",
                    query(f"sutrain_skipped_steps_in_a_row{{{RUN}}}", "skipped in a row {{instance}}"),
                    query(f"sutrain_skipped_steps_total{{{RUN}}}", "skipped since the start {{instance}}"),
                    query(f"sutrain_refused_steps_total{{{RUN}}}", "refused since the start {{instance}}"),
                    query(f"sutrain_loss_scale{{{RUN}}}", "loss scale {{instance}}"),
                ),
                curve(
                    "Steps since the last checkpoint",
                    "Saw teeth as high as checkpoint.every_steps. Alarm: two intervals.",
                    "short", query(f"sutrain:checkpoint_age_steps{{{RUN}}}"), width=12,
                ),
                curve(
                    "Free disk",
                    "Of the disk with the run's folder. Alarm: 5 %.",
                    "percentunit", query(f"sutrain_disk_free_ratio{{{RUN}}}"), width=12,
                ),
            ],
        ),
    ]  # fmt: skip

"""Optimizer: what it does to gradients to make updates of them."""

from __future__ import annotations

from panels import RUN, Rows, curve, layers, quantiles, query

SCI = "sci"


def optimizer() -> Rows:
    """(question, panels) of each row."""
    return [
        (
            "How large is everything?",
            [
                curve(
                    "Whole-model norms",
                    "Gradient before clipping, and what was truly added to the weights.",
                    SCI,
                    query(f"sutrain_global_grad_norm{{{RUN}}}", "gradient {{instance}}"),
                    query(f"sutrain_global_update_norm{{{RUN}}}", "update {{instance}}"),
                    query(f"sutrain_global_weight_norm{{{RUN}}}", "weights {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Update ÷ weight of the whole model",
                    "LAMB fixes it, AdaFactor's clip nearly does: there look at the row below.",
                    SCI, query(f"sutrain_global_update_ratio{{{RUN}}}"), logarithmic=True,
                ),
                curve(
                    "Weight norm over depth",
                    "Should grow slowly or settle; steady fast growth means too little weight decay or too high a "
                    "rate.",
                    SCI, query(quantiles("sutrain_weight_norm"), "{{quantile}} {{instance}}"), logarithmic=True,
                ),
                curve(
                    "Weights outside the layers", "Update ÷ weight of embeddings, head and final norm.", SCI,
                    query(f'sutrain_update_ratio{{{RUN}, layer=""}}', "{{part}} {{instance}}"), logarithmic=True,
                    width=24,
                ),
            ],
        ),
        (
            "What did the optimizer do to get it? ($part)",
            [
                curve(
                    "Update ÷ (rate · weight) over depth",
                    "The update without the schedule. About 1 for LAMB and AdaFactor; a change of level is a change "
                    "of the gradients, not of the rate.",
                    "short", query(quantiles("sutrain_update_ratio_per_rate"), "{{quantile}} {{instance}}"),
                    logarithmic=True,
                ),
                layers(
                    "Update ÷ (rate · weight) by layer", "As left, layer by layer.", "sutrain:update_ratio_per_rate",
                ),
                curve(
                    "RMS(U) over depth (AdaFactor)",
                    "RMS of the update before the clip: 1 where second moments fit the gradients. Far above 1 they "
                    "are stale; that is what its clip is for. Empty with other optimizers.",
                    "short", query(quantiles("sutrain_direction_rms"), "{{quantile}} {{instance}}"),
                    logarithmic=True, width=12,
                ),
                curve(
                    "Share clipped over depth (AdaFactor)",
                    "Share of the weights whose update was clipped. Early on high, later low; back up is trouble.",
                    "percentunit", query(quantiles("sutrain_clipped_share"), "{{quantile}} {{instance}}"), width=12,
                ),
                curve(
                    "Trust ratio over depth (LAMB)",
                    "Weight norm over direction norm. A layer whose ratio sinks gets large directions. Empty with "
                    "other optimizers.",
                    SCI, query(quantiles("sutrain_trust_ratio"), "{{quantile}} {{instance}}"), logarithmic=True,
                    width=12,
                ),
                layers("RMS(U) by layer (AdaFactor)", "As above, layer by layer.", "sutrain_direction_rms"),
                layers(
                    "Share clipped by layer (AdaFactor)", "As above, layer by layer.", "sutrain_clipped_share",
                    "percentunit",
                ),
                layers("Trust ratio by layer (LAMB)", "As above, layer by layer.", "sutrain_trust_ratio"),
            ],
        ),
    ]  # fmt: skip

"""Depth heat-maps: layer x time of gradient, update, ratio and probes."""

from __future__ import annotations

from panels import RUN, Rows, curve, layers, quantiles, query

SCI = "sci"


def depth() -> Rows:
    """(question, panels) of each row."""
    everywhere = ""
    return [
        (
            "How far does each layer move? ($part)",
            [
                layers(
                    "Update ÷ weight by layer",
                    "Bright rows are rewritten, dark rows stand still; a bright column is a step on which everything "
                    "jumped.",
                    "sutrain_update_ratio",
                ),
                layers(
                    "Largest update ÷ weight of a minute by layer",
                    "The same, but the worst step of the last minute: nothing falls between two scrapes.",
                    "sutrain_update_ratio_max",
                ),
                layers(
                    "Gradient norm by layer",
                    "Vanishing or exploding gradients show as a gradient of colour over depth.",
                    "sutrain_grad_norm",
                ),
                layers("Update norm by layer", "What was added to the weights.", "sutrain_update_norm"),
                layers("Weight norm by layer", "Slow growth everywhere is normal.", "sutrain_weight_norm"),
                layers(
                    "Gradient RMS by layer", "Gradient norm over the root of the number of weights: layers of any "
                    "size compare.", "sutrain:grad_rms",
                ),
                layers("Update RMS by layer", "The same of the update.", "sutrain:update_rms"),
                layers("Weight RMS by layer", "The same of the weights.", "sutrain:weight_rms"),
            ],
        ),
        (
            "Does the update grow with depth?",
            [
                curve(
                    "Slope over depth",
                    "Slope of log update norm against log depth. Near 0: even. Rising towards 1: the update grows "
                    "with depth, what DeepNorm is there to prevent. Alarm: a rise by 0.5 in six hours.",
                    "none", query(f"sutrain_update_depth_slope{{{RUN}}}", "{{part}} {{instance}}"),
                ),
                curve(
                    "Change of the function",
                    "RMS change of the encoder's output by one update, on a fixed batch, in fp32. What DeepNet "
                    "bounds; it should not grow. Below three times the dashed noise it is rounding.",
                    SCI,
                    query(f"sutrain_model_update{{{RUN}}}", "{{instance}}"),
                    query(f"sutrain_model_update_noise{{{RUN}}}", "noise {{instance}}"),
                    logarithmic=True,
                ),
                curve(
                    "Layers that stand still",
                    "Their update ratio is below a thousandth of the median layer's. Anything above 0 is an alarm.",
                    "short", query(f"sutrain_dead_layers{{{RUN}}}", "{{part}} {{instance}}"),
                ),
                curve(
                    "Update ÷ weight over depth",
                    "Quantiles over ALL layers of the part (0 = least, 1 = most). Lines that fan out mean that some "
                    "layers run away from the others.",
                    SCI, query(quantiles("sutrain_update_ratio"), "{{quantile}} {{instance}}"), logarithmic=True,
                ),
                curve(
                    "Update norm over depth", "As left, absolute. It jumps before the loss does.", SCI,
                    query(quantiles("sutrain_update_norm"), "{{quantile}} {{instance}}"), logarithmic=True,
                ),
                curve(
                    "Gradient norm over depth", "Quantiles over all layers of the part.", SCI,
                    query(quantiles("sutrain_grad_norm"), "{{quantile}} {{instance}}"), logarithmic=True,
                ),
            ],
        ),
        (
            "What do the layers do? (probes on a fixed batch, in fp32)",
            [
                layers(
                    "Attention entropy by layer",
                    "Mean entropy of a query's attention, nats. Near 0: collapsed onto single tokens. Near the log "
                    "of the document's length: it looks at nothing.",
                    "sutrain_attention_entropy", part=everywhere,
                ),
                layers(
                    "Activation RMS by layer",
                    "Of the layer's output. Growth with depth belongs to pre-norm; growth over time does not.",
                    "sutrain_activation_rms", part=everywhere,
                ),
                layers(
                    "Relative change by layer",
                    "What the layer changes, over its input. Near 0: it does nothing.",
                    "sutrain_relative_change", "percentunit", everywhere,
                ),
                layers(
                    "Mixer branch over residual", "Its share of the stream it is added to.",
                    "sutrain_mixer_branch_share", "percentunit", everywhere,
                ),
                layers(
                    "Feed-forward branch over residual", "Its share of the stream it is added to.",
                    "sutrain_feed_forward_branch_share", "percentunit", everywhere,
                ),
                layers(
                    "Dead units by layer",
                    "Share of inner units that are next to nothing at every token. Rising: the rate is too high, or "
                    "relu has died.",
                    "sutrain_dead_units_share", "percentunit", everywhere,
                ),
                curve(
                    "Scale of the logits",
                    "About their mean over the vocabulary. The largest running away precedes a loss that does.",
                    "short",
                    query(f"sutrain_logit_rms{{{RUN}}}", "RMS {{instance}}"),
                    query(f"sutrain_logit_max{{{RUN}}}", "largest {{instance}}"),
                    width=24,
                ),
            ],
        ),
    ]  # fmt: skip

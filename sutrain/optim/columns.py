"""What is known about every tensor after an update."""

STATISTICS = (
    "weight_square_sum",
    "grad_square_sum",
    "clipped_grad_square_sum",
    "update_square_sum",
    "numel",
    "update_rms",
    "clip_factor",
    "trust_ratio",
    "guard_factor",
)
"""Columns of `statistics`, each of the whole logical tensor. Weights are those the update started from;
gradients those the engine handed over, unscaled, before any clipping (clipped_: after clipping by the global
norm); the update is the fp32 difference applied, with learning rate and weight decay in it. update_rms (before
clipping) and clip_factor are AdaFactor's, trust_ratio is LAMB's, guard_factor the update guard's; else NaN."""

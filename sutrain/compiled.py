"""torch.compile layer by layer: one program for all layers that are alike, whatever the depth.

The whole stack as one program would take compile time and memory in proportion to its depth. The layers share their
code, and weights are arguments of the program, so that the second layer finds what was made for the first.
"""

from __future__ import annotations

import torch

from sutrain.models.encoder import Encoder, Layer


def compile_layers(encoder: Encoder, wanted: bool, zero_stage: int) -> None:
    """If wanted, make every layer's forward and backward pass compiled ones; the names of weights stay as they are.

    What wraps a layer from outside (recomputation, ZeRO-3's gathering of weights) runs as before, once a layer: inside
    of it ZeRO-3 would cut the program in pieces at every matrix, so that a layer's weights come together as a whole.
    """
    if not wanted:
        return
    if zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(encoder, [Layer])
    for layer in encoder.layers:
        layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]

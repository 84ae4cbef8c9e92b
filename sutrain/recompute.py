"""Which layers are computed again in the backward pass, so that what the others keep fits into a budget of memory.

A layer that is kept holds everything its backward pass needs; one that is computed again holds its input alone, and
only one in k of them even that: k layers are computed again together, and need their full memory once, for a moment.
Kept layers cost no time, so as few as possible are computed again, the lowest ones: by the time the backward pass
reaches them, what the kept ones held is free. Memory of weights, optimizer and head is not counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sutrain.models.configuration import EncoderConfig
from sutrain.models.encoder import Encoder, Layer
from sutrain.models.visibility import build_visibility


class Recomputation(NamedTuple):
    """The plan: the lowest `layers` are computed again, `together` at a time."""

    layers: int
    together: int
    peak_bytes: int  # of activations, by this plan


LONGEST = 64
"""Layers computed again together at most; the best number is about the root of how many there are."""


class BudgetError(ValueError):
    """No plan fits; the message says what the smallest one needs."""


def plan_recomputation(
    num_layers: int, layer_bytes: int, input_bytes: int, budget_bytes: float
) -> Recomputation:
    """The plan within `budget_bytes` that computes the fewest layers again, and of those the one with the least memory.

    Args:
        layer_bytes: what one layer keeps for its backward pass.
        input_bytes: the stream between two layers.

    Raises:
        BudgetError: when even computing everything again does not fit.
    """
    least: Recomputation | None = None
    for layers in range(num_layers + 1):
        kept = (num_layers - layers) * layer_bytes
        plans = []
        for together in {
            1,
            max(1, round(math.sqrt(layers * input_bytes / layer_bytes))),
            *range(1, min(layers, 64) + 1),
        }:
            inputs = math.ceil(layers / together) * input_bytes
            again = together * layer_bytes if layers else 0
            plans.append(Recomputation(layers, together if layers else 1, inputs + max(kept, again)))
        best = min(plans, key=lambda plan: (plan.peak_bytes, plan.together))
        if best.peak_bytes <= budget_bytes:
            return best
        if least is None or best.peak_bytes < least.peak_bytes:
            least = best
    assert least is not None
    needed = math.ceil(100 * least.peak_bytes / 2**20) / 100
    raise BudgetError(
        f"memory.activation_mib: found {budget_bytes / 2**20:.3g}, expected at least {needed:g} for these layers at "
        "this micro-batch; or lower batch.micro_sequences"
    )


def measure_layer(
    config: EncoderConfig,
    rows: int,
    row_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    zero_stage: int = 1,
) -> tuple[int, int]:
    """Bytes that one layer keeps for its backward pass, and bytes of its input, for full rows of one document.

    Counted from the tensors that autograd saves for a layer of its own, each storage once; weights and what all layers
    share are left out, and so is the output. No random stream is touched. Under ZeRO-3 a gated unit keeps more, and
    one of the lowest third of a model less than is measured here (gates.py).
    """
    held: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # held, or its address would be given to another
        return tensor

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        layer = Layer(config).to(device, dtype).train()
        if zero_stage == 3:
            for parameter in layer.parameters():
                parameter.ds_id = -1  # type: ignore[attr-defined]  # how DeepSpeed marks what it partitions
        documents = torch.ones(rows, row_tokens, dtype=torch.long, device=device)
        visible = build_visibility(documents, config, dtype)
        stream = torch.float32 if config.fp32_residual else dtype
        x = torch.zeros(rows, row_tokens, config.hidden_size, dtype=stream, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = layer(x, visible)
    shared = visible.storages() | {p.untyped_storage().data_ptr() for p in layer.parameters()}
    shared.add(output.untyped_storage().data_ptr())  # counted as the next layer's input
    kept = sum(storage.nbytes() for address, storage in held.items() if address not in shared)
    return kept, x.untyped_storage().nbytes()


def apply_budget(
    encoder: Encoder,
    budget_mib: float | None,
    rows: int,
    row_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    zero_stage: int = 1,
) -> str:
    """Plan for `rows` of a micro-batch, set the encoder up, and say in one line what was decided.

    Raises:
        BudgetError: see `plan_recomputation`.
    """
    if budget_mib is None:
        return "activations: all kept (memory.activation_mib is not set)"
    layer_bytes, input_bytes = measure_layer(encoder.config, rows, row_tokens, dtype, device, zero_stage)
    plan = plan_recomputation(len(encoder.layers), layer_bytes, input_bytes, budget_mib * 2**20)
    encoder.recompute_layers, encoder.recompute_together = plan.layers, plan.together
    flash = encoder.config.mixer == "flash"
    limit = "; documents that do not fill their chunks need more" if flash else ""
    return (
        f"activations: {plan.layers} of {len(encoder.layers)} layers computed again, {plan.together} together; "
        f"{plan.peak_bytes / 2**20:.0f} MiB of {budget_mib:.0f} ({layer_bytes / 2**20:.2f} MiB a layer, "
        f"{input_bytes / 2**20:.2f} between two){limit}"
    )

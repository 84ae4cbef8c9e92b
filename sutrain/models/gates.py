"""Products of an activated gate with what it gates, kept for the backward pass in as little as possible.

B batch, L sequence length, D hidden size, F outputs of the gate's map (E in a gated unit), R of the maps beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .init import Linear

GATE_AGAIN_FROM_TOKENS = 1024
"""Row length from which a gated unit's gate is projected again in the backward pass. It is as wide as the value and as
the output of attention, the two others that a unit keeps, and at this length 7 % of a step's products; the attention
of long rows makes them a smaller share."""


class Gate(NamedTuple):
    """A gate before its activation, or a promise of it with what it is made of."""

    gate_BLF: Tensor
    x_BLD: Tensor | None = None
    weight_FD: Tensor | None = None
    bias_F: Tensor | None = None


def project_gate(projection: Linear, x_BLD: Tensor) -> tuple[Gate, Tensor]:
    """The first of the maps fused in `projection`, a gate, and the outputs of the others [B, L, R].

    In training on long rows the gate is only promised. Not under ZeRO-3, which would have to gather the weights once
    more for it.
    """
    weight, bias, size = projection.weight, projection.bias, projection.parts[0]
    keeps = projection.training and torch.is_grad_enabled()
    if not keeps or x_BLD.shape[1] < GATE_AGAIN_FROM_TOKENS or hasattr(weight, "ds_id"):
        gate_BLF, rest_BLR = projection(x_BLD).split((size, len(weight) - size), dim=-1)
        return Gate(gate_BLF), rest_BLR
    promise_BLF, rest_BLR = _Projection.apply(x_BLD, weight, bias, size)
    made_of = (
        None if x is None else x.detach()
        for x in (x_BLD, weight[:size], None if bias is None else bias[:size])
    )
    return Gate(promise_BLF, *made_of), rest_BLR


def gated_output(
    output: nn.Module,
    activation: Callable[[Tensor], Tensor],
    x_BLF: Tensor,
    gate_BLF: Tensor,
    *made_of: Tensor | None,
) -> Tensor:
    """output(activation(gate) x). The activation and what goes into the output map are not kept beside the two that
    they are made of, which are as wide: a pass over them in the backward pass makes them again, and no product but
    that of a gate that was promised. gate_BLF, *made_of: a `Gate`."""
    if not torch.is_grad_enabled():
        return _gated_output(output, activation, x_BLF, gate_BLF, *made_of)
    inputs = output, activation, x_BLF, gate_BLF, *made_of
    return checkpoint(_gated_output, *inputs, use_reentrant=False, preserve_rng_state=False)


def _gated_output(
    output: nn.Module,
    activation: Callable[[Tensor], Tensor],
    x_BLF: Tensor,
    gate_BLF: Tensor,
    source_BLD: Tensor | None = None,
    weight_FD: Tensor | None = None,
    bias_F: Tensor | None = None,
) -> Tensor:
    if source_BLD is not None and weight_FD is not None:
        gate_BLF = _Kept.apply(gate_BLF, F.linear(source_BLD, weight_FD, bias_F))
    return output(activation(gate_BLF) * x_BLF)


class _Projection(torch.autograd.Function):
    """x W^T + b without its first features, of which there is a promise instead: their place in the graph without
    their memory. Gradients of both come back as if all were there."""

    @staticmethod
    def forward(ctx: Any, x_BLD, weight, bias, size: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BLD, weight)
        ctx.size, ctx.bias_dtype = size, None if bias is None else bias.dtype
        rest_BLR = F.linear(x_BLD, weight[size:], None if bias is None else bias[size:])
        return rest_BLR.new_zeros(()).expand(*x_BLD.shape[:-1], size), rest_BLR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight = ctx.saved_tensors
        d_gate, d_rest = (x.flatten(0, -2) for x in gradients)
        x_TD, matrix = x_BLD.flatten(0, -2).to(d_rest.dtype), weight.to(d_rest.dtype)  # fp32 under autocast
        d_weight = torch.empty_like(matrix)
        torch.mm(d_gate.t(), x_TD, out=d_weight[: ctx.size])
        torch.mm(d_rest.t(), x_TD, out=d_weight[ctx.size :])
        d_x = torch.mm(d_gate, matrix[: ctx.size]).addmm_(d_rest, matrix[ctx.size :])
        d_bias = None
        if ctx.bias_dtype is not None:
            d_bias = torch.cat([x.sum(0) for x in (d_gate, d_rest)]).to(ctx.bias_dtype)
        return d_x.view(x_BLD.shape).to(x_BLD.dtype), d_weight.to(weight.dtype), d_bias, None


class _Kept(torch.autograd.Function):
    """A promise, kept: the tensor itself, made outside of the graph; its gradient is the promise's."""

    @staticmethod
    def forward(ctx: Any, promise: Tensor, found: Tensor) -> Tensor:
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None

"""What is wide in gated units, and what the backward pass makes again of it.

B batch, L sequence length, D hidden size, F outputs of a map (E in a gated unit), R of others beside it, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .init import Linear
from .visibility import choose

AGAIN_FROM_TOKENS = 1024
"""Row length from which a gated unit projects its gate again in the backward pass, and a low unit its value too. What a
low unit keeps is then less than half, for 15 % more products at this length and fewer in longer rows, of which
attention is a larger share."""

VALUES_AGAIN_FROM_TOKENS = 2048
"""Row length from which all units project their values again. On shorter rows those above the lowest third have the
room for them: when the backward pass begins, none of the gradients are there yet that take it at the end."""


class Promise(NamedTuple):
    """The output of a linear map, or its place in autograd's graph, without memory, and what it is made of."""

    place_BLF: Tensor
    x_BLD: Tensor | None = None
    weight_FD: Tensor | None = None
    bias_F: Tensor | None = None

    def kept(self) -> Tensor:
        """The output itself, [B, L, F]. Nothing that is made of it is asked for a gradient here but its place."""
        if self.x_BLD is None or self.weight_FD is None:
            return self.place_BLF
        dtype = self.place_BLF.dtype  # of 16 bits under autocast, which has ended in a backward pass
        bias_F = None if self.bias_F is None else self.bias_F.to(dtype)
        return _Kept.apply(self.place_BLF, F.linear(self.x_BLD.to(dtype), self.weight_FD.to(dtype), bias_F))


def project(
    projection: nn.Module,
    x_BLD: Tensor,
    sizes: tuple[int, ...],
    promised: int,
    chosen_M: Tensor | None = None,
) -> list[Promise]:
    """What the maps make of x that are fused in `projection`, of these sizes; the first one, a gate, at the tokens of
    `choose`. The first ones, so many as `promised` says, are really promised in training on long rows, else computed as
    the others are.

    Not under ZeRO-3, which would have to gather the weights once more, nor where somebody has put something in the
    place of the map or around it: adapters, quantised weights, hooks. There the gate is chosen from that of all tokens.
    """
    keeps = projection.training and torch.is_grad_enabled() and x_BLD.shape[1] >= AGAIN_FROM_TOKENS
    if not (keeps or chosen_M is not None) or not is_plain(projection):
        gate_BLF, *others = projection(x_BLD).split(sizes, dim=-1)
        return [Promise(choose(gate_BLF, chosen_M)), *(Promise(x_BLF) for x_BLF in others)]
    weight, bias = projection.weight, projection.bias
    if chosen_M is None:
        return _promises(x_BLD, weight, bias, sizes, promised)
    gate_map, others_map = _maps(weight, bias, (sizes[0], sum(sizes[1:])))
    gate = Promise(F.linear(choose(x_BLD, chosen_M), *gate_map))  # of a few tokens, so it is kept
    return [gate, *_promises(x_BLD, *others_map, sizes[1:], promised - 1 if keeps else 0)]


def _promises(
    x_BLD: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], promised: int
) -> list[Promise]:
    if promised == 0:
        return [Promise(x_BLF) for x_BLF in F.linear(x_BLD, weight, bias).split(sizes, dim=-1)]
    outputs = _Projection.apply(x_BLD, weight, bias, sizes, promised)
    maps = _maps(weight.detach(), None if bias is None else bias.detach(), sizes)
    places = [Promise(outputs[number], x_BLD.detach(), *maps[number]) for number in range(promised)]
    return places + [Promise(x_BLF) for x_BLF in outputs[promised:]]


def _maps(weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each map that is fused in these."""
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return list(zip(weight.split(sizes), biases, strict=True))


def is_plain(projection: nn.Module) -> TypeGuard[Linear]:
    """Is this one of our own maps, with its weights at hand, and does nobody look at what goes in and out?"""
    hooks = (
        projection._forward_hooks,
        projection._forward_pre_hooks,
        projection._backward_hooks,
        projection._backward_pre_hooks,
    )
    hooked = any(hooks) or "forward" in projection.__dict__
    return type(projection) is Linear and not hooked and not hasattr(projection.weight, "ds_id")


def gated_output(
    output: nn.Module, activation: Callable[[Tensor], Tensor], x_BLF: Tensor, gate: Promise
) -> Tensor:
    """output(activation(gate) x). The activation and what goes into the output map are not kept beside the two that
    they are made of, which are as wide: a pass over them in the backward pass makes them again, and no product but
    that of a gate that was promised."""
    if not torch.is_grad_enabled():
        return _gated_output(output, activation, x_BLF, *gate)
    # As arguments of their own: only so are they dropped where all of this is computed again as well.
    inputs = output, activation, x_BLF, *gate
    draws = type(output) not in (Linear, nn.Linear)  # an adapter in its place may drop: the same again then
    return checkpoint(_gated_output, *inputs, use_reentrant=False, preserve_rng_state=draws)


def _gated_output(
    output: nn.Module, activation: Callable[[Tensor], Tensor], x_BLF: Tensor, *gate: Any
) -> Tensor:
    return output(activation(Promise(*gate).kept()) * x_BLF)


class _Projection(torch.autograd.Function):
    """The outputs of x W^T + b, of these sizes, of which the first ones are places without memory. Gradients come back
    as if all were there."""

    @staticmethod
    def forward(ctx: Any, x_BLD, weight, bias, sizes: tuple[int, ...], promised: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BLD, weight)
        ctx.sizes, ctx.bias_dtype = sizes, None if bias is None else bias.dtype
        outputs = [F.linear(x_BLD, *of) for of in _maps(weight, bias, sizes)[promised:]]
        places = (outputs[0].new_zeros(()).expand(*x_BLD.shape[:-1], size) for size in sizes[:promised])
        return *places, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight = ctx.saved_tensors
        outer = [x.flatten(0, -2) for x in gradients]
        dtype = outer[-1].dtype  # of 16 bits under autocast, where x and the weight may have 32
        x_TD, matrix = x_BLD.flatten(0, -2).to(dtype), weight.to(dtype)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = torch.zeros_like(x_TD)
            for x, rows in zip(outer, matrix.split(ctx.sizes), strict=True):
                d_x.addmm_(x, rows)
            d_x = d_x.view(x_BLD.shape).to(x_BLD.dtype)
        if ctx.needs_input_grad[1]:  # not of frozen layers
            d_weight = torch.empty_like(matrix)
            for x, out in zip(outer, d_weight.split(ctx.sizes), strict=True):
                torch.mm(x.t(), x_TD, out=out)
            d_weight = d_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = torch.cat([x.sum(0) for x in outer]).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None, None


class _Kept(torch.autograd.Function):
    """The tensor itself, made outside of the graph, in its place: the gradient is the place's."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, found: Tensor) -> Tensor:
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None

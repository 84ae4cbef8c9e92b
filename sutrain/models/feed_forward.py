"""The feed-forward block. B batch, L sequence length, D hidden size, F inner."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import GATED_ACTIVATIONS, EncoderConfig
from .gates import Promise, gated_output
from .init import Linear


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return _Relu.apply(x) if torch.compiler.is_compiling() else F.relu(x)


class _Relu(torch.autograd.Function):
    """Torch's compiler keeps a bool of every number for relu's backward pass: a sixth of what a layer keeps, and on a
    CPU the passes over them take as long as the matrix products beside them. Here nothing is kept but the output, as
    the next linear map does anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradients[0] * torch.sign(y)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


class FeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) for the gated activations; no dropout in between."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.feed_forward_size
        self.activation = _ACTIVATIONS[config.activation]
        self.up = Linear("up", hidden, inner, config.biases)
        self.gate = (
            Linear("gate", hidden, inner, config.biases) if config.activation in GATED_ACTIVATIONS else None
        )
        self.down = Linear("down", inner, hidden, config.biases)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transform every token by itself; [B, L, D] in and out."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BLD)))
        return gated_output(self.down, self.activation, self.up(x_BLD), Promise(self.gate(x_BLD)))

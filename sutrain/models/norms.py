"""Normalisation of the feature axis. B batch, L sequence length, D hidden size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .configuration import EncoderConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) over the last axis, mean square in fp32 (kexue.fm/archives/8998).

    Without a gain it has no parameters at all: every output vector has length sqrt(D), and a model's only
    temperature is the length of its embeddings.
    """

    def __init__(self, size: int, epsilon: float, gain: bool) -> None:
        super().__init__()
        self.size, self.epsilon = (size,), epsilon
        self.weight = nn.Parameter(torch.ones(size)) if gain else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.weight is None and (x_BLD.device.type == "cpu" or torch.compiler.is_compiling()):
            return _RMS.apply(x_BLD, self.epsilon)
        # fp32 residual streams meet bf16 gains; the kernel wants one type.
        weight = None if self.weight is None else self.weight.to(x_BLD.dtype)
        return F.rms_norm(x_BLD, self.size, weight, self.epsilon)


class _RMS(torch.autograd.Function):
    """The norm without a gain, in as few passes as a CPU can make of it, where torch has no kernel for it.

    The backward pass needs the output alone, which whatever comes next keeps anyway, and a number a token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        y = (wide * inverse if wide is x else wide.mul_(inverse)).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(g - y mean(g y)) / rms."""
        y, inverse = ctx.saved_tensors
        gradient, y = gradients[0].to(inverse.dtype), y.to(inverse.dtype)
        along = torch.linalg.vecdot(gradient, y).unsqueeze(-1).div_(-y.shape[-1])
        return torch.addcmul(gradient, y, along).mul_(inverse).to(gradients[0].dtype), None


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with gain and shift, which also takes an fp32 input when its weights are bf16."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(
            input, self.normalized_shape, self.weight.to(input.dtype), self.bias.to(input.dtype), self.eps
        )


def build_branch_norm(config: EncoderConfig) -> nn.Module:
    """The norm around one branch; rezero has none."""
    return nn.Identity() if config.residual == "rezero" else build_norm(config)


def build_norm(config: EncoderConfig) -> nn.Module:
    """The norm that `config.norm` names, over `config.hidden_size` features."""
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, eps=config.norm_epsilon)
    return RMSNorm(config.hidden_size, config.norm_epsilon, gain=config.norm == "rms_gain")

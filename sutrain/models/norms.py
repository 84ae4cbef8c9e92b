"""Normalisation of the feature axis. B batch, L sequence length, D hidden size."""

import torch
from torch import Tensor, nn
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
        # fp32 residual streams meet bf16 gains; the kernel wants one type.
        weight = None if self.weight is None else self.weight.to(x_BLD.dtype)
        return F.rms_norm(x_BLD, self.size, weight, self.epsilon)


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

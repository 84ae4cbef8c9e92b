"""What happens around a branch f, a mixer or a feed-forward block.

B batch, L sequence length, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration import EncoderConfig


def deepnorm_alpha(num_branches: int) -> float:
    """Weight of the skip in DeepNorm, encoder only: S^(1/4), which is (2N)^(1/4) for N transformer layers.

    arXiv 2203.00555, written in residual branches S so that a stack of GAU layers (S = N) needs no second
    formula.
    """
    return num_branches**0.25


def deepnorm_beta(num_branches: int) -> float:
    """Gain of the initial value, output and feed-forward weights: (4S)^(-1/4), which is (8N)^(-1/4)."""
    return (4 * num_branches) ** -0.25


class Residual(nn.Module):
    """Joins a branch to the stream that runs through the layers; holds no parameters.

        post       norm(x + f(x))            BERT, RoFormerV2
        pre        x + f(norm(x))            the stream needs one more norm at its end
        deepnorm   norm(alpha x + f(x))      arXiv 2203.00555

    The stream may be fp32 while the weights are bf16 (`fp32_residual`); a branch is fed the
    weights' dtype.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre = config.residual == "pre"
        self.alpha = deepnorm_alpha(config.num_branches) if config.residual == "deepnorm" else 1.0
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x_BLD: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The stream after the branch; same shape and dtype as `x_BLD`."""
        if self.pre:
            return x_BLD + self.dropout(branch(norm(x_BLD).to(dtype)))
        change_BLD = self.dropout(branch(x_BLD.to(dtype)))
        return norm((x_BLD if self.alpha == 1.0 else self.alpha * x_BLD) + change_BLD)

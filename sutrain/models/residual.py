"""What happens around a branch f, a mixer or a feed-forward block.

B batch, L sequence length, D hidden size.
"""

import torch
from torch import Tensor, nn

from .configuration import EncoderConfig
from .depth import depth_rule


class Residual(nn.Module):
    """Joins a branch to the stream that runs through the layers; holds no parameters.

        post       norm(x + f(x))            BERT, RoFormerV2
        pre        x + f(norm(x))            the stream needs one more norm at its end
        deepnorm   norm(alpha x + f(x))      arXiv 2203.00555; alpha: see depth.py
        ramp       norm(x + r f(x))          r grows from 0 to 1 while training (kexue.fm/archives/8998)
        rezero     x + a f(x)                a learned, 0 at first (arXiv 2003.04887); no norm at all

    The stream may be fp32 while the weights are bf16 (`fp32_residual`); a branch is fed the
    weights' dtype.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre = config.residual == "pre"
        self.ramp = config.residual == "ramp"
        self.alpha = depth_rule(config).alpha if config.residual == "deepnorm" else 1.0
        self.dropout = nn.Dropout(config.hidden_dropout)

    def enter(self, x_BLD: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
        """What the branch is fed; [B, L, D] in `dtype`."""
        entered_BLD = norm(x_BLD) if self.pre else x_BLD
        # No cast where there is none: by itself ahead of the branch, compilers make a program of it.
        return entered_BLD if entered_BLD.dtype == dtype else entered_BLD.to(dtype)

    def forward(
        self,
        x_BLD: Tensor,
        change_BLD: Tensor,
        norm: nn.Module,
        ramp: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The stream after the branch; same shape and dtype as `x_BLD`.

        The branch itself is called by the layer: where a compiler leaves the branch for attention, it leaves every
        function that is around it too, and each would be one program more.

        Args:
            change_BLD: what the branch made of `enter`.
            ramp: the r of residual ramp, see `Encoder.ramp`.
            scale: the a of rezero, [1].
        """
        change_BLD = self.dropout(change_BLD)
        if self.pre:
            return x_BLD + change_BLD
        if scale is not None:
            return x_BLD + scale.to(x_BLD.dtype) * change_BLD
        if self.ramp and ramp is not None:
            change_BLD = ramp.to(change_BLD.dtype) * change_BLD
        return norm((x_BLD if self.alpha == 1.0 else self.alpha * x_BLD) + change_BLD)

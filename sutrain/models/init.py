"""Initial weights, by the role of a weight, the depth of the stack and nothing else.

A torch Linear weight is [out, in], so its fan_in is shape[1]. Guessing roles from shapes instead goes wrong
for small vocabularies and for fused or transposed matrices, so every map is built here with its role's name.
"""

import math

from torch import Tensor, nn

from .configuration import EncoderConfig
from .residual import deepnorm_beta

# Cutting a normal distribution at two standard deviations shrinks its standard deviation by the square root of
# 0.7737413; widening it by the inverse restores the wanted one (kexue.fm/archives/8620).
TRUNCATION_CORRECTION = 1.1368472

# The weights that DeepNorm scales by beta: those whose product is the size of a branch. Query and key only
# shape a softmax, and the gate of a GAU keeps its size so that two factors remain, value and output, as the
# theory counts.
_DEEPNORM_SCALED = {"value", "output", "up", "gate", "down"}


class Linear(nn.Linear):
    """A linear map that knows its role and, if several maps are fused in it, how many outputs each has."""

    def __init__(self, role: str, fan_in: int, fan_out: int, bias: bool, parts: tuple[int, ...] = ()) -> None:
        super().__init__(fan_in, fan_out, bias=bias)
        self.role, self.parts = role, parts


class Embedding(nn.Embedding):
    """A lookup table; the padding row is an ordinary row, since nothing ever attends to padding."""

    role, parts = "embedding", ()


def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill with a normal distribution cut at two deviations, of standard deviation `std` after the cut."""
    wide = std * TRUNCATION_CORRECTION
    nn.init.trunc_normal_(weight, std=wide, a=-2 * wide, b=2 * wide)


def initialise(module: nn.Module, config: EncoderConfig) -> None:
    """Set the weights that `module` itself holds (not its children's) to their initial values."""
    if isinstance(module, Linear | Embedding):
        _INITIALISERS[config.initialisation](module, config)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()  # norms and the scales of a GAU: ones and zeros


def _roformer_v2(module: Linear | Embedding, config: EncoderConfig, order: int = 2) -> None:
    """std = layers^(-1/order) / sqrt(fan_in), also for queries and keys (kexue.fm/archives/8998, bert4keras).

    `order` is the number of matrices multiplied along a branch, which thus starts at 1/layers of the stream.
    That bounds the first updates of an optimizer whose steps are relative to the size of a weight.
    """
    truncated_normal_(module.weight, config.num_layers ** (-1 / order) / math.sqrt(module.weight.shape[1]))


def _gau_alpha(module: Linear | Embedding, config: EncoderConfig) -> None:
    """The same with three matrices in a branch: gate, value and output (kexue.fm/archives/9052)."""
    _roformer_v2(module, config, order=3)


def _deepnorm(module: Linear | Embedding, config: EncoderConfig) -> None:
    """Xavier normal; gain beta for value, output and feed-forward, 1 for query and key (arXiv 2203.00555)."""
    beta = deepnorm_beta(config.num_branches)
    if module.role in ("embedding", "head"):  # not part of the theory; 1/sqrt(D) makes logits of unit size
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    elif (
        module.role == "gau_input"
    ):  # gate, value, query and key: one matrix, but three maps of their own size
        for part, gain in zip(module.weight.split(module.parts), (1.0, beta, 1.0), strict=True):
            nn.init.xavier_normal_(part, gain=gain)
    else:
        nn.init.xavier_normal_(module.weight, gain=beta if module.role in _DEEPNORM_SCALED else 1.0)


def _bert(module: Linear | Embedding, config: EncoderConfig) -> None:
    """BERT's own: normal with deviation 0.02 cut at 0.04, which leaves 0.0176 (kexue.fm/archives/8747)."""
    truncated_normal_(module.weight, 0.02 / TRUNCATION_CORRECTION)


_INITIALISERS = {"roformer_v2": _roformer_v2, "gau_alpha": _gau_alpha, "deepnorm": _deepnorm, "bert": _bert}

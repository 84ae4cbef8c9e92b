"""Initial weights, by the role of a weight, the depth of the stack and nothing else.

A torch Linear weight is [out, in], so its fan_in is shape[1]. Guessing roles from shapes instead goes wrong
for small vocabularies and for fused or transposed matrices, so every map is built here with its role's name.
"""

import math

from torch import Tensor, nn

from .configuration import EncoderConfig
from .depth import depth_rule

# Cutting a normal distribution at two standard deviations shrinks its standard deviation by the square root of
# 0.7737413; widening it by the inverse restores the wanted one (kexue.fm/archives/8620).
TRUNCATION_CORRECTION = 1.1368472

# The weights that DeepNorm scales by beta: those whose product is the size of a branch. Query and key only
# shape a softmax, and the gate of a GAU keeps its size so that two factors remain, value and output, as the
# theory counts.
_DEEPNORM_SCALED = {"value", "output", "up", "gate", "down"}

# The weights along a branch in the rules by optimizer family: two of them, also where a feed-forward block is gated,
# and in a gated unit three, gate, value and output, as GAU-alpha counts.
_SU_SCALED = {"value", "output", "up", "down"}


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


def average_fan(fan_in: int, fan_out: int, average: str) -> float:
    """The m in std = gain / sqrt(m) of a matrix from `fan_in` to `fan_out` features (kexue.fm/archives/8725).

    fan_in keeps the size of what goes forward; arithmetic is Xavier; geometric keeps the size through a map up and a
    map down, forward and backward; quadratic is the least squares compromise within one matrix.
    """
    return {
        "fan_in": float(fan_in),
        "arithmetic": (fan_in + fan_out) / 2,
        "geometric": math.sqrt(fan_in * fan_out),
        "quadratic": (fan_in**2 + fan_out**2) / (fan_in + fan_out),
    }[average]


def initialise(module: nn.Module, config: EncoderConfig) -> None:
    """Set the weights that `module` itself holds (not its children's) to their initial values."""
    if isinstance(module, Linear | Embedding):
        _INITIALISERS[config.initialisation](module, config)
        if isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()  # norms and the scales of a GAU: ones and zeros


def _scaled(module: Linear | Embedding, config: EncoderConfig, gain: float) -> None:
    """Cut normal of std gain / sqrt(fan) for every matrix, fused ones part by part where the fan depends on it."""
    average = "fan_in" if config.fan_average == "published" else config.fan_average
    if module.role in ("embedding", "head") or average == "fan_in":
        truncated_normal_(module.weight, gain / math.sqrt(module.weight.shape[1]))
        return
    for part in module.weight.split(module.parts) if module.parts else (module.weight,):
        truncated_normal_(part, gain / math.sqrt(average_fan(part.shape[1], part.shape[0], average)))


def _roformer_v2(module: Linear | Embedding, config: EncoderConfig) -> None:
    """std = layers^(-1/2) / sqrt(fan_in), also for queries, keys and embeddings (kexue.fm/archives/8998, bert4keras).

    Two is the number of matrices multiplied along a branch, which thus starts at 1/layers of the stream. That bounds
    the first updates of an optimizer whose steps are relative to the size of a weight. GAU-alpha's is the same with
    three, gate, value and output (kexue.fm/archives/9052).
    """
    _scaled(module, config, depth_rule(config).gain)


def _plain(module: Linear | Embedding, config: EncoderConfig) -> None:
    """std = 1 / sqrt(fan) whatever the depth: LeCun's with the fan_in, Xavier's with the arithmetic mean."""
    _scaled(module, config, 1.0)


def _deepnorm(module: Linear | Embedding, config: EncoderConfig) -> None:
    """Xavier normal; gain beta for value, output and feed-forward, 1 for query and key (arXiv 2203.00555)."""
    beta = depth_rule(config).gain
    if module.role in ("embedding", "head"):  # not part of the theory; 1/sqrt(D) makes logits of unit size
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    elif (
        module.role == "gau_input"
    ):  # gate, value, query and key: one matrix, but three maps of their own size
        for part, gain in zip(module.weight.split(module.parts), (1.0, beta, 1.0), strict=True):
            nn.init.xavier_normal_(part, gain=gain)
    else:
        nn.init.xavier_normal_(module.weight, gain=beta if module.role in _DEEPNORM_SCALED else 1.0)


def _su(module: Linear | Embedding, config: EncoderConfig) -> None:
    """1 / sqrt(fan), times the gain of depth.py along the branches (kexue.fm/archives/8978)."""
    gain = depth_rule(config).gain
    if module.role == "gau_input":
        average = "fan_in" if config.fan_average == "published" else config.fan_average
        for part, part_gain in zip(module.weight.split(module.parts), (gain, gain, 1.0), strict=True):
            truncated_normal_(part, part_gain / math.sqrt(average_fan(part.shape[1], part.shape[0], average)))
    else:
        _scaled(module, config, gain if module.role in _SU_SCALED else 1.0)


def _bert(module: Linear | Embedding, config: EncoderConfig) -> None:
    """BERT's own: normal with deviation 0.02 cut at 0.04, which leaves 0.0176 (kexue.fm/archives/8747)."""
    truncated_normal_(module.weight, 0.02 / TRUNCATION_CORRECTION)


_INITIALISERS = {
    "roformer_v2": _roformer_v2,
    "gau_alpha": _roformer_v2,
    "deepnorm": _deepnorm,
    "su_sgd": _su,
    "su_adam": _su,
    "su_lamb": _su,
    "plain": _plain,
    "bert": _bert,
}

"""What an encoder is made of.

Torch-free, so that plans, configuration checks and tests can read it anywhere. The defaults are RoFormerV2
base (kexue.fm/archives/8998); GAU-alpha (kexue.fm/archives/9052), FLASH (arXiv 2202.10447), DeepNet
(arXiv 2203.00555) and BERT (arXiv 1810.04805) are other values of the same fields. Which values make no sense
together, and why, is in composition.py.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .composition import find_problems

GATED_ACTIVATIONS = ("swiglu", "geglu")


class EncoderConfigError(ValueError):
    """A model that cannot exist; the message lists every problem, one a line."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and composition of an encoder.

    Raises:
        EncoderConfigError: when values have the wrong type or make no sense together; all problems at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    vocab_size: int = _setting(12000, "tokens in the vocabulary, special ones included")
    hidden_size: int = _setting(768, "width of the residual stream, features")
    num_layers: int = _setting(
        12, "layers; one is attention + feed-forward, or a single GAU (two of those weigh as much)"
    )
    mixer: Literal["attention", "gau", "flash"] = _setting(
        "attention",
        "what moves information between tokens: multi-head attention, gated attention (gau), or gated attention "
        "inside chunks plus linear attention between them (flash); the last two: arXiv 2202.10447",
    )
    context: Literal["bidirectional", "causal", "unilm"] = _setting(
        "bidirectional",
        "what a token sees of its document: all of it; itself and what precedes it; or (unilm) the whole prefix and "
        "what precedes it, where token type 1 marks what follows the prefix (kexue.fm/archives/7427)",
    )
    num_heads: int = _setting(12, "attention heads (mixer attention only)")
    head_size: int = _setting(
        64, "features of a head's query and key; need not be hidden_size / num_heads (kexue.fm/archives/7325)"
    )
    value_head_size: int = _setting(0, "features of a head's value; 0: head_size (mixer attention only)")
    talking_heads: Literal["none", "scores", "both"] = _setting(
        "none",
        "mix the heads' scores before the softmax, or also the probabilities after it (kexue.fm/archives/7325, "
        "arXiv 2003.02436; mixer attention only)",
    )
    feed_forward_size: int = _setting(3072, "inner features of the feed-forward block (mixer attention only)")
    activation: Literal["relu", "gelu", "silu", "swiglu", "geglu"] = _setting(
        "relu", "feed-forward activation; the *glu ones have a third matrix, a gate (mixer attention only)"
    )
    gau_expansion_size: int = _setting(
        1536, "features of a gated unit's gate and value, normally 2 x hidden_size (mixers gau and flash)"
    )
    gau_key_size: int = _setting(
        128, "features of a gated unit's shared query and key (mixers gau and flash)"
    )
    flash_chunk_size: int = _setting(
        256, "tokens of a chunk, counted from the start of a document (mixer flash)"
    )
    score_normaliser: Literal["softmax", "softmax_plus", "relu_squared", "relu_squared_n2"] = _setting(
        "softmax",
        "softmax_plus multiplies scores by log_512 of the visible tokens n (kexue.fm/archives/8823); relu_squared is "
        "relu(s)^2 / n with s = q k / sqrt(key size) (kexue.fm/archives/8934), relu_squared_n2 is relu(q k / n)^2 "
        "(arXiv 2202.10447); mixer flash takes the last two with the chunk size for n",
    )
    positions: Literal["rotary", "rotary_half", "learned", "none"] = _setting(
        "rotary",
        "rotary turns neighbouring features as pairs (kexue.fm/archives/8265), rotary_half pairs feature i with "
        "i + half, for imported weights; learned adds one of max_row_tokens vectors",
    )
    rotary_base: float = _setting(10000.0, "base of the rotary angles (rotary positions only)")
    hierarchical_alpha: float = _setting(
        0.0,
        "learned positions only: 0.4 makes n learned vectors serve n^2 positions, 0 does not (kexue.fm/archives/7947)",
    )
    residual: Literal["post", "pre", "deepnorm", "ramp", "rezero"] = _setting(
        "post",
        "post: norm(x + f(x)); pre: x + f(norm(x)); deepnorm: norm(alpha x + f(x)), alpha from depth and "
        "initialisation; ramp: norm(x + r f(x)), r from 0 to 1 over ramp_steps; rezero: x + a f(x), a learned from 0",
    )
    ramp_steps: int = _setting(0, "optimizer updates after which the branches of residual ramp count in full")
    norm: Literal["rms", "rms_gain", "layer_norm"] = _setting(
        "rms", "rms has no parameters (RoFormerV2); rms_gain adds a gain, layer_norm also a mean and a shift"
    )
    norm_epsilon: float = _setting(1e-12, "added to the mean square inside the root (1e-12 as in RoFormerV2)")
    initialisation: Literal[
        "roformer_v2",
        "gau_alpha",
        "deepnorm",
        "su_sgd",
        "su_adam",
        "su_lamb",
        "plain",
        "bert",
        "auto",
    ] = _setting(
        "roformer_v2",
        "roformer_v2: std layers^-1/2 / sqrt(fan); gau_alpha: layers^-1/3 instead; deepnorm: the paper's alpha and "
        "beta; su_sgd, su_adam, su_lamb: alpha and gain by depth and optimizer family (kexue.fm/archives/8978); auto: "
        "the su_ row of the optimizer that trains it; plain: 1 / sqrt(fan); bert: 0.02 cut at two deviations",
    )
    fan_average: Literal["published", "fan_in", "arithmetic", "geometric", "quadratic"] = _setting(
        "published",
        "the fan of a non-square matrix (kexue.fm/archives/8725); published: fan_in, and for deepnorm arithmetic, "
        "which is Xavier",
    )
    biases: bool = _setting(False, "give the linear maps a bias (RoFormerV2 and GAU-alpha have none)")
    token_types: int = _setting(2, "rows of the token type embedding; 0 for none")
    embedding_dropout: Literal["before_norm", "after_norm"] = _setting(
        "before_norm", "where the embeddings' dropout stands: before the norm (RoFormerV2) or after it (BERT)"
    )
    head: Literal["plain", "bert"] = _setting(
        "plain",
        "plain: dropout, then the product with the embedding (RoFormerV2); bert: linear map, GELU and norm before "
        "it, a bias behind it",
    )
    tied_head: bool = _setting(True, "predict with the token embedding itself instead of a second matrix")
    hidden_dropout: float = _setting(
        0.1, "share of embedding, branch and (plain) head features dropped while training"
    )
    attention_dropout: float = _setting(0.1, "share of attention probabilities dropped while training")
    max_row_tokens: int = _setting(
        512, "longest row seen in training, tokens; rotary positions do not forbid longer ones"
    )
    pad_token_id: int = _setting(0, "id of the padding token")
    fp32_residual: bool = _setting(
        False,
        "keep the sum that runs through the layers in fp32 when the weights are bf16 (deep models need it)",
    )

    def __post_init__(self) -> None:
        problems = find_problems(self)
        if problems:
            raise EncoderConfigError("\n".join(f"model.{problem}" for problem in problems))

    @property
    def gated(self) -> bool:
        """Are the layers gated attention units, which need no feed-forward block?"""
        return self.mixer != "attention"

    @property
    def num_branches(self) -> int:
        """Residual branches of the stack: S = 2N for N attention layers (each two), S = N for gated units."""
        return self.num_layers * (1 if self.gated else 2)

    @property
    def key_size(self) -> int:
        """Features of a query or key, all of which rotary positions turn."""
        return self.gau_key_size if self.gated else self.head_size

    @property
    def value_size(self) -> int:
        """Features of a head's value (mixer attention)."""
        return self.value_head_size or self.head_size

    @property
    def rotary(self) -> bool:
        """Do positions enter by turning queries and keys?"""
        return self.positions in ("rotary", "rotary_half")


def parameter_count(config: EncoderConfig) -> int:
    """Trainable parameters of the language model, a tied head counted once."""
    hidden, bias = config.hidden_size, int(config.biases)

    def linear(fan_in: int, fan_out: int) -> int:
        return fan_in * fan_out + bias * fan_out

    norm = {"rms": 0, "rms_gain": hidden, "layer_norm": 2 * hidden}[config.norm]
    around_branch = 1 if config.residual == "rezero" else norm  # rezero has a factor in place of the norm
    if config.gated:
        expansion, key = config.gau_expansion_size, config.gau_key_size
        queries_and_keys = 4 if config.mixer == "flash" else 2
        layer = linear(hidden, 2 * expansion + key) + linear(expansion, hidden)
        layer += queries_and_keys * key * (1 + bias) + around_branch
    else:
        keys, values = config.num_heads * config.head_size, config.num_heads * config.value_size
        ups = 2 if config.activation in GATED_ACTIVATIONS else 1
        wide = config.feed_forward_size
        layer = 2 * linear(hidden, keys) + linear(hidden, values) + linear(values, hidden)
        layer += {"none": 0, "scores": 1, "both": 2}[config.talking_heads] * config.num_heads**2
        layer += ups * linear(hidden, wide) + linear(wide, hidden) + 2 * around_branch
    learned = config.max_row_tokens if config.positions == "learned" else 0
    embeddings = (config.vocab_size + config.token_types + learned) * hidden + norm
    final_norm = norm if config.residual == "pre" else 0
    head = 0 if config.tied_head else config.vocab_size * hidden
    if config.head == "bert":
        head += linear(hidden, hidden) + norm + config.vocab_size
    return embeddings + config.num_layers * layer + final_norm + head


def flops_per_token(config: EncoderConfig, row_tokens: int, masked_share: float) -> float:
    """Floating point operations of forward and backward for one token of a row, matrix products only.

    A product of [m, k] and [k, n] costs 2mkn; the backward pass costs twice the forward pass (one product for
    the input, one for the weight), and nothing is counted for recomputation. Per token, forward:
        attention layer   2 * (2 D H K + 2 D H E  +  2 D F [3 D F when gated]  +  L H (K + E) [+ L H^2 a mix])
        GAU layer         2 * (D (2X + S)  +  X D  +  L S  +  L X)
        FLASH layer       2 * (D (2X + S)  +  X D  +  C S  +  C X  +  2 S X  +  2/3 G S X / C)
        head              2 * D V [+ D^2 for BERT's] * masked_share, because only the masked positions are predicted
        last layer        D H E + 2 D F [3 D F], or 2 D X, are at masked positions alone too if these are half or less
    with row length L, hidden D, heads H, head size K and value size E, feed-forward F, gated expansion X and key size
    S, chunk C of which the row has G, vocabulary V. Scores are counted over the whole row, also when it holds several
    documents, and in full for causal models.

    Args:
        row_tokens: length of a row, tokens.
        masked_share: share of the tokens that are predicted, in [0, 1] (about 0.15; 1 for causal models). 0: none, but
            the hidden vectors of all are wanted.
    """
    hidden = config.hidden_size
    if config.gated:
        expansion, key = config.gau_expansion_size, config.gau_key_size
        behind_attention = 2 * hidden * expansion  # the gate too, which nothing else needs
        products: float = hidden * (expansion + key) + behind_attention
        if config.mixer == "gau":
            products += row_tokens * (key + expansion)
        else:
            chunk = config.flash_chunk_size
            chunks = -(-row_tokens // chunk)
            padded = chunks * chunk / row_tokens  # a last chunk is computed as a whole
            # Which chunks read which is no weight, so a third of that product's backward pass is not there.
            linear = 2 * key * expansion + 2 / 3 * chunks * key * expansion / chunk
            products += padded * (chunk * (key + expansion) + linear)
    else:
        keys, values = config.num_heads * config.head_size, config.num_heads * config.value_size
        matrices = 3 if config.activation in GATED_ACTIVATIONS else 2
        behind_attention = hidden * values + matrices * hidden * config.feed_forward_size
        products = hidden * (2 * keys + values) + behind_attention
        products += row_tokens * (keys + values)
        products += (
            {"none": 0, "scores": 1, "both": 2}[config.talking_heads] * row_tokens * config.num_heads**2
        )
    head = hidden * config.vocab_size + (hidden**2 if config.head == "bert" else 0)
    spared = (1 - masked_share) * behind_attention if 0 < masked_share <= 0.5 else 0.0
    forward = 2 * (config.num_layers * products - spared + masked_share * head)
    return 3.0 * forward

"""What an encoder is made of, and two numbers that follow from it: its parameters and its FLOPs.

Torch-free, so that plans, configuration checks and tests can read it anywhere. The defaults are RoFormerV2
base (kexue.fm/archives/8998); GAU-alpha (kexue.fm/archives/9052) and DeepNet (arXiv 2203.00555) are other
values of the same fields.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

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
    mixer: Literal["attention", "gau"] = _setting(
        "attention",
        "what moves information between tokens: multi-head attention, or gated attention (arXiv 2202.10447)",
    )
    num_heads: int = _setting(12, "attention heads (mixer attention only)")
    head_size: int = _setting(
        64, "features of a head's query, key and value; need not be hidden_size / num_heads"
    )
    feed_forward_size: int = _setting(3072, "inner features of the feed-forward block (mixer attention only)")
    activation: Literal["relu", "gelu", "silu", "swiglu", "geglu"] = _setting(
        "relu", "feed-forward activation; the *glu ones have a third matrix, a gate (mixer attention only)"
    )
    gau_expansion_size: int = _setting(
        1536, "features of a GAU's gate and value, normally 2 x hidden_size (mixer gau only)"
    )
    gau_key_size: int = _setting(128, "features of a GAU's shared query and key (mixer gau only)")
    residual: Literal["post", "pre", "deepnorm"] = _setting(
        "post",
        "post: norm(x + f(x)); pre: x + f(norm(x)); deepnorm: norm(alpha x + f(x)), alpha from the depth",
    )
    norm: Literal["rms", "rms_gain", "layer_norm"] = _setting(
        "rms", "rms has no parameters (RoFormerV2); rms_gain adds a gain, layer_norm also a mean and a shift"
    )
    norm_epsilon: float = _setting(1e-12, "added to the mean square inside the root (1e-12 as in RoFormerV2)")
    initialisation: Literal["roformer_v2", "gau_alpha", "deepnorm", "bert"] = _setting(
        "roformer_v2",
        "roformer_v2: std layers^-1/2 / sqrt(fan_in); gau_alpha: layers^-1/3 instead; "
        "deepnorm: Xavier with gain beta; bert: 0.02 cut at two deviations",
    )
    biases: bool = _setting(False, "give the linear maps a bias (RoFormerV2 and GAU-alpha have none)")
    rotary_base: float = _setting(10000.0, "base of the rotary angles (kexue.fm/archives/8265)")
    score_normaliser: Literal["softmax", "softmax_plus"] = _setting(
        "softmax",
        "softmax_plus multiplies scores by log_512 of the document's length (kexue.fm/archives/8823)",
    )
    token_types: int = _setting(2, "rows of the token type embedding; 0 for none")
    tied_head: bool = _setting(True, "predict with the token embedding itself instead of a second matrix")
    hidden_dropout: float = _setting(
        0.1, "share of embedding, branch and head features dropped while training"
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
        problems = _type_problems(self)
        if not problems:  # comparisons below need the right types
            problems = _range_problems(self) + _combination_problems(self)
        if problems:
            raise EncoderConfigError("\n".join(f"model.{problem}" for problem in problems))

    @property
    def num_branches(self) -> int:
        """Residual branches of the stack: S = 2N for N attention layers (each two), S = N for GAU layers."""
        return self.num_layers * (1 if self.mixer == "gau" else 2)

    @property
    def rotary_size(self) -> int:
        """Features of a query or key that rotary positions turn."""
        return self.gau_key_size if self.mixer == "gau" else self.head_size


def _type_problems(config: EncoderConfig) -> list[str]:
    problems = []
    for spec in fields(config):
        value: Any = getattr(config, spec.name)
        expected: Any = spec.type
        if get_origin(expected) is Literal:
            choices = get_args(expected)
            if value not in choices:
                problems.append(f"{spec.name}: found {value!r}, expected one of {', '.join(choices)}")
        elif expected is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, spec.name, float(value))  # 10000 means 10000.0
        elif not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            problems.append(f"{spec.name}: found {value!r}, expected {expected.__name__}")
    return problems


def _range_problems(config: EncoderConfig) -> list[str]:
    problems = []
    may_be_zero = {"token_types", "pad_token_id"}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if spec.type is int:
            least = 0 if spec.name in may_be_zero else 1
            if value < least:
                problems.append(f"{spec.name}: found {value}, expected at least {least}")
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            problems.append(f"{name}: found {getattr(config, name)}, expected a share in [0, 1)")
    if not 0.0 < config.norm_epsilon < 1.0:
        problems.append(
            f"norm_epsilon: found {config.norm_epsilon}, expected a small positive number such as 1e-12"
        )
    if not config.rotary_base > 1.0:
        problems.append(f"rotary_base: found {config.rotary_base}, expected more than 1, such as 10000")
    if config.pad_token_id >= config.vocab_size:
        problems.append(
            f"pad_token_id: found {config.pad_token_id}, expected an id below vocab_size {config.vocab_size}"
        )
    return problems


# Settings that only one mixer reads. A value other than the default under the other mixer would be ignored
# silently.
_ONLY_ATTENTION = ("num_heads", "head_size", "feed_forward_size", "activation")
_ONLY_GAU = ("gau_expansion_size", "gau_key_size")


def _combination_problems(config: EncoderConfig) -> list[str]:
    problems = []
    foreign = _ONLY_ATTENTION if config.mixer == "gau" else _ONLY_GAU
    defaults = {spec.name: spec.default for spec in fields(config) if spec.default is not MISSING}
    for name in foreign:
        if getattr(config, name) != defaults[name]:
            problems.append(
                f"{name}: found {getattr(config, name)!r}, which mixer {config.mixer} does not use; remove it"
            )
    if config.rotary_size % 2:
        name = "gau_key_size" if config.mixer == "gau" else "head_size"
        problems.append(
            f"{name}: found {config.rotary_size}, expected an even number (rotary positions turn pairs)"
        )
    if (config.residual == "deepnorm") != (config.initialisation == "deepnorm"):
        problems.append(
            f"residual: found {config.residual} with initialisation {config.initialisation}; deepnorm "
            "needs both (alpha on the skip, beta in the weights): set both to deepnorm or neither"
        )
    if config.initialisation == "gau_alpha" and config.mixer != "gau":
        problems.append(
            "initialisation: found gau_alpha with mixer attention; its exponent 1/3 is for "
            "three matrices in a branch and an attention branch has two: use roformer_v2"
        )
    return problems


def parameter_count(config: EncoderConfig) -> int:
    """Trainable parameters of the masked language model, a tied head counted once."""
    hidden, bias = config.hidden_size, int(config.biases)

    def linear(fan_in: int, fan_out: int) -> int:
        return fan_in * fan_out + bias * fan_out

    norm = {"rms": 0, "rms_gain": hidden, "layer_norm": 2 * hidden}[config.norm]
    if config.mixer == "gau":
        expansion, key = config.gau_expansion_size, config.gau_key_size
        mixer = linear(hidden, 2 * expansion + key) + linear(expansion, hidden) + 2 * key * (1 + bias)
        layer = mixer + norm
    else:
        inner = config.num_heads * config.head_size
        ups = 2 if config.activation in GATED_ACTIVATIONS else 1
        wide = config.feed_forward_size
        feed_forward = ups * linear(hidden, wide) + linear(wide, hidden)
        layer = 3 * linear(hidden, inner) + linear(inner, hidden) + feed_forward + 2 * norm
    embeddings = (config.vocab_size + config.token_types) * hidden + norm
    final_norm = norm if config.residual == "pre" else 0
    head = 0 if config.tied_head else config.vocab_size * hidden
    return embeddings + config.num_layers * layer + final_norm + head


def flops_per_token(config: EncoderConfig, row_tokens: int, masked_share: float) -> float:
    """Floating point operations of forward and backward for one token of a row, matrix products only.

    A product of [m, k] and [k, n] costs 2mkn; the backward pass costs twice the forward pass (one product for
    the input, one for the weight), and nothing is counted for recomputation. Per token, forward:
        attention layer   2 * (4 D H K  +  2 D F [3 D F when gated]  +  2 L H K)
        GAU layer         2 * (D (2E + S)  +  E D  +  L S  +  L E)
        head              2 * D V * masked_share, because only the masked positions are predicted
    with row length L, hidden D, heads H, head size K, feed-forward F, GAU expansion E, GAU key size S,
    vocabulary V. Scores are counted over the whole row, which is what is computed, also when it holds several
    documents.

    Args:
        row_tokens: length of a row, tokens.
        masked_share: share of the tokens that are predicted, in [0, 1] (about 0.15).
    """
    hidden = config.hidden_size
    if config.mixer == "gau":
        expansion, key = config.gau_expansion_size, config.gau_key_size
        products = hidden * (2 * expansion + key) + expansion * hidden + row_tokens * (key + expansion)
    else:
        inner = config.num_heads * config.head_size
        matrices = 3 if config.activation in GATED_ACTIVATIONS else 2
        products = 4 * hidden * inner + matrices * hidden * config.feed_forward_size + 2 * row_tokens * inner
    forward = 2 * (config.num_layers * products + masked_share * hidden * config.vocab_size)
    return 3.0 * forward

"""Which settings of an encoder make sense, alone and together, and what to do about those that do not.

A setting that has no effect under the others is refused: a user who wrote it expects something of it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from .configuration import EncoderConfig


def find_problems(config: EncoderConfig) -> list[str]:
    """Everything that is wrong with `config`, one line each; whole numbers given for floats become floats."""
    problems = _type_problems(config)
    if problems:  # the comparisons below need the right types
        return problems
    return [
        *_range_problems(config),
        *_unused_settings(config),
        *_attention_problems(config),
        *_depth_problems(config),
    ]


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


_MAY_BE_ZERO = {"token_types", "pad_token_id", "value_head_size", "ramp_steps"}


def _range_problems(config: EncoderConfig) -> list[str]:
    problems = []
    for spec in fields(config):
        value = getattr(config, spec.name)
        if spec.type is int:
            least = 0 if spec.name in _MAY_BE_ZERO else 1
            if value < least:
                problems.append(f"{spec.name}: found {value}, expected at least {least}")
    for name in ("hidden_dropout", "attention_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            problems.append(f"{name}: found {getattr(config, name)}, expected a share in [0, 1)")
    if not 1e-37 < config.norm_epsilon < 1.0:  # below, it is 0 in fp32
        problems.append(
            f"norm_epsilon: found {config.norm_epsilon}, expected a small positive number such as 1e-12"
        )
    if not config.rotary_base > 1.0:
        problems.append(f"rotary_base: found {config.rotary_base}, expected more than 1, such as 10000")
    if not 0.0 <= config.hierarchical_alpha < 1.0 or config.hierarchical_alpha == 0.5:
        problems.append(
            f"hierarchical_alpha: found {config.hierarchical_alpha}, expected a number in [0, 1) other than 0.5, "
            "where positions (i, j) and (j, i) would be the same; the author's is 0.4"
        )
    if config.pad_token_id >= config.vocab_size:
        problems.append(
            f"pad_token_id: found {config.pad_token_id}, expected an id below vocab_size {config.vocab_size}"
        )
    return problems


_ATTENTION = ("num_heads", "head_size", "value_head_size", "talking_heads", "feed_forward_size", "activation")
_GATED = ("gau_expansion_size", "gau_key_size")


def _unused_settings(config: EncoderConfig) -> list[str]:
    foreign: list[tuple[str, str]] = []  # setting, what does not read it
    foreign += [(name, f"mixer {config.mixer}") for name in (_ATTENTION if config.gated else _GATED)]
    if config.mixer != "flash":
        foreign.append(("flash_chunk_size", f"mixer {config.mixer}"))
    if not config.rotary:
        foreign.append(("rotary_base", f"positions {config.positions}"))
    if config.positions != "learned":
        foreign.append(("hierarchical_alpha", f"positions {config.positions}"))
    if config.residual != "ramp":
        foreign.append(("ramp_steps", f"residual {config.residual}"))
    if config.initialisation == "bert":
        foreign.append(("fan_average", "initialisation bert (0.02 whatever the shape)"))
    defaults = {spec.name: spec.default for spec in fields(config)}
    return [
        f"{name}: found {getattr(config, name)!r}, which {reader} does not use; remove it"
        for name, reader in foreign
        if getattr(config, name) != defaults[name]
    ]


def _attention_problems(config: EncoderConfig) -> list[str]:
    problems = []
    if config.rotary and config.key_size % 2:
        name = "gau_key_size" if config.gated else "head_size"
        problems.append(
            f"{name}: found {config.key_size}, expected an even number (rotary positions turn pairs)"
        )
    if config.mixer == "flash" and not config.score_normaliser.startswith("relu_squared"):
        problems.append(
            f"score_normaliser: found {config.score_normaliser} with mixer flash; a softmax over a chunk and the "
            "linear attention beside it have no common scale: use relu_squared or relu_squared_n2"
        )
    if config.mixer == "flash" and config.context == "unilm":
        problems.append(
            "context: found unilm with mixer flash; its linear part sums whole chunks and cannot end where a prefix "
            "ends: use mixer attention or gau"
        )
    if config.context == "unilm" and config.token_types == 1:
        problems.append(
            "token_types: found 1 with context unilm, which marks what follows the prefix with type 1: use 2, or 0 "
            "to mark it without embedding the mark"
        )
    return problems


_OF_THE_BRANCHES = ("deepnorm", "su_sgd", "su_adam", "su_lamb", "auto")


def _depth_problems(config: EncoderConfig) -> list[str]:
    """Residual and initialisation: alpha on the skip and the gain of the branches belong together."""
    problems = []
    residual, initialisation = config.residual, config.initialisation
    found = f"residual: found {residual} with initialisation {initialisation}; "
    if residual == "deepnorm" and initialisation not in _OF_THE_BRANCHES:
        problems.append(
            f"{found}its alpha comes with the gain of the branches: set initialisation to deepnorm (the paper's) or "
            "to auto, su_sgd, su_adam or su_lamb (by optimizer family)"
        )
    elif initialisation == "deepnorm" and residual != "deepnorm":
        problems.append(
            f"{found}beta in the weights needs alpha on the skip: set both to deepnorm or neither"
        )
    elif residual in ("ramp", "rezero") and initialisation in _OF_THE_BRANCHES:
        problems.append(
            f"{found}the branches already start at nothing, and shrinking them as well would hold them there: use "
            "plain, roformer_v2, gau_alpha or bert"
        )
    elif residual == "post" and initialisation in ("su_sgd", "su_adam"):
        problems.append(
            f"{found}under this optimizer a stable depth needs alpha above 1 on the skip (kexue.fm/archives/8978): "
            "set residual to deepnorm"
        )
    if residual == "ramp" and config.ramp_steps == 0:
        problems.append("ramp_steps: found 0 with residual ramp, expected the updates that the ramp lasts")
    if initialisation == "gau_alpha" and not config.gated:
        problems.append(
            "initialisation: found gau_alpha with mixer attention; its exponent 1/3 is for "
            "three matrices in a branch and an attention branch has two: use roformer_v2"
        )
    if initialisation == "deepnorm" and config.fan_average not in ("published", "arithmetic"):
        problems.append(
            f"fan_average: found {config.fan_average} with initialisation deepnorm, which means the paper's and that "
            "is Xavier (arithmetic); for another fan take su_sgd, su_adam or su_lamb"
        )
    return problems

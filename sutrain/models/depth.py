"""How the skip and the initial branches depend on depth: alpha and gain. Torch-free.

S residual branches (2N for N transformer layers, N for N gated units), p matrices multiplied along a branch.

One optimizer step changes the model's output by an amount that must not grow with S. With branches of gain λ on
every matrix and a skip of weight α, the gradient of a matrix is of size λ^(p-1) / α, so that steps of size η∇ (SGD),
η sign ∇ (Adam) or η‖θ‖ sign ∇ (LAMB, AdaFactor) ask for

    SGD    λ^(p-1) / α = S^(-1/2)        Adam    λ^(p-1) / α = 1 / S        LAMB    λ^p / α = 1 / S

(kexue.fm/archives/8978 for p = 2; written for any p here). Behind a norm α = 1/λ is the author's choice for SGD and
Adam, α = 1 for LAMB; without one (pre) α is 1. For p = 2 that is the published table: (2N)^(1/4) and (2N)^(-1/4) for
SGD, (2N)^(1/2) and (2N)^(-1/2) for Adam, 1 and (2N)^(-1/2) for LAMB; for p = 3 the LAMB row is that of GAU-alpha.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from .configuration import EncoderConfig


class DepthRule(NamedTuple):
    """Weight of the skip, and gain of the matrices along a branch relative to 1 / sqrt(fan)."""

    alpha: float
    gain: float


def deepnorm_alpha(num_branches: int) -> float:
    """Weight of the skip in DeepNorm, encoder only: S^(1/4), which is (2N)^(1/4) for N transformer layers.

    arXiv 2203.00555, written in residual branches S so that a stack of GAU layers (S = N) needs no second
    formula.
    """
    return num_branches**0.25


def deepnorm_beta(num_branches: int) -> float:
    """Gain of the initial value, output and feed-forward weights: (4S)^(-1/4), which is (8N)^(-1/4)."""
    return (4 * num_branches) ** -0.25


def depth_rule(config: EncoderConfig) -> DepthRule:
    """Alpha and gain of a model. Raises ValueError for initialisation auto, which only an optimizer can resolve."""
    branches, factors = config.num_branches, 3 if config.gated else 2
    if config.initialisation == "deepnorm":
        return DepthRule(deepnorm_alpha(branches), deepnorm_beta(branches))
    if config.initialisation == "roformer_v2":
        return DepthRule(1.0, config.num_layers ** (-1 / 2))
    if config.initialisation == "gau_alpha":
        return DepthRule(1.0, config.num_layers ** (-1 / 3))
    if config.initialisation == "auto":
        raise ValueError(
            "model.initialisation: auto depends on the optimizer; pretraining resolves it, elsewhere name su_sgd, "
            "su_adam or su_lamb"
        )
    if config.initialisation == "su_lamb":
        return DepthRule(1.0, branches ** (-1 / factors))
    if config.initialisation in ("su_sgd", "su_adam"):
        power = 1 / 2 if config.initialisation == "su_sgd" else 1.0
        if config.residual == "pre":
            return DepthRule(1.0, branches ** (-power / (factors - 1)))
        gain = branches ** (-power / factors)
        return DepthRule(1 / gain, gain)
    return DepthRule(1.0, 1.0)


def describe(config: EncoderConfig) -> str:
    """One line on how a model starts, for people: its rule with the numbers."""
    rule = depth_rule(config)
    return (
        f"residual {config.residual}, initialisation {config.initialisation}: skip alpha {rule.alpha:.4g}, "
        f"branch gain {rule.gain:.4g} ({config.num_branches} branches)"
    )


def resolve_auto(config: EncoderConfig, family: Literal["sgd", "adam", "lamb"]) -> EncoderConfig:
    """The model with the rule of an optimizer family in place of initialisation auto; others come back as they are.

    Raises:
        EncoderConfigError: when the rule does not go with the model's residual.
    """
    if config.initialisation != "auto":
        return config
    return replace(config, initialisation=f"su_{family}")  # type: ignore[arg-type]

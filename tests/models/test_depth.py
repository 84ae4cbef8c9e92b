from dataclasses import replace

import pytest

from sutrain.models.configuration import EncoderConfig, EncoderConfigError
from sutrain.models.depth import depth_rule, describe, resolve_auto
from sutrain.models.encoder import Encoder
from tests.models.tiny import CONFIGS


def rule(residual, initialisation, layers=50, **settings):
    return depth_rule(
        EncoderConfig(num_layers=layers, residual=residual, initialisation=initialisation, **settings)
    )


@pytest.mark.parametrize(
    ("initialisation", "alpha", "gain"),
    [  # kexue.fm/archives/8978, N = 50: 2N = 100
        ("su_sgd", 100**0.25, 100**-0.25),
        ("su_adam", 10.0, 0.1),
        ("su_lamb", 1.0, 0.1),
        ("deepnorm", 100**0.25, 400**-0.25),  # arXiv 2203.00555
    ],
)
def test_the_published_table_behind_a_norm(initialisation, alpha, gain):
    assert rule("deepnorm", initialisation) == pytest.approx((alpha, gain))


@pytest.mark.parametrize(("initialisation", "gain"), [("su_sgd", 0.1), ("su_adam", 0.01), ("su_lamb", 0.1)])
def test_the_published_table_with_alpha_one(initialisation, gain):
    assert rule("pre", initialisation) == pytest.approx((1.0, gain))


def test_lamb_on_gated_units_is_gau_alpha():
    gau = {"layers": 24, "mixer": "gau"}
    assert rule("post", "su_lamb", **gau) == pytest.approx(rule("post", "gau_alpha", **gau))
    assert rule("post", "gau_alpha", **gau).gain == pytest.approx(24 ** (-1 / 3))


@pytest.mark.parametrize("residual", ["post", "pre", "deepnorm"])
@pytest.mark.parametrize("mixer", ["attention", "gau"])
@pytest.mark.parametrize(("initialisation", "power"), [("su_sgd", 0.5), ("su_adam", 1.0), ("su_lamb", 1.0)])
def test_every_rule_keeps_its_condition(residual, mixer, initialisation, power):
    """λ^(p-1) / α = S^-power for steps that ignore the size of a weight, λ^p / α = 1 / S for relative ones."""
    if residual == "post" and initialisation != "su_lamb":
        return
    factors, branches = (3, 50) if mixer == "gau" else (2, 100)
    alpha, gain = rule(residual, initialisation, mixer=mixer)
    exponent = factors if initialisation == "su_lamb" else factors - 1
    assert gain**exponent / alpha == pytest.approx(branches**-power)


def test_auto_is_the_row_of_the_optimizer_and_needs_one():
    config = EncoderConfig(residual="deepnorm", initialisation="auto")
    for family in ("sgd", "adam", "lamb"):
        assert resolve_auto(config, family) == replace(config, initialisation=f"su_{family}")
    assert resolve_auto(EncoderConfig(), "adam") == EncoderConfig()
    with pytest.raises(ValueError, match="auto depends on the optimizer"):
        Encoder(replace(CONFIGS["roformer_v2"], residual="deepnorm", initialisation="auto"))
    with pytest.raises(EncoderConfigError, match="set residual to deepnorm"):
        resolve_auto(EncoderConfig(initialisation="auto"), "adam")


def test_the_description_has_the_numbers():
    config = EncoderConfig(num_layers=100, residual="deepnorm", initialisation="deepnorm")
    text = describe(config)
    assert "alpha 3.761" in text and "gain 0.188" in text and "200 branches" in text

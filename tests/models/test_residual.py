from dataclasses import replace

import pytest
import torch

from sutrain.models.depth import deepnorm_alpha, deepnorm_beta
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.residual import Residual
from tests.models.tiny import CONFIGS, VARIANTS


def test_published_values_for_a_hundred_layers():
    """arXiv 2203.00555, encoder only: (2N)^(1/4) and (8N)^(-1/4), N = 100 layers of two branches."""
    assert deepnorm_alpha(200) == pytest.approx(3.7606, abs=5e-5)
    assert deepnorm_beta(200) == pytest.approx(0.1880, abs=5e-5)


def test_a_stack_of_gau_layers_has_one_branch_a_layer():
    assert CONFIGS["roformer_v2"].num_branches == 6
    assert CONFIGS["gau_alpha"].num_branches == 3
    deep = replace(CONFIGS["gau_alpha"], residual="deepnorm", initialisation="deepnorm", num_layers=24)
    assert Residual(deep).alpha == pytest.approx(24**0.25)


@pytest.mark.parametrize("kind", ["post", "pre", "deepnorm", "su_adam", "ramp", "rezero"])
def test_each_rule_is_its_formula(kind):
    settings = {
        "deepnorm": {"residual": "deepnorm", "initialisation": "deepnorm"},
        "su_adam": {"residual": "deepnorm", "initialisation": "su_adam"},
        "ramp": {"residual": "ramp", "ramp_steps": 8},
    }.get(kind, {"residual": kind})
    config = replace(CONFIGS["roformer_v2"], **settings, hidden_dropout=0.0)
    x, quarter = torch.randn(2, 5, 32), torch.tensor(0.25)
    scale = torch.tensor([0.125]) if kind == "rezero" else None
    # any two functions will do for norm and branch
    residual = Residual(config)
    change = residual.enter(x, torch.tanh, torch.float32).square()
    found = residual(x, change, torch.tanh, quarter, scale)
    expected = {
        "su_adam": torch.tanh(6**0.5 * x + x.square()),
        "ramp": torch.tanh(x + 0.25 * x.square()),
        "rezero": x + 0.125 * x.square(),
        "post": torch.tanh(x + x.square()),
        "pre": x + torch.tanh(x).square(),
        "deepnorm": torch.tanh(6**0.25 * x + x.square()),
    }[kind]
    torch.testing.assert_close(found, expected)


def test_dropout_falls_on_the_branch_alone():
    residual = Residual(replace(CONFIGS["roformer_v2"], hidden_dropout=0.5)).train()
    found = residual(torch.ones(10_000), torch.ones(10_000), torch.nn.Identity())
    assert set(found.tolist()) == {1.0, 3.0}


def test_a_ramp_grows_with_the_updates_and_stops_at_one():
    model = MaskedLanguageModel(VARIANTS["ramp"]).eval()
    tokens = torch.randint(5, 300, (2, 9))
    whole = model(tokens)  # as it is after training
    for updates, expected in ((0, 0.0), (4, 0.4), (10, 1.0), (1000, 1.0)):
        model.set_ramp(updates)
        assert model.encoder.ramp == expected
        if expected == 0.0:
            assert (model(tokens) - model.encoder.embeddings(tokens)).abs().max() < 1e-5
        assert torch.equal(model(tokens), whole) == (expected == 1.0)

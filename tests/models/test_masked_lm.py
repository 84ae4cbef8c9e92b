import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models.tiny import CONFIGS


@pytest.mark.parametrize("layers", [6, 12])
def test_the_first_loss_is_that_of_a_uniform_guess(layers):
    config = EncoderConfig(hidden_size=192, num_layers=layers, num_heads=3, feed_forward_size=768)
    model = MaskedLanguageModel(config).eval()
    tokens = torch.randint(5, config.vocab_size, (2, 64))
    targets = torch.randint(5, config.vocab_size, (2, 64))
    with torch.no_grad():
        loss = F.cross_entropy(model.logits(model(tokens).flatten(0, 1)), targets.flatten()).item()
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.15)


def test_a_tied_head_is_the_token_embedding_and_an_untied_one_its_own():
    tied = MaskedLanguageModel(CONFIGS["roformer_v2"]).eval()
    hidden = torch.randn(7, 32)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.encoder.embeddings.token.weight.T)
    untied = MaskedLanguageModel(CONFIGS["pre"]).eval()
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.head.weight.T)
    assert "head.weight" in untied.state_dict() and "head.weight" not in tied.state_dict()


@pytest.mark.parametrize("name", ["roformer_v2", "pre", "bert"])
def test_layers_spread_over_devices_end_elsewhere_than_the_head_begins(name):
    """As device_map="auto" of transformers spreads them; devices and numbers are made up."""
    model = MaskedLanguageModel(CONFIGS[name]).eval()
    with FakeTensorMode(), torch.no_grad():
        for part, weights in [(part, part._parameters) for part in model.modules()]:
            device = "cuda:1" if part in (model, model.transform) else "cuda:0"
            for key, weight in weights.items():
                if weight is not None:
                    weights[key] = nn.Parameter(torch.empty(weight.shape, device=device), False)
        if model.transform is not None:  # on one device, as the library's hooks have it
            model.transform = nn.Identity()
        scores = model.logits(torch.empty(7, 32, device="cuda:1"))
    assert scores.shape == (7, 300) and scores.device == torch.device("cuda:0")


def test_dropout_comes_before_the_head():
    model = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], hidden_dropout=0.5)).train()
    hidden = torch.ones(1, 32)
    torch.manual_seed(3)
    found = model.logits(hidden)
    torch.manual_seed(3)
    expected = F.dropout(hidden, 0.5) @ model.encoder.embeddings.token.weight.T
    torch.testing.assert_close(found, expected)


def test_every_kind_of_model_learns(config):
    """A few steps on one batch, where half of the tokens are hidden, bring the loss well below the start."""
    model = MaskedLanguageModel(replace(config, hidden_dropout=0.0, attention_dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    tokens = torch.randint(5, 15, (4, 12))
    hidden_BL = torch.rand(tokens.shape) < 0.5
    losses = []
    for _ in range(15):
        states = model(tokens.masked_fill(hidden_BL, 4))
        loss = F.cross_entropy(model.logits(states[hidden_BL]), tokens[hidden_BL])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2

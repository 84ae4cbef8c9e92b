"""Probes: ‖ΔF‖ and attention entropy equal those computed by hand; nothing of the training is touched."""

import math

import pytest
import torch

from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.monitor.probes import Probe
from sutrain.optim import FragmentMap

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_layers": 3, "max_row_tokens": 12}
ATTENTION = {**SMALL, "num_heads": 2, "head_size": 8, "feed_forward_size": 32}
GAU = {**SMALL, "mixer": "gau", "gau_expansion_size": 32, "gau_key_size": 8, "initialisation": "gau_alpha"}


@pytest.fixture(params=[ATTENTION, GAU], ids=["attention", "gau"])
def setting(request):
    torch.manual_seed(1)
    config = EncoderConfig(**request.param)
    model = MaskedLanguageModel(config)
    tokens = torch.randint(5, 60, (2, 12))
    documents = torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    probe = Probe(config, FragmentMap.whole(model.named_parameters()), 10, tokens, documents)
    return model, probe, tokens, documents


@torch.no_grad()
def change(model, size):
    for parameter in model.parameters():
        parameter += size * torch.randn_like(parameter)


def test_model_update_is_the_change_of_the_output_at_real_tokens(setting):
    model, probe, tokens, documents = setting
    model.eval()
    with torch.no_grad():
        probe.before()
        before = model(tokens, documents)
        change(model, 1e-3)
        after = model(tokens, documents)
    expected = (after - before)[documents > 0].square().mean().sqrt()
    assert probe.after()["model_update"] == pytest.approx(float(expected), rel=1e-5)


def test_a_step_that_changes_nothing_has_no_update(setting):
    _, probe, *_ = setting
    probe.before()
    assert probe.after()["model_update"] == 0.0


def test_equal_scores_have_the_entropy_of_the_documents_length(setting):
    """With all scores equal a token attends evenly to its document: ln 5, ln 7 and ln 9 nats."""
    model, probe, *_ = setting
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("mixer.query", "mixer.key")):
                parameter.zero_()
    probe.before()
    expected = sum(n * math.log(n) for n in (5, 7, 9)) / 21
    assert probe.after()["attention_entropy"] == pytest.approx([expected] * 3, abs=1e-5)


def test_neither_weights_nor_random_streams_are_touched(setting):
    model, probe, *_ = setting
    weights = [parameter.clone() for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    probe.before()
    probe.after()
    assert all((a == b).all() for a, b in zip(weights, model.parameters(), strict=True))
    assert (torch.random.get_rng_state() == state).all()


def test_building_a_probe_draws_nothing():
    config = EncoderConfig(**ATTENTION)
    fragments = FragmentMap.whole(MaskedLanguageModel(config).named_parameters())
    state = torch.random.get_rng_state()
    Probe(config, fragments, 10, torch.ones(1, 12, dtype=torch.long), torch.ones(1, 12, dtype=torch.long))
    assert (torch.random.get_rng_state() == state).all()


def test_the_first_update_of_a_process_and_every_nth_are_probed(setting):
    _, probe, *_ = setting
    assert [step for step in range(7, 32) if probe.due(step)] == [7, 10, 20, 30]
    config = EncoderConfig(**ATTENTION)
    off = Probe(config, probe.fragments, 0, probe.tokens_BL, probe.document_BL)
    assert not any(off.due(step) for step in range(20)) and off.model is None

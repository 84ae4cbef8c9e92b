"""Probes: ‖ΔF‖ and attention entropy equal those computed by hand; nothing of the training is touched."""

import copy
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
    probe = Probe(config, FragmentMap.whole(model.named_parameters()), tokens, documents, 10)
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


@torch.no_grad()
def test_a_small_update_is_measured_as_in_double_precision(setting):
    """At a relative update of 1e-5, where bf16 sees nothing but rounding, within 5 % of float64."""
    model, probe, tokens, documents = setting
    model.eval()
    exact = copy.deepcopy(model).double()
    exact.encoder.take_rows_apart = False
    draws = [torch.randn_like(parameter) for parameter in model.parameters()]
    probe.before()
    before = exact(tokens, documents)
    for parameter, twin, draw in zip(model.parameters(), exact.parameters(), draws, strict=True):
        step = 1e-5 * parameter.norm() / draw.norm() * draw
        parameter += step
        twin.copy_(parameter.double())
    found = probe.after()
    expected = float((exact(tokens, documents) - before)[documents > 0].square().mean().sqrt())
    assert found["model_update"] == pytest.approx(expected, rel=0.05)
    assert 0 < found["model_update_noise"] < expected / 3 and not found["model_update_is_noise"]
    probe.before()
    for parameter in model.parameters():
        parameter *= 1 + 2e-8
    assert probe.after()["model_update_is_noise"]


@torch.no_grad()
def test_what_layers_do_equals_the_numbers_from_their_outputs(setting):
    model, probe, tokens, documents = setting
    model.eval()
    model.encoder.take_rows_apart = False
    probe.before()
    found = probe.after()
    outputs = []
    model.encoder(tokens, documents, layer_outputs=outputs)
    real = [x[documents > 0] for x in outputs]
    for layer in range(3):
        change = (real[layer + 1] - real[layer]).norm() / real[layer].norm()
        assert found["relative_change"][layer] == pytest.approx(float(change), rel=1e-4)
        assert found["activation_rms"][layer] == pytest.approx(
            float(real[layer + 1].square().mean().sqrt()), rel=1e-4
        )
        assert 0 < found["mixer_branch_share"][layer] < 10 and 0 <= found["dead_units_share"][layer] < 1
    assert ("feed_forward_branch_share" in found) == (model.config.mixer == "attention")
    logits = model.logits(real[-1])
    centred = logits - logits.mean(-1, keepdim=True)
    assert found["logit_rms"] == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-4)
    assert found["logit_max"] == pytest.approx(float(centred.max()), rel=1e-4)


def test_units_that_are_dead_are_counted():
    config = EncoderConfig(**ATTENTION)
    model = MaskedLanguageModel(config)
    with torch.no_grad():
        model.encoder.layers[1].feed_forward.up.weight[:8] = 0  # 8 of 32 units
    documents = torch.ones(2, 12, dtype=torch.long)
    probe = Probe(config, FragmentMap.whole(model.named_parameters()), documents + 5, documents, 10)
    probe.before()
    assert probe.after()["dead_units_share"][1] >= 8 / 32


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
    Probe(config, fragments, torch.ones(1, 12, dtype=torch.long), torch.ones(1, 12, dtype=torch.long))
    assert (torch.random.get_rng_state() == state).all()


def test_the_first_update_of_a_process_and_every_nth_are_probed(setting):
    _, probe, *_ = setting
    assert [step for step in range(7, 32) if probe.due(step)] == [7, 10, 20, 30]
    config = EncoderConfig(**ATTENTION)
    off = Probe(config, probe.fragments, probe.tokens_BL, probe.document_BL, 0)
    assert not any(off.due(step) for step in range(20)) and off.model is None

import itertools
from dataclasses import replace

import pytest
import torch

from sutrain.models import gates
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.recompute import BudgetError, apply_budget, measure_layer, plan_recomputation
from tests.models.tiny import CONFIGS

CPU = torch.device("cpu")
TOKENS = torch.randint(5, 300, (2, 24))


def bytes_held(model):
    """What autograd keeps between a forward and a backward pass, each storage once, without weights."""
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.encoder(TOKENS)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = sum(storage.nbytes() for address, storage in held.items() if address not in weights)
    return total, output


@pytest.mark.parametrize(
    ("name", "again_from"),
    [("roformer_v2", 1024), ("gau_alpha", 1024), ("gau_alpha", 1), ("deepnorm", 1024), ("pre", 1024)],
)
def test_a_layers_measure_is_what_another_layer_costs(name, again_from, monkeypatch):
    """The difference between 5 and 4 layers of a whole model, which knows nothing of the measurement."""
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", again_from)
    config = replace(CONFIGS[name], hidden_dropout=0.1, attention_dropout=0.0)
    totals = [bytes_held(MaskedLanguageModel(replace(config, num_layers=n)).train())[0] for n in (4, 5)]
    measured, _ = measure_layer(config, 2, 24, torch.float32, CPU)
    assert totals[1] - totals[0] == pytest.approx(measured, rel=0.05)


def test_under_zero_3_a_gated_unit_is_measured_with_all_that_it_keeps(monkeypatch):
    kept = measure_layer(CONFIGS["gau_alpha"], 2, 24, torch.float32, CPU)
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 24)
    less = measure_layer(CONFIGS["gau_alpha"], 2, 24, torch.float32, CPU, zero_stage=2)
    assert less < kept == measure_layer(CONFIGS["gau_alpha"], 2, 24, torch.float32, CPU, zero_stage=3)


def test_the_measurement_leaves_the_random_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_layer(CONFIGS["roformer_v2"], 2, 24, torch.float32, CPU)
    assert torch.equal(torch.rand(4), expected)


def test_the_fewest_layers_are_computed_again():
    """Against every plan there is: none that fits computes fewer layers again."""
    layers, layer, between = 30, 100, 10

    def peak(again, together):
        kept = (layers - again) * layer
        return -(-again // together) * between + max(kept, together * layer if again else 0)

    for budget in (600, 700, 1000, 2000, 2999, 3000):
        plan = plan_recomputation(layers, layer, between, budget)
        fitting = [k for k, t in itertools.product(range(31), range(1, 31)) if peak(k, t) <= budget]
        assert plan.layers == min(fitting) and plan.peak_bytes == peak(plan.layers, plan.together) <= budget
    with pytest.raises(BudgetError, match="expected at least"):
        plan_recomputation(layers, layer * 2**20, between * 2**20, 100 * 2**20)


def test_a_thousand_layers_fit_into_a_small_part_of_their_memory():
    plan = plan_recomputation(1000, 100, 10, 4500)
    assert plan.together > 1 and plan.peak_bytes <= 4500 < 1000 * 100 / 20


@pytest.mark.parametrize(("again", "together"), [(7, 1), (5, 2), (7, 3), (0, 1)])
def test_computing_again_changes_memory_and_not_gradients(again, together):
    model = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], num_layers=7)).train()
    found = []
    for layers, at_a_time in ((0, 1), (again, together)):
        model.encoder.recompute_layers, model.encoder.recompute_together = layers, at_a_time
        model.zero_grad()
        torch.manual_seed(1)  # dropout is replayed
        held, output = bytes_held(model)
        output.square().mul(torch.arange(32)).sum().backward()
        found.append((held, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (everything, expected), (less, gradients) = found
    assert (less < 0.7 * everything) == (again > 0)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_a_budget_is_applied_and_held():
    config = EncoderConfig(
        vocab_size=300, hidden_size=32, num_layers=60, num_heads=2, head_size=16, feed_forward_size=64
    )
    model = MaskedLanguageModel(config).train()
    everything, _ = bytes_held(model)
    budget = everything / 4 / 2**20
    line = apply_budget(model.encoder, budget, 2, 24, torch.float32, CPU)
    assert "of 60 layers computed again" in line
    held, _ = bytes_held(model)
    assert held < 1.05 * budget * 2**20 < everything / 3
    assert "all kept" in apply_budget(model.encoder, None, 2, 24, torch.float32, CPU)


def test_the_plan_of_flash_says_what_it_was_measured_with():
    for name, expected in (("flash", True), ("gau_alpha", False)):
        encoder = MaskedLanguageModel(CONFIGS[name]).encoder
        line = apply_budget(encoder, 1000, 2, 24, torch.float32, CPU)
        assert line.endswith("documents that do not fill their chunks need more") == expected, line

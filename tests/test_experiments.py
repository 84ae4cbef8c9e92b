"""The experiments' claims with bounds: the quick ones always, the others with `make test-slow`."""

import math

import pytest
import torch
from torch.nn import functional as F

from experiments import (
    fan_average,
    gau_output,
    length_transfer,
    relative_change,
    trainability,
    update_size,
    warm_up,
)
from experiments.common import slope
from sutrain.models import init
from sutrain.models.init import truncated_normal_
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.visibility import entropy_scale


def test_moments_of_silu_and_the_size_of_a_gated_unit_at_the_start():
    mean, square = gau_output.silu_moments()
    assert mean == pytest.approx(0.20662, abs=1e-5) and square == pytest.approx(0.35578, abs=1e-5)
    for length in (64, 512):
        found = gau_output.output_size("relu_squared", length, seeds=1)
        assert found == pytest.approx(gau_output.ANCHORS[length], rel=0.1)


def test_attention_keeps_its_entropy_with_log_n_and_not_without():
    """Queries and keys uniform on the sphere of radius sqrt(d), five times as sharp, 64 against 4096 keys.

    kexue.fm/archives/8823 derives log n for this case; measured before: 1.05 to 2.48 nats without, 1.67 to 1.64 with.
    """
    torch.manual_seed(0)
    entropies = {("plain", 64): 0.0, ("plain", 4096): 0.0, ("log n", 64): 0.0, ("log n", 4096): 0.0}
    for length in (64, 4096):
        for _ in range(10):
            queries, keys = (8 * F.normalize(torch.randn(n, 64), dim=-1) for n in (50, length))
            scores = 5 * queries @ keys.T / 8
            for name, factor in (("plain", 1.0), ("log n", float(entropy_scale(torch.tensor(length))))):
                logarithm = torch.log_softmax(scores * factor, -1)
                entropies[name, length] += -(logarithm.exp() * logarithm).sum(-1).mean().item() / 10
    assert entropies["plain", 4096] - entropies["plain", 64] > 1.2
    assert abs(entropies["log n", 4096] - entropies["log n", 64]) < 0.15


def test_the_geometric_fan_keeps_the_size():
    assert fan_average.second_moment("geometric") == pytest.approx(1.0, abs=0.03)
    assert fan_average.second_moment("arithmetic") == pytest.approx(0.640, abs=0.02)
    assert fan_average.second_moment("quadratic") == pytest.approx(0.346, abs=0.012)


def test_a_cut_normal_without_correction_is_narrower():
    weight = torch.empty(1000, 1000)
    truncated_normal_(weight, 1.0)
    assert weight.std().item() == pytest.approx(1.0, abs=0.002)
    wide = weight.abs().max().item() / 2  # the deviation ahead of the cut
    assert 1 / wide == pytest.approx(0.8796, abs=0.002)


def test_what_a_cut_leaves_is_measured_and_not_taken_from_the_model(monkeypatch):
    assert warm_up.cut_deviation() * init.TRUNCATION_CORRECTION == pytest.approx(1.0, abs=0.001)
    monkeypatch.setattr(init, "TRUNCATION_CORRECTION", 1.3)
    assert warm_up.cut_deviation() == pytest.approx(0.8796, abs=0.001)


def test_pre_norm_waters_depth_down_and_deepnorm_changes_a_percent():
    pre, size = relative_change.relative_changes("pre")
    assert pre[0] > 0.5 and pre[-1] < pre[0] / 3 and 5 < size < 12
    deepnorm, _ = relative_change.relative_changes("deepnorm")
    assert min(deepnorm) > 0.003 and max(deepnorm) < 0.03


def test_a_slope_is_an_exponent():
    assert slope([6, 12, 24], [3 * n**0.4 for n in (6, 12, 24)]) == pytest.approx(0.4)


def test_branches_from_0_02_and_from_lecun_have_the_sizes_measured_before():
    assert warm_up.cut_deviation() == pytest.approx(0.8796, abs=0.002)
    for deviation, place in ((0.02, 0), (None, 1)):
        for branch, size in warm_up.branch_sizes(deviation).items():
            assert size == pytest.approx(warm_up.BRANCHES[branch][place], rel=0.1)


def test_reading_at_a_length_sees_every_character_once_and_the_entropy_of_its_rows(monkeypatch):
    """Queries of nothing look everywhere alike: the entropy is ln of the length."""
    monkeypatch.setattr(length_transfer, "READ_TOKENS", 4096)
    monkeypatch.setattr(length_transfer, "LAYERS", 1)
    text = torch.randint(3, 40, (5000,))
    model = MaskedLanguageModel(length_transfer.model_config("softmax_plus", 40)).eval()
    torch.nn.init.zeros_(model.encoder.layers[0].mixer.query.weight)
    for length in (64, 1024):
        rows = torch.cat(list(length_transfer.rows_of(text, length)))
        assert rows.shape[1] == length and torch.equal(rows.flatten(), text[:4096])
        accuracy, entropy = length_transfer.read(model, text, length)
        assert entropy == pytest.approx(math.log(length), abs=1e-3) and 0 <= accuracy < 0.2


@pytest.mark.slow
def test_the_first_update_against_depth(evidence):
    finding = update_size.run()
    evidence(rows=finding.rows)
    refuted = {claim for claim, holds in finding.checks if not holds and "the one before" not in claim}
    assert refuted == {"DeepNorm bounds the update under Adam as well (below 0.2)"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("depth", [24, 60])
def test_depth_without_warm_up(depth, evidence):
    found = {
        kind: trainability.mean_tail(trainability.train(trainability.transformer(kind, depth), 250))
        for kind in ("post", "deepnorm")
    }
    evidence(losses=found)
    assert found["post"] > 2.9 and found["deepnorm"] < 0.3


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "number, depth, low, high",
    [
        pytest.param(
            *(0, 48, 0.0, 1.0), marks=pytest.mark.xfail(reason="2.81 here, 0.73 before: LOG.md", strict=True)
        ),
        (1, 48, 0.0, 1.0),  # softmax
        (2, 48, 0.0, 1.0),
        (2, 120, 0.0, 0.6),  # softmax with GAU-alpha's initialisation of the third order
        (1, 120, 2.5, math.inf),  # the same without it
    ],
)
def test_depth_of_gated_units_without_warm_up(number, depth, low, high, evidence):
    kind = trainability.GATED[number]
    found = trainability.mean_tail(trainability.train(kind.config(depth), 200, kind.tokens))
    evidence(kind=kind.label, loss=found)
    assert low < found < high

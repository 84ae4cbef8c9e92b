import math
from dataclasses import replace

import pytest
import torch

from sutrain.models.encoder import Encoder
from sutrain.models.init import average_fan, truncated_normal_
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models.tiny import CONFIGS, VARIANTS

BIG = {
    "vocab_size": 2000,
    "hidden_size": 192,
}  # large enough for a standard deviation to be known to a percent


def deviations(model):
    """Parameter name without the layer number -> standard deviation, of matrices."""
    return {n.replace("encoder.", ""): p.std().item() for n, p in model.named_parameters() if p.dim() == 2}


def test_the_cut_normal_has_the_deviation_asked_for():
    weight = torch.empty(2000, 1000)
    truncated_normal_(weight, 0.05)
    assert weight.std().item() == pytest.approx(0.05, rel=2e-3)
    assert weight.abs().max() <= 2 * 0.05 * 1.1368472
    assert weight.abs().max() > 1.99 * 0.05 * 1.1368472


@pytest.mark.parametrize(("name", "order"), [("roformer_v2", 2), ("gau_alpha", 3)])
def test_roformer_v2_and_gau_alpha_scale_by_depth_and_fan_in(name, order):
    config = replace(CONFIGS[name], **BIG)
    model = MaskedLanguageModel(config)
    for key, found in deviations(model).items():
        if "token_type" in key:
            continue  # two rows say little
        fan_in = dict(model.named_parameters())["encoder." + key].shape[1]
        wanted = config.num_layers ** (-1 / order) / math.sqrt(fan_in)
        assert found == pytest.approx(wanted, rel=0.03), key


def test_fan_in_is_the_second_axis_of_a_torch_weight():
    config = replace(CONFIGS["roformer_v2"], hidden_size=64, feed_forward_size=1024)
    found = deviations(Encoder(config))
    assert found["layers.0.feed_forward.up.weight"] == pytest.approx((3 * 64) ** -0.5, rel=0.02)
    assert found["layers.0.feed_forward.down.weight"] == pytest.approx((3 * 1024) ** -0.5, rel=0.02)


def test_deepnorm_scales_value_output_and_feed_forward_only():
    config = replace(CONFIGS["deepnorm"], hidden_size=256, num_heads=4, head_size=32, feed_forward_size=512)
    model = Encoder(config)
    beta = (8 * config.num_layers) ** -0.25
    for name, found in deviations(model).items():
        if "layers" not in name:
            continue
        fan_out, fan_in = dict(model.named_parameters())[name].shape
        gain = 1.0 if "query" in name or "key" in name else beta
        assert found == pytest.approx(gain * math.sqrt(2 / (fan_in + fan_out)), rel=0.02), name
    assert found > 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_deepnorm_in_a_gau_scales_value_and_output_only():
    config = replace(
        CONFIGS["gau_alpha"],
        hidden_size=256,
        gau_expansion_size=512,
        gau_key_size=128,
        residual="deepnorm",
        initialisation="deepnorm",
    )
    mixer = Encoder(config).layers[1].mixer
    beta = (4 * config.num_layers) ** -0.25
    gate, value, shared = mixer.input.weight.split((512, 512, 128))
    for weight, gain in ((gate, 1.0), (value, beta), (shared, 1.0), (mixer.output.weight, beta)):
        assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / sum(weight.shape)), rel=0.02)


def test_bert_cuts_its_normal_without_correcting_it():
    model = Encoder(replace(CONFIGS["roformer_v2"], **BIG, initialisation="bert"))
    found = deviations(model)["layers.1.mixer.query.weight"]
    assert found == pytest.approx(0.8796 * 0.02, rel=0.02)


def test_the_scales_of_a_gau_start_at_one():
    mixer = Encoder(CONFIGS["gau_alpha"]).layers[0].mixer
    assert (mixer.query_scale == 1).all() and (mixer.key_scale == 1).all()
    names = [name for name, _ in mixer.named_parameters()]
    assert set(names) == {"input.weight", "query_scale", "key_scale", "output.weight"}


@pytest.mark.parametrize(
    ("average", "fan", "second_moment"),
    [  # kexue.fm/archives/8725, a map of 256 to 1024 features and one back
        ("fan_in", 256, None),
        ("arithmetic", 640, 0.640),
        ("geometric", 512, 1.0),
        ("quadratic", (256**2 + 1024**2) / 1280, 0.346),
    ],
)
def test_fan_averages_and_what_two_maps_make_of_a_vector(average, fan, second_moment):
    assert average_fan(256, 1024, average) == pytest.approx(fan)
    config = replace(
        CONFIGS["roformer_v2"],
        hidden_size=256,
        feed_forward_size=1024,
        initialisation="plain",
        fan_average=average,
    )
    up, down = (getattr(Encoder(config).layers[1].feed_forward, part).weight for part in ("up", "down"))
    assert up.std().item() == pytest.approx(fan**-0.5, rel=0.02)
    if second_moment is not None:
        x = torch.randn(400, 256)
        assert (x @ up.T @ down.T).square().mean().item() == pytest.approx(second_moment, rel=0.03)


def test_rules_by_optimizer_scale_the_branch_and_leave_queries_and_embeddings():
    config = replace(
        CONFIGS["roformer_v2"], **BIG, residual="deepnorm", initialisation="su_adam", activation="swiglu"
    )
    found = deviations(Encoder(config))
    gain = 6**-0.5
    for part, factor in {
        "layers.1.mixer.query": 1.0,
        "layers.1.mixer.value": gain,
        "layers.1.feed_forward.up": gain,
        "layers.1.feed_forward.gate": 1.0,  # or a gated block would have three factors
        "embeddings.token": 1.0,
    }.items():
        assert found[f"{part}.weight"] == pytest.approx(factor * 192**-0.5, rel=0.05), part


def test_rules_by_optimizer_scale_three_factors_of_a_gated_unit():
    config = replace(
        CONFIGS["gau_alpha"],
        hidden_size=256,
        gau_expansion_size=512,
        gau_key_size=128,
        residual="deepnorm",
        initialisation="su_adam",
        fan_average="arithmetic",
    )
    mixer = Encoder(config).layers[1].mixer
    gain = 3 ** (-1 / 3)
    gate, value, shared = mixer.input.weight.split((512, 512, 128))
    for weight, factor in ((gate, gain), (value, gain), (shared, 1.0), (mixer.output.weight, gain)):
        assert weight.std().item() == pytest.approx(factor * (2 / sum(weight.shape)) ** 0.5, rel=0.02)


def test_rezero_starts_as_its_embeddings():
    encoder = Encoder(VARIANTS["rezero"]).eval()
    tokens = torch.randint(5, 300, (2, 9))
    assert torch.equal(encoder(tokens), encoder.embeddings(tokens))
    assert not [name for name, _ in encoder.named_parameters() if "norm" in name]

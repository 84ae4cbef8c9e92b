from dataclasses import fields, replace

import pydantic
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sutrain.models.configuration import EncoderConfig, EncoderConfigError, flops_per_token, parameter_count
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models.tiny import VARIANTS

PUBLISHED = {  # kexue.fm/archives/8998 and 9052, vocabulary 12000
    "roformer_v2_small": (
        EncoderConfig(hidden_size=384, num_layers=6, num_heads=6, feed_forward_size=1536),
        15_225_600,
    ),
    "roformer_v2_base": (EncoderConfig(), 94_152_192),
    "roformer_v2_large": (
        EncoderConfig(hidden_size=1024, num_layers=24, num_heads=16, feed_forward_size=4096),
        314_279_936,
    ),
    "gau_alpha": (
        EncoderConfig(
            num_layers=24, mixer="gau", score_normaliser="softmax_plus", initialisation="gau_alpha"
        ),
        96_517_632,
    ),
}


def built_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaskedLanguageModel(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_to_the_unit(name):
    config, expected = PUBLISHED[name]
    assert parameter_count(config) == expected
    assert built_parameters(config) == expected


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"biases": True},
        {"norm": "layer_norm"},
        {"norm": "rms_gain"},
        {"tied_head": False},
        {"token_types": 0},
        {"residual": "pre", "norm": "layer_norm"},
    ],
    ids=str,
)
def test_parameter_count_is_that_of_the_built_model(config, change):
    if config.residual == "deepnorm" and "residual" in change:
        change = {}
    config = replace(config, **change)
    assert parameter_count(config) == built_parameters(config)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_choice_has_the_parameters_that_are_counted(name):
    assert parameter_count(VARIANTS[name]) == built_parameters(VARIANTS[name])


@pytest.mark.parametrize("masked", [0, 7, 40])
def test_flops_are_those_that_torch_counts(config, masked):
    """bf16 on a CPU takes the path of plain products, which the counter sees one by one."""
    rows, row_tokens = 2, 24
    model = MaskedLanguageModel(replace(config, hidden_dropout=0.0)).bfloat16()
    tokens = torch.randint(5, config.vocab_size, (rows, row_tokens))
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, positions_M=torch.arange(masked) if masked else None)
        loss = hidden.float().sum()
        if masked:
            loss = loss + model.logits(hidden).float().sum()
        loss.backward()
    share = masked / (rows * row_tokens)
    assert counter.get_total_flops() == pytest.approx(
        flops_per_token(config, row_tokens, share) * rows * row_tokens
    )


def test_every_problem_is_reported_at_once():
    with pytest.raises(EncoderConfigError) as error:
        EncoderConfig(vocab_size="many", num_layers=True, norm="batch", hidden_size=1.5)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "model.vocab_size: found 'many', expected int" in lines
    assert any("model.norm" in line and "rms, rms_gain, layer_norm" in line for line in lines)

    with pytest.raises(EncoderConfigError) as error:
        EncoderConfig(
            head_size=7, hidden_dropout=1.0, pad_token_id=12000, gau_key_size=64, residual="deepnorm"
        )
    text = str(error.value)
    for name in ("head_size", "hidden_dropout", "pad_token_id", "gau_key_size", "residual"):
        assert f"model.{name}: found" in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"mixer": "gau", "feed_forward_size": 64},
            "feed_forward_size: found 64, which mixer gau does not use",
        ),
        ({"mixer": "gau", "gau_key_size": 9}, "gau_key_size: found 9, expected an even number"),
        ({"initialisation": "gau_alpha"}, "use roformer_v2"),
        ({"initialisation": "deepnorm"}, "set both to deepnorm or neither"),
        ({"residual": "deepnorm"}, "its alpha comes with the gain of the branches"),
        ({"residual": "ramp", "ramp_steps": 10, "initialisation": "su_lamb"}, "already start at nothing"),
        ({"residual": "ramp"}, "expected the updates that the ramp lasts"),
        ({"ramp_steps": 10}, "which residual post does not use"),
        ({"initialisation": "su_adam"}, "set residual to deepnorm"),
        ({"mixer": "flash", "initialisation": "gau_alpha"}, "no common scale"),
        ({"mixer": "flash", "score_normaliser": "relu_squared", "context": "unilm"}, "where a prefix"),
        ({"mixer": "gau", "talking_heads": "both"}, "which mixer gau does not use"),
        ({"flash_chunk_size": 64}, "which mixer attention does not use"),
        ({"positions": "learned", "rotary_base": 500.0}, "which positions learned does not use"),
        ({"hierarchical_alpha": 0.4}, "which positions rotary does not use"),
        ({"positions": "learned", "hierarchical_alpha": 0.5}, "would be the same"),
        ({"initialisation": "bert", "fan_average": "geometric"}, "0.02 whatever the shape"),
        (
            {"residual": "deepnorm", "initialisation": "deepnorm", "fan_average": "geometric"},
            "which means the paper's",
        ),
        ({"context": "unilm", "token_types": 1}, "marks what follows the prefix"),
        ({"num_layers": 0}, "num_layers: found 0, expected at least 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"rotary_base": 1}, "rotary_base"),
    ],
    ids=str,
)
def test_meaningless_combinations_say_what_to_do(settings, expected):
    with pytest.raises(EncoderConfigError, match=expected):
        EncoderConfig(**settings)


def test_a_typed_tree_refuses_unknown_fields():
    adapter = pydantic.TypeAdapter(EncoderConfig)
    assert adapter.validate_python({"rotary_base": 10000}) == EncoderConfig()
    with pytest.raises(pydantic.ValidationError, match="hiden_size"):
        adapter.validate_python({"hiden_size": 768})


def test_every_field_has_help_and_a_default():
    for setting in fields(EncoderConfig):
        assert setting.metadata["help"]
    assert isinstance(EncoderConfig().rotary_base, float)

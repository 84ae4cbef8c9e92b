"""Whole models against other people's: torchscale's DeepNorm, and BERT and RoFormer of transformers."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RoFormerConfig, RoFormerModel

from sutrain.models.configuration import EncoderConfig
from sutrain.models.depth import deepnorm_alpha, deepnorm_beta
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models import reference
from tests.models.tiny import CONFIGS, VARIANTS

TOKENS = torch.tensor([[2, *range(10, 40), 3, 0, 0, 0, 0], [2, *range(50, 84), 3]])
MASK = (TOKENS != 0).long()
SIZES = {"vocab_size": 300, "hidden_size": 24, "num_layers": 3}
HEADS = {"num_heads": 3, "head_size": 8, "feed_forward_size": 48}


def copy_into(model, mapping, source):
    """Copy `source` tensors by (our name -> their name); every one of ours must be named."""
    state = model.state_dict()
    assert mapping.keys() == state.keys()
    model.load_state_dict({ours: source[theirs] for ours, theirs in mapping.items()})


def shaken(module):
    """The module with every parameter moved, so that no gain is 1 and no bias 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


LINEARS = {  # ours -> BERT's within a layer
    "mixer.query": "attention.self.query",
    "mixer.key": "attention.self.key",
    "mixer.value": "attention.self.value",
    "mixer.output": "attention.output.dense",
    "mixer_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
EMBEDDINGS = {
    "encoder.embeddings.token.weight": "embeddings.word_embeddings.weight",
    "encoder.embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
    "encoder.embeddings.norm.weight": "embeddings.LayerNorm.weight",
    "encoder.embeddings.norm.bias": "embeddings.LayerNorm.bias",
}


def bert_names(prefix, layers=3):
    """Our encoder's names -> those of a BERT in transformers."""
    names = {ours: prefix + theirs for ours, theirs in EMBEDDINGS.items()}
    for number in range(layers):
        for ours, theirs in LINEARS.items():
            for kind in ("weight", "bias"):
                key = f"encoder.layers.{number}.{ours}.{kind}"
                names[key] = f"{prefix}encoder.layer.{number}.{theirs}.{kind}"
    return names


BERT_SIZES = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def test_bert_is_the_bert_of_transformers_with_its_head():
    theirs = shaken(BertForMaskedLM(BertConfig(**BERT_SIZES)))
    ours = MaskedLanguageModel(replace(CONFIGS["bert"], **SIZES)).eval()
    names = bert_names("bert.") | {
        "encoder.embeddings.position.table.weight": "bert.embeddings.position_embeddings.weight",
        "transform.linear.weight": "cls.predictions.transform.dense.weight",
        "transform.linear.bias": "cls.predictions.transform.dense.bias",
        "transform.norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "transform.norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "head_bias": "cls.predictions.bias",
    }
    copy_into(ours, names, theirs.state_dict())
    kinds = torch.randint(0, 2, TOKENS.shape)
    with torch.no_grad():
        expected = theirs(TOKENS, attention_mask=MASK, token_type_ids=kinds).logits
        found = ours.logits(ours(TOKENS, MASK, kinds))
    assert (found - expected)[MASK.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("rotary_value", [False])
def test_rotary_attention_with_biases_is_the_roformer_of_transformers(rotary_value):
    """Version 1 of RoFormer: biases, LayerNorm, GELU; its rotary positions are those of version 2."""
    config = RoFormerConfig(**BERT_SIZES, embedding_size=24, rotary_value=rotary_value)
    theirs = shaken(RoFormerModel(config))
    table = theirs.encoder.embed_positions
    table.weight.data.copy_(table.create_weight())  # shaken too, though it is no parameter to learn
    ours = MaskedLanguageModel(
        replace(CONFIGS["bert"], **SIZES, positions="rotary", head="plain", max_row_tokens=512)
    ).eval()
    copy_into(ours, bert_names(""), theirs.state_dict())
    with torch.no_grad():
        expected = theirs(TOKENS, attention_mask=MASK).last_hidden_state
        found = ours(TOKENS, MASK)
    assert (found - expected)[MASK.bool()].abs().max() < 1e-5


@pytest.fixture
def torchscale(monkeypatch):
    """The encoder of torchscale. Two packages that it imports serve only sharding and drop path, which stay off here;
    they pin other releases of torch, so their two names are filled in."""

    def unused(*_, **__):
        raise AssertionError("not used with these settings")

    class DropPath(torch.nn.Module):
        __init__ = unused

    stand_ins = {
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": unused, "wrap": unused},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": unused},
    }
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    from torchscale.architecture.config import EncoderConfig as Settings
    from torchscale.architecture.encoder import Encoder

    def build(layers, deepnorm=True):
        settings = Settings(
            encoder_embed_dim=24,
            encoder_attention_heads=3,
            encoder_ffn_embed_dim=48,
            encoder_layers=layers,
            deepnorm=deepnorm,
            subln=False,
            no_scale_embedding=True,
            activation_fn="relu",
            vocab_size=-1,
            no_output_layer=True,
        )
        return Encoder(settings)

    return build


SCALE_LINEARS = {
    "mixer.query": "self_attn.q_proj",
    "mixer.key": "self_attn.k_proj",
    "mixer.value": "self_attn.v_proj",
    "mixer.output": "self_attn.out_proj",
    "mixer_norm": "self_attn_layer_norm",
    "feed_forward.up": "ffn.fc1",
    "feed_forward.down": "ffn.fc2",
    "feed_forward_norm": "final_layer_norm",
}


@pytest.mark.parametrize("layers", [2, 9])
def test_deepnorm_layers_are_those_of_torchscale(torchscale, layers):
    theirs = shaken(torchscale(layers))
    config = EncoderConfig(
        **{**SIZES, "num_layers": layers},
        **HEADS,
        residual="deepnorm",
        initialisation="deepnorm",
        norm="layer_norm",
        norm_epsilon=1e-5,
        biases=True,
        positions="none",
    )
    ours = MaskedLanguageModel(config).eval()
    state = theirs.state_dict()
    names = {
        f"{number}.{mine}.{kind}": f"layers.{number}.{their}.{kind}"
        for number in range(layers)
        for mine, their in SCALE_LINEARS.items()
        for kind in ("weight", "bias")
    }
    copy_into(ours.encoder.layers, names, state)
    assert theirs.layers[0].alpha == pytest.approx(deepnorm_alpha(2 * layers))
    with torch.no_grad():
        embedded = ours.encoder.embeddings(TOKENS)
        expected = theirs(None, encoder_padding_mask=MASK == 0, token_embeddings=embedded)["encoder_out"]
        found = ours(TOKENS, MASK)
    assert (found - expected)[MASK.bool()].abs().max() < 1e-5


def test_beta_multiplies_the_weights_that_torchscale_divides(torchscale):
    """From one seed, with DeepNorm and without: value, output and feed-forward weights differ by beta, others not."""
    states = []
    for deepnorm in (True, False):
        torch.manual_seed(0)
        states.append(torchscale(6, deepnorm=deepnorm).state_dict())
    scaled, plain = states
    for mine, their in SCALE_LINEARS.items():
        weight = f"layers.3.{their}.weight"
        if "norm" not in mine:
            beta = 1.0 if mine in ("mixer.query", "mixer.key") else deepnorm_beta(12)
            torch.testing.assert_close(scaled[weight], plain[weight] * beta)


def as_numpy(model):
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["flash", "causal_flash"])
@pytest.mark.parametrize("length", [5, 8, 29])  # less than a chunk, a chunk, several and a piece
def test_flash_in_chunks_is_flash_written_out(name, length):
    config = VARIANTS[name]
    model = shaken(MaskedLanguageModel(config))
    row = torch.randint(5, 300, (1, length))
    with torch.no_grad():
        found = model(row)[0].numpy()
    expected = reference.flash(
        as_numpy(model),
        row[0].numpy(),
        layers=3,
        expansion=64,
        key_size=16,
        chunk=8,
        causal=config.context == "causal",
        squared_n2=config.score_normaliser == "relu_squared_n2",
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("squared_n2", [False, True])
def test_squared_attention_is_its_formula(squared_n2):
    normaliser = "relu_squared_n2" if squared_n2 else "relu_squared"
    model = shaken(MaskedLanguageModel(replace(CONFIGS["gau_alpha"], score_normaliser=normaliser)))
    row = torch.randint(5, 300, (1, 27))
    with torch.no_grad():
        found = model(row)[0].numpy()
    expected = reference.gau_squared(as_numpy(model), row[0].numpy(), 3, 64, 16, squared_n2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_half_split_rotary_is_interleaved_with_the_rows_of_query_and_key_in_another_order():
    config = CONFIGS["roformer_v2"]
    interleaved = shaken(MaskedLanguageModel(config))
    half = MaskedLanguageModel(replace(config, positions="rotary_half")).eval()
    order = torch.cat(
        [head * 8 + torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)]) for head in range(3)]
    )
    state = interleaved.state_dict()
    for name in state:
        if "mixer.query" in name or "mixer.key" in name:
            state[name] = state[name][order]
    half.load_state_dict(state)
    with torch.no_grad():
        assert (half(TOKENS) - interleaved(TOKENS)).abs().max() < 1e-5


def test_talking_heads_that_only_talk_to_themselves_are_plain_heads_and_others_are_not():
    plain = MaskedLanguageModel(CONFIGS["roformer_v2"]).eval()
    talking = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], talking_heads="both")).eval()
    talking.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        expected = plain(TOKENS)
        assert (talking(TOKENS) - expected).abs().max() < 1e-5
        talking.encoder.layers[1].mixer.score_mix.copy_(torch.eye(3).roll(1, 0))
        assert (talking(TOKENS) - expected).abs().max() > 1e-3

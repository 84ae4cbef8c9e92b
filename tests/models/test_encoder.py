from dataclasses import replace

import numpy as np
import pytest
import torch

from sutrain.models.encoder import Encoder
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models import reference
from tests.models.tiny import CONFIGS


def as_numpy(model):
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def randomised(config, **changes):
    """A model in evaluation mode whose gains and offsets are not all ones and zeros either."""
    model = MaskedLanguageModel(replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


ROW = torch.tensor([[2, *range(10, 40), 3, 0, 0, 0, 0]])


def test_roformer_v2_equals_a_numpy_transcription_of_the_paper():
    model = randomised(CONFIGS["roformer_v2"])
    found = model.logits(model(ROW))[0].detach().numpy()
    row = ROW[0].numpy()
    expected = reference.roformer_v2(as_numpy(model), row, row == 0, layers=3, heads=3)
    real = row != 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("tokens", [8, 30])  # below and above the floor of softmax_plus
def test_gau_alpha_equals_a_numpy_transcription_of_the_paper(tokens):
    model = randomised(CONFIGS["gau_alpha"])
    row_BL = ROW.clone()
    row_BL[0, tokens:] = 0
    found = model.logits(model(row_BL))[0].detach().numpy()
    row = row_BL[0].numpy()
    expected = reference.gau_alpha(as_numpy(model), row, row == 0, layers=3, expansion=64, key_size=16)
    np.testing.assert_allclose(found[:tokens], expected[:tokens], atol=1e-5)


def test_roformer_v2_has_no_bias_and_no_gain_and_the_names_that_others_rely_on():
    names = [name for name, _ in MaskedLanguageModel(CONFIGS["roformer_v2"]).named_parameters()]
    assert not [
        name for name in names if "bias" in name or "gamma" in name or "gain" in name or "norm" in name
    ]
    parts = [
        "mixer.query",
        "mixer.key",
        "mixer.value",
        "mixer.output",
        "feed_forward.up",
        "feed_forward.down",
    ]
    layers = [f"encoder.layers.{i}.{part}.weight" for i in range(3) for part in parts]
    assert names == ["encoder.embeddings.token.weight", "encoder.embeddings.token_type.weight", *layers]


def test_every_block_of_roformer_v2_has_outputs_of_size_one():
    outputs = []
    randomised(CONFIGS["roformer_v2"]).encoder(ROW, layer_outputs=outputs)
    assert len(outputs) == 4  # the embeddings' and three layers'
    for hidden in outputs:
        assert (hidden.square().mean(-1).sqrt() - 1).abs().max() < 1e-3


def test_a_document_is_the_same_alone_padded_and_packed(config):
    encoder = randomised(config).encoder
    one, two = torch.randint(5, 300, (1, 21)), torch.randint(5, 300, (1, 9))
    with torch.no_grad():
        alone = encoder(one)
        padded = encoder(torch.cat([one, torch.zeros(1, 30, dtype=torch.long)], 1))
        row = torch.cat([two, one, two, torch.zeros(1, 5, dtype=torch.long)], 1)
        documents = torch.tensor([[1] * 9 + [2] * 21 + [3] * 9 + [0] * 5])
        packed = encoder(row, documents)
        leaky = encoder(row)
    assert (padded[:, :21] - alone).abs().max() < 1e-5
    assert (packed[:, 9:30] - alone).abs().max() < 1e-5
    assert (packed[:, :9] - packed[:, 30:39]).abs().max() < 1e-5
    assert (leaky[:, 9:30] - alone).abs().max() > 1e-3  # without document numbers they do see each other


def test_no_gradient_flows_between_documents(config):
    encoder = randomised(config).encoder
    documents = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    taken = []

    def keep(module, inputs, output):
        output.retain_grad()
        taken.append(output)

    encoder.embeddings.register_forward_hook(keep)
    encoder(torch.randint(5, 300, (1, 12)), documents)[0, :5].square().sum().backward()
    assert taken[0].grad[0, :5].abs().min() > 0
    assert not taken[0].grad[0, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_stays_finite_forward_and_backward(config, dtype):
    model = MaskedLanguageModel(config).to(dtype)
    tokens = torch.cat([ROW, torch.zeros_like(ROW)])
    hidden = model(tokens)
    model.logits(hidden).float().square().mean().backward()
    assert torch.isfinite(hidden).all()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


def test_casting_to_bf16_costs_only_bf16_precision(config):
    model = randomised(config)
    expected = model.encoder(ROW)
    found = model.bfloat16().encoder(ROW)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_an_fp32_stream_keeps_a_deep_bf16_model_accurate():
    deep = replace(CONFIGS["deepnorm"], num_layers=40)
    model = MaskedLanguageModel(deep).eval()
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)  # the same rounded weights for all three
    expected = model.encoder(ROW)
    errors = {}
    for fp32_residual in (False, True):
        half = MaskedLanguageModel(replace(deep, fp32_residual=fp32_residual)).eval().bfloat16()
        half.load_state_dict(weights)
        found = half.encoder(ROW)
        assert found.dtype == torch.bfloat16
        errors[fp32_residual] = ((found.float() - expected).norm() / expected.norm()).item()
    assert errors[True] < 0.5 * errors[False]


def test_token_types_are_zero_unless_given(config):
    encoder = randomised(config).encoder
    zeros = torch.zeros_like(ROW)
    with torch.no_grad():
        assert torch.equal(encoder(ROW), encoder(ROW, None, zeros))
        assert not torch.allclose(encoder(ROW), encoder(ROW, None, zeros + 1))


def test_gradient_checkpointing_changes_memory_not_gradients(config):
    model = MaskedLanguageModel(config).train()
    gradients = []
    for recompute in (False, True):
        model.encoder.gradient_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(1)  # dropout is replayed
        model(ROW).square().mul(torch.arange(32)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_order_of_embedding_dropout_and_norm():
    """Dropout comes first, so that the norm restores the size of what is left."""
    encoder = Encoder(replace(CONFIGS["roformer_v2"], hidden_dropout=0.5)).train()
    hidden = encoder.embeddings(ROW, None)
    assert (hidden == 0).float().mean() > 0.3
    assert (hidden.square().mean(-1).sqrt() - 1).abs().max() < 1e-3

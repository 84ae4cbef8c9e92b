from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sutrain.models import documents, gates, processor
from sutrain.models import encoder as encoder_module
from sutrain.models.encoder import Encoder
from sutrain.models.masked_lm import MaskedLanguageModel
from tests.models import reference
from tests.models.tiny import CONFIGS, VARIANTS


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
        assert (hidden[ROW > 0].square().mean(-1).sqrt() - 1).abs().max() < 1e-3


@pytest.mark.parametrize("apart", [False, True], ids=["rows", "apart"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_document_is_the_same_alone_padded_and_packed(name, apart, monkeypatch):
    """On either side, with a hole in it, and among others, computed in rows or document by document."""
    monkeypatch.setattr(encoder_module, "worthwhile", lambda *_: apart)
    encoder = randomised(VARIANTS[name]).encoder
    one, two = torch.randint(5, 300, (1, 21)), torch.randint(5, 300, (1, 9))
    types = torch.tensor([[0] * 12 + [1] * 9]) if encoder.config.token_types else None

    def run(left, right, row=None, numbers=None):
        """One between `left` and `right` further places, which are padding unless a row says otherwise."""
        row = (
            torch.cat([torch.zeros(1, left).long(), one, torch.zeros(1, right).long()], 1)
            if row is None
            else row
        )
        rows = torch.cat([row, row.roll(1, 1)])  # and a second row
        padded = None if types is None else F.pad(types, (left, right)).repeat(2, 1)
        numbers = None if numbers is None else numbers.repeat(2, 1)
        return encoder(rows, numbers, padded)[:1, left : left + 21]

    with torch.no_grad():
        alone = run(0, 0)
        assert (run(0, 17) - alone).abs().max() < 1e-5
        assert (run(7, 2) - alone).abs().max() < 1e-5
        row = torch.cat([two, one, two, torch.zeros(1, 5).long()], 1)
        numbers = torch.tensor([[1] * 9 + [2] * 21 + [3] * 9 + [0] * 5])
        assert (run(9, 14, row, numbers) - alone).abs().max() < 1e-5
        leaky = run(9, 14, row)
        assert (leaky - alone).abs().max() > 1e-3  # without document numbers they do see each other


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.mixer != "flash"])
def test_documents_apart_are_rows_under_a_mask_with_gradients(name, monkeypatch):
    model = randomised(VARIANTS[name])
    tokens = torch.randint(5, 300, (3, 24))
    numbers = torch.tensor(
        [[1] * 24, [1] * 10 + [2] * 3 + [3] * 6 + [0] * 5, [0] * 4 + [7] * 8 + [0] * 2 + [7] * 10]
    )
    types = torch.zeros_like(tokens)
    types[:, 12:] = 1
    found = []
    for apart in (False, True):
        monkeypatch.setattr(encoder_module, "worthwhile", lambda *_, apart=apart: apart)
        model.zero_grad()
        hidden = model(tokens, numbers, types)
        assert apart is not bool(hidden[numbers == 0].any())  # padding is only computed in rows
        loss = (hidden[numbers > 0] * torch.linspace(-1, 1, 32)).square().sum()
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_rows_are_taken_apart_where_that_saves_work_and_only_there():
    config = replace(CONFIGS["roformer_v2"], hidden_size=256, feed_forward_size=1024)
    encoder = Encoder(config)
    full = torch.ones(4, 512, dtype=torch.long)
    assert encoder._documents(full) is None  # nothing to save
    half = torch.where(torch.arange(512) < 256, full, 0)
    assert encoder._documents(half).lengths == (256,) * 4
    tiny = torch.arange(512).expand(4, 512) // 2 + 1  # two tokens a document: more calls than work
    assert encoder._documents(tiny) is None
    assert encoder._documents(full[:1]).lengths == (512,)  # one call, and no mask to add
    interrupted = torch.tensor([[1, 2, 1, 0]])
    assert documents.find_documents(interrupted) is None
    with pytest.raises(ValueError, match="one interrupted by another"):
        Encoder(CONFIGS["flash"])(torch.ones(1, 4).long(), interrupted)


@pytest.mark.parametrize(
    ("units", "worth"),
    [("none", (False, False, False)), ("vectors", (True, True, False)), ("tiles", (True, False, False))],
)
def test_instructions_of_16_bits_make_attention_weigh_more(units, worth):
    """RoFormerV2 base on a CPU: documents of a quarter of rows of 512, 256 and 128 tokens."""
    config = replace(
        CONFIGS["roformer_v2"], hidden_size=768, num_heads=12, head_size=64, feed_forward_size=3072
    )
    for length, expected in zip((512, 256, 128), worth, strict=True):
        packed = documents.find_documents(torch.arange(length).expand(2, length) // (length // 4) + 1)
        assert documents.worthwhile(packed, 2, config, documents.COSTS[units]) == expected


def test_a_gated_unit_has_a_cost_of_its_own_for_every_document():
    config = replace(CONFIGS["gau_alpha"], hidden_size=768, gau_expansion_size=1536, gau_key_size=128)
    costs = documents.COSTS["vectors"]
    packed = documents.find_documents(torch.arange(512).expand(4, 512) // 128 + 1)
    assert not documents.worthwhile(packed, 4, config, costs)
    assert documents.worthwhile(packed, 4, config, costs._replace(unit=costs.call))


@pytest.mark.parametrize(
    ("has", "units"),
    [((), "none"), (("avx512_bf16",), "vectors"), (("avx512_bf16", "amx_tile"), "tiles")],
)
def test_costs_are_those_of_this_processor_and_dtype(has, units, monkeypatch):
    monkeypatch.setattr(documents, "bf16_units", processor.bf16_units.__wrapped__)  # without its memory
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has, raising=False)
    assert documents.costs(torch.bfloat16) == documents.COSTS[units]
    assert documents.costs(torch.float32) == documents.COSTS["none"]


def test_no_gradient_flows_between_documents(config):
    encoder = randomised(config).encoder
    documents = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    taken = []

    def keep(module, inputs, output):
        output.retain_grad()
        taken.append(output)

    encoder.embeddings.register_forward_hook(keep)
    direction = torch.linspace(-1, 2, config.hidden_size)
    (encoder(torch.randint(5, 300, (1, 12)), documents)[0, :5] @ direction).sum().backward()
    assert taken[0].grad[0, :5].abs().min() > 0
    assert not taken[0].grad[0, 5:].any()


def gradient_at_embeddings(encoder, tokens, target, types=None, numbers=None):
    """d (hidden vector of `target`, along some direction) / d (embedding of each token), [L] largest absolute values.

    Not of its square: a vector that was normalised keeps its length whatever it sees.
    """
    taken = []

    def keep(module, inputs, output):
        output.retain_grad()
        taken.append(output)

    hook = encoder.embeddings.register_forward_hook(keep)
    direction = torch.linspace(-1, 2, encoder.config.hidden_size)
    (encoder(tokens, numbers, types)[0, target] @ direction).backward()
    hook.remove()
    return taken[0].grad[0].abs().amax(-1)


@pytest.mark.parametrize("name", ["causal", "causal_flash", "squared_n2_gau"])
def test_a_causal_model_has_exactly_no_gradient_from_what_follows(name):
    encoder = randomised(VARIANTS[name]).encoder
    tokens = torch.randint(5, 300, (1, 30))  # several chunks of FLASH
    for target in (0, 7, 8, 13, 29):
        seen = gradient_at_embeddings(encoder, tokens, target)
        assert (seen[: target + 1] > 0).all()
        assert not seen[target + 1 :].any()


def test_causal_flash_has_exactly_no_gradient_from_other_documents():
    encoder = randomised(VARIANTS["causal_flash"]).encoder
    numbers = torch.tensor([[1] * 13 + [2] * 17])
    seen = gradient_at_embeddings(encoder, torch.randint(5, 300, (1, 30)), 25, numbers=numbers)
    assert not seen[:13].any() and (seen[13:26] > 0).all() and not seen[26:].any()


@pytest.mark.parametrize("name", ["unilm", "unilm_gau"])
def test_a_prefix_sees_exactly_itself_and_what_follows_sees_what_precedes(name):
    encoder = randomised(VARIANTS[name]).encoder
    tokens = torch.randint(5, 300, (1, 20))
    types = torch.tensor([[0] * 8 + [1] * 7 + [0] * 3 + [1] * 2])
    numbers = torch.tensor([[1] * 15 + [2] * 5])
    for target, seen_from, seen_to in (
        (0, 0, 8),
        (7, 0, 8),
        (8, 0, 9),
        (14, 0, 15),
        (15, 15, 18),
        (19, 15, 20),
    ):
        seen = gradient_at_embeddings(encoder, tokens, target, types, numbers)
        assert (seen[seen_from:seen_to] > 0).all()
        assert not seen[:seen_from].any() and not seen[seen_to:].any()


def test_changing_what_follows_leaves_a_prefix_bit_identical():
    encoder = randomised(VARIANTS["unilm"]).encoder
    tokens, types = torch.randint(5, 300, (1, 20)), torch.tensor([[0] * 8 + [1] * 12])
    changed = tokens.clone()
    changed[0, 14] = 299 - tokens[0, 14]
    with torch.no_grad():
        before, after = encoder(tokens, None, types), encoder(changed, None, types)
    assert torch.equal(before[:, :14], after[:, :14])
    assert not torch.equal(before[:, 14:], after[:, 14:])


@pytest.mark.parametrize("way", ["rows", "apart", "hooked"])
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_vectors_of_some_positions_are_those_of_all(name, way, monkeypatch):
    """Few, of which the last layer computes no more, or many; gradients too, and where all is computed again. Hooked:
    somebody watches the map of a gated unit, so that it is left whole."""
    monkeypatch.setattr(encoder_module, "worthwhile", lambda *_: way == "apart")
    monkeypatch.setattr(gates, "AGAIN_FROM_TOKENS", 12)
    if way == "apart":
        monkeypatch.setattr(gates, "VALUES_AGAIN_FROM_TOKENS", 12)
    model = randomised(VARIANTS[name], hidden_dropout=0.0, attention_dropout=0.0).train()
    batch = torch.randint(5, 300, (2, 12)), torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    computed: list[int] = []
    last = model.encoder.layers[-1].mixer.output
    last.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[:2].numel()))
    if way == "hooked" and model.config.gated:
        model.encoder.layers[-1].mixer.input.register_forward_hook(lambda *_: None)
    few, many = torch.tensor([0, 3, 4, 8, 12, 20]), batch[1].flatten().nonzero().squeeze(1)
    for positions, again in ((few, 0), (many, 0), (few, 1), (few, 3)):
        model.encoder.recompute_layers, model.encoder.recompute_together = again, max(again, 1)
        found = []
        for hidden in (model(*batch).flatten(0, 1)[positions], model(*batch, positions_M=positions)):
            model.zero_grad()
            hidden.square().sum().backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append([hidden, *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert (len(few) in computed) == (positions is few)
        computed.clear()


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
    if not config.token_types:
        config = replace(config, token_types=2)
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

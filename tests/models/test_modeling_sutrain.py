import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import sutrain.huggingface  # noqa: F401
from sutrain.models.configuration import EncoderConfigError
from sutrain.models.configuration_sutrain import SutrainConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.modeling_sutrain import SutrainForCausalLM, SutrainForMaskedLM, SutrainModel
from tests.models.tiny import CONFIGS, VARIANTS

TOKENS = torch.tensor([[2, *range(10, 30), 3, 0, 0, 0], [2, *range(30, 53), 3]])
MASK = (TOKENS != 0).long()


def hugging_face(config, **changes):
    return SutrainForMaskedLM(SutrainConfig(**vars(replace(config, **changes)))).eval()


def saved(config, folder):
    model = hugging_face(config)
    model.save_pretrained(folder)
    return model


def test_the_weights_are_those_of_the_training_model_after_a_prefix(config):
    trained = MaskedLanguageModel(config).eval()
    wrapped = hugging_face(config)
    wrapped.load_state_dict({f"model.{name}": tensor for name, tensor in trained.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(wrapped(TOKENS).logits, trained.logits(trained(TOKENS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads_without_losing_anything(config, tmp_path, dtype):
    model = saved(config, tmp_path)
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        expected, found = model(TOKENS, MASK).logits, loaded(TOKENS, MASK).logits
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:
        assert (found.float() - expected).norm() < 0.03 * expected.norm()
    assert not loaded.training


def test_saving_again_what_was_loaded(config, tmp_path):
    model = saved(config, tmp_path / "one")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "two")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert (
        load_file(tmp_path / "one/model.safetensors").keys()
        == load_file(tmp_path / "two/model.safetensors").keys()
    )
    assert (tmp_path / "two/encoder.py").is_file()  # the code travels along


def test_the_encoder_alone_loads_from_the_same_folder_and_back(config, tmp_path):
    model = saved(config, tmp_path / "lm")
    encoder, info = AutoModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert isinstance(encoder, SutrainModel) and not info["missing_keys"]
    with torch.no_grad():
        hidden = encoder(TOKENS, MASK).last_hidden_state
        assert torch.equal(hidden, model.model(TOKENS, MASK))
    encoder.save_pretrained(tmp_path / "encoder")
    back, info = SutrainForMaskedLM.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    of_the_head = {name for name in model.state_dict() if not name.startswith("model.encoder.")}
    assert set(info["missing_keys"]) == of_the_head
    with torch.no_grad():
        assert torch.equal(back.model(TOKENS, MASK), hidden)


def test_weights_missing_from_a_file_are_initialised_by_their_role(tmp_path):
    """What transformers fills in itself must follow the same rules as a new model, not its own default."""
    config = replace(CONFIGS["pre"], vocab_size=2000, hidden_size=64)
    SutrainModel(SutrainConfig(**vars(config))).save_pretrained(tmp_path)
    head = SutrainForMaskedLM.from_pretrained(tmp_path).model.head.weight
    assert head.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.03)


def test_loss_ignores_minus_100_and_has_gradients(config):
    model = hugging_face(config)
    labels = torch.where(torch.rand(TOKENS.shape) < 0.3, TOKENS, -100)
    output = model(TOKENS, MASK, labels=labels)
    chosen = labels != -100
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[chosen], labels[chosen]))
    output.loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_outputs_have_the_customary_forms(config):
    model = hugging_face(config)
    output = model(TOKENS, MASK, output_hidden_states=True)
    assert len(output.hidden_states) == config.num_layers + 1
    assert torch.equal(output.hidden_states[-1], model.model(TOKENS, MASK))
    assert isinstance(model(TOKENS, return_dict=False), tuple)
    with pytest.raises(ValueError, match="attention_mask: found shape"):
        model(TOKENS, MASK[:, :5])


def test_the_mask_decides_what_is_seen_and_may_number_documents():
    model = hugging_face(CONFIGS["gau_alpha"])
    with torch.no_grad():
        alone = model(TOKENS[:1, :22]).logits
        assert (model(TOKENS, MASK).logits[:1, :22] - alone).abs().max() < 1e-5
        packed = torch.cat([TOKENS[:1, :22], TOKENS[1:, :10]], 1)
        numbers = torch.tensor([[1] * 22 + [2] * 10])
        assert (model(packed, numbers).logits[:, :22] - alone).abs().max() < 1e-5


def decoded(model, prompt, mask, types, steps):
    """Greedy decoding by hand: all tokens after each step, and the scores [B, V] of the steps."""
    tokens, scores = prompt, []
    for _ in range(steps):
        scores.append(model(tokens, mask, types).logits[:, -1])
        tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
        mask = F.pad(mask, (0, 1), value=1)
        types = None if types is None else F.pad(types, (0, 1), value=1)
    return tokens, scores


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_what_a_unilm_model_generates_follows_the_prompt_and_is_not_seen_from_it(given, beams):
    config = replace(VARIANTS["unilm"], tied_head=False)  # a tied one, untrained, repeats itself
    model = SutrainForCausalLM(SutrainConfig(**vars(config))).eval()
    prompt = torch.tensor([[2, *range(10, 20)], [0, 0, 2, *range(40, 48)]])
    mask = (prompt != 0).long()
    types = torch.zeros_like(prompt)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    settings |= {"token_type_ids": types} if given else {}
    with torch.no_grad():
        expected, scores = decoded(model, prompt, mask, types, 6)
        wrong, _ = decoded(model, prompt, mask, None, 6)
        found = model.generate(prompt, attention_mask=mask, num_beams=beams, **settings)
    assert not torch.equal(expected, wrong)  # what a model that looks back from its prompt would say
    if beams == 1:
        assert torch.equal(found.sequences, expected)
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(scores))
    else:
        assert found.sequences.shape == expected.shape


def test_a_step_of_generation_computes_the_scores_of_the_last_position_alone(monkeypatch):
    """And a causal model takes the token types that its tokenizer gives."""
    model = SutrainForCausalLM(SutrainConfig(**vars(replace(CONFIGS["causal"], token_types=2)))).eval()
    widths, logits = [], model.model.logits
    monkeypatch.setattr(model.model, "logits", lambda x: widths.append(x.shape[1]) or logits(x))
    types = torch.zeros_like(TOKENS[1:])
    types[:, 5:] = 1
    made = model.generate(TOKENS[1:], token_type_ids=types, max_new_tokens=3, do_sample=False)
    assert widths == [1, 1, 1]
    with torch.no_grad():
        expected, _ = decoded(model, TOKENS[1:], MASK[1:], types, 3)
    assert torch.equal(made, expected)


def test_resizing_the_vocabulary_keeps_head_and_embedding_together(config, tmp_path):
    model = hugging_face(config)
    before = model(TOKENS).logits
    model.resize_token_embeddings(310)
    after = model(TOKENS).logits
    assert after.shape[-1] == 310 and model.config.vocab_size == 310
    torch.testing.assert_close(after[..., :300], before)
    model.save_pretrained(tmp_path)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path)(TOKENS).logits.shape[-1] == 310


def test_gradient_checkpointing_is_the_encoders_own():
    model = hugging_face(CONFIGS["roformer_v2"])
    model.gradient_checkpointing_enable()
    assert model.model.encoder.gradient_checkpointing
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_a_layer_that_somebody_adds_gets_the_default_of_transformers():
    class Classifier(SutrainModel):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Linear(2000, 500)
            self.post_init()

    model = Classifier(SutrainConfig(**vars(CONFIGS["roformer_v2"])))
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_the_configuration_keeps_every_setting_and_the_customary_names(tmp_path):
    config = SutrainConfig(num_hidden_layers=3, hidden_size=32, vocab_size=300)
    assert (config.num_layers, config.num_hidden_layers, config.max_position_embeddings) == (3, 3, 512)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_layers"] == 3 and written["rotary_base"] == 10000.0  # also what equals its default
    assert AutoConfig.from_pretrained(tmp_path).encoder_config() == config.encoder_config()
    with pytest.raises(EncoderConfigError, match=r"model\.num_layers"):
        SutrainConfig(num_layers=0)

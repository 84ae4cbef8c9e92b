import inspect
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import sutrain.huggingface  # noqa: F401
from sutrain.models.configuration import EncoderConfigError
from sutrain.models.configuration_sutrain import SutrainConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.models.modeling_sutrain import SutrainForCausalLM, SutrainForMaskedLM, SutrainModel
from tests.models.tiny import CONFIGS, VARIANTS

TOKENS = torch.tensor([[2, *range(10, 30), 3, 0, 0, 0], [2, *range(30, 53), 3]])
MASK = (TOKENS != 0).long()


def automatic(config):
    return AutoModelForMaskedLM if config.context == "bidirectional" else AutoModelForCausalLM


def hugging_face(config, **changes):
    kind = SutrainForMaskedLM if config.context == "bidirectional" else SutrainForCausalLM
    return kind(SutrainConfig(**vars(replace(config, **changes)))).eval()


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
    loaded, info = automatic(config).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
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
    automatic(config).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = automatic(config).from_pretrained(tmp_path / "two")
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
    back, info = automatic(config).from_pretrained(tmp_path / "encoder", output_loading_info=True)
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


def test_the_bias_of_a_head_that_a_file_has_not_begins_at_zero(tmp_path, monkeypatch):
    """The library hands over memory as it is."""
    SutrainModel(SutrainConfig(**vars(CONFIGS["bert"]))).save_pretrained(tmp_path)
    made = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **more: made(x, **more).fill_(float("nan"))
    )  # on the meta device that changes nothing
    bias = SutrainForMaskedLM.from_pretrained(tmp_path).model.head_bias
    assert torch.equal(bias, torch.zeros_like(bias))


@pytest.mark.parametrize("initialisation", ["gau_alpha", "su_lamb"])
def test_biases_that_a_file_has_not_leave_its_weights_alone(tmp_path, initialisation):
    config = replace(CONFIGS["gau_alpha"], initialisation=initialisation)
    model = saved(config, tmp_path)
    loaded = SutrainForMaskedLM.from_pretrained(tmp_path, biases=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, MASK).logits, model(TOKENS, MASK).logits)


def test_loss_ignores_minus_100_and_has_gradients(config):
    model = hugging_face(config)
    labels = torch.where(torch.rand(TOKENS.shape) < 0.3, TOKENS, -100)
    output = model(TOKENS, MASK, labels=labels)
    if config.context != "bidirectional":  # position i is scored on label i + 1
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
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


def test_an_unpadded_prompt_of_a_unilm_model_needs_no_token_types():
    """The library leaves out a mask of ones, so nothing else tells how long the prompt was."""
    config = replace(VARIANTS["unilm"], tied_head=False)
    model = hugging_face(config)
    prompt = torch.tensor([[2, *range(10, 20)], [2, *range(40, 50)]])
    with torch.no_grad():
        expected, _ = decoded(model, prompt, torch.ones_like(prompt), torch.zeros_like(prompt), 6)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), expected)


def test_padding_that_was_generated_is_a_token_like_any_other():
    """A prompt alone, whose mask the library leaves out, gives what it gives in a padded batch."""
    model = hugging_face(CONFIGS["causal"], tied_head=False)
    prompt = torch.tensor([[0, 0, 2, *range(10, 18)], [2, *range(40, 50)]])
    mask = (prompt != 0).long()
    padding_first = torch.zeros(1, model.config.vocab_size)
    padding_first[0, 0] = 1e9

    def generated(rows, mask):
        length = rows.shape[1]
        forced = [lambda ids, scores: scores + padding_first if ids.shape[1] == length else scores]
        settings = {"max_new_tokens": 5, "do_sample": False, "logits_processor": forced}
        return model.generate(rows, attention_mask=mask, **settings)[0, length:]

    alone, together = generated(prompt[:1, 2:], mask[:1, 2:]), generated(prompt, mask)
    assert together[0] == 0 and torch.equal(alone, together)


def test_what_generation_cannot_do_is_refused_with_a_reason():
    model = hugging_face(CONFIGS["causal"])
    with pytest.raises(ValueError, match="output_attentions"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(TOKENS[1:], prompt_lookup_num_tokens=2, max_new_tokens=2)
    for wrong in ("position_ids", "lables", "inputs_embeds"):
        with pytest.raises(TypeError, match=wrong):
            model(input_ids=TOKENS, **{wrong: TOKENS})


def test_the_loss_of_a_causal_model_is_of_the_positions_that_are_kept():
    model = hugging_face(CONFIGS["causal"])
    labels = TOKENS.masked_fill(MASK == 0, -100)
    with torch.no_grad():
        whole = model(TOKENS, MASK, labels=labels)
        last = model(TOKENS, MASK, labels=labels, logits_to_keep=4)
        some = model(TOKENS, MASK, labels=labels, logits_to_keep=torch.tensor([3, 7]))
    expected = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(last.logits, whole.logits[:, -4:])
    tail = F.cross_entropy(whole.logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten())
    torch.testing.assert_close(last.loss, tail)
    torch.testing.assert_close(some.logits, whole.logits[:, [3, 7]])
    torch.testing.assert_close(
        some.loss, F.cross_entropy(some.logits.flatten(0, 1), labels[:, [4, 8]].flatten())
    )


def test_each_class_refuses_the_models_of_the_other():
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        SutrainForMaskedLM(SutrainConfig(**vars(CONFIGS["causal"])))
    with pytest.raises(ValueError, match="AutoModelForMaskedLM"):
        SutrainForCausalLM(SutrainConfig(**vars(CONFIGS["roformer_v2"])))


def test_trainers_of_transformers_divide_the_loss_by_the_accumulation(config):
    """They leave it to models that take any keyword."""
    kinds = {p.kind for p in inspect.signature(hugging_face(config).forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_rows_without_tokens_are_named(config):
    with pytest.raises(ValueError, match=r"input_ids: found shape \[1, 0\]"):
        hugging_face(config)(torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("training", [False, True])
def test_autocast_computes_what_16_bit_weights_do(name, training):
    config = replace(VARIANTS[name], hidden_dropout=0.0, attention_dropout=0.0)
    model = hugging_face(config).train(training)
    labels = TOKENS.masked_fill(MASK == 0, -100)
    expected = model(TOKENS, MASK, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(TOKENS, MASK, labels=labels)
    assert (found.logits[MASK == 1] - expected.logits[MASK == 1]).norm() < 0.05 * expected.logits.norm()
    model.zero_grad()
    found.loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.model.encoder.layers.parameters()
    )


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
    assert automatic(config).from_pretrained(tmp_path)(TOKENS).logits.shape[-1] == 310


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


def test_settings_that_are_surely_a_mistake_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "vocab_size": 300}
    with pytest.raises(EncoderConfigError) as error:
        SutrainConfig(num_layers=3, num_hidden_layers=4, num_head=2, initialization="plain", **sizes)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "num_layers: found 3, and 4 under its other name num_hidden_layers" in lines[0]
    assert "did you mean num_heads?" in lines[1] and "did you mean initialisation?" in lines[2]
    assert SutrainConfig(num_layers=3, num_hidden_layers=3, **sizes).num_layers == 3
    own = {
        "num_labels": 5,
        "problem_type": "regression",
        "sep_token_id": 3,
        "use_cache": False,
        "dtype": "bfloat16",
    }
    config = SutrainConfig(**sizes, **own, task_specific_params={}, classifier_dropout=0.2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, num_labels=4, hidden_dropout_prob=0.0)
    assert (again.num_labels, again.hidden_dropout, again.classifier_dropout) == (4, 0.0, 0.2)

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sutrain.masking import IGNORED
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.objectives import masked_lm
from sutrain.objectives.masked_lm import masked_lm_loss
from sutrain.objectives.training_model import TrainingModel
from tests.models.tiny import CONFIGS


def batch(share):
    torch.manual_seed(0)
    labels = torch.randint(5, 300, (4, 24))
    hidden = torch.rand(labels.shape) < share
    documents = torch.tensor([[1] * 10 + [2] * 12 + [0] * 2] * 4)
    hidden &= documents > 0
    inputs = labels.masked_fill(hidden, 4)
    return inputs, labels.masked_fill(~hidden, IGNORED), hidden, documents


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["roformer_v2", "pre", "bert"])
def test_chunks_give_the_loss_and_gradients_of_the_whole_and_never_hold_all_scores(kind, monkeypatch):
    model = MaskedLanguageModel(replace(CONFIGS[kind], hidden_dropout=0.0, attention_dropout=0.0))
    found, widest = [], []
    for chunk in (10_000, 16):
        monkeypatch.setattr(masked_lm, "CHUNK_POSITIONS", chunk)
        sizes = []

        def logits(hidden_MD, sizes=sizes):
            sizes.append(len(hidden_MD))
            return model.logits(hidden_MD)

        model.zero_grad()
        loss = masked_lm_loss(model, logits, *batch(0.4))
        loss.loss_sum.backward()
        found.append((loss, gradients(model)))
        widest.append(max(sizes))
    (whole, of_whole), (chunked, of_chunks) = found
    assert widest[0] > 30 and widest[1] == 16
    torch.testing.assert_close(chunked.loss_sum, whole.loss_sum)
    assert chunked.correct_hidden == whole.correct_hidden and chunked.hidden_tokens == whole.hidden_tokens
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_chunks[name], gradient, atol=1e-5, rtol=1e-5)


def test_it_is_the_sum_over_predicted_positions(monkeypatch):
    monkeypatch.setattr(masked_lm, "CHUNK_POSITIONS", 16)
    model = MaskedLanguageModel(CONFIGS["roformer_v2"]).eval()
    inputs, labels, hidden, documents = batch(0.3)
    with torch.no_grad():
        found = masked_lm_loss(model, model.logits, inputs, labels, hidden, documents)
        scores = model.logits(model(inputs, documents))
    chosen = labels != IGNORED
    torch.testing.assert_close(
        found.loss_sum, F.cross_entropy(scores[chosen], labels[chosen], reduction="sum")
    )
    assert found.correct_hidden == (scores.argmax(-1) == labels)[chosen].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_scores_have_the_loss_guesses_and_gradient_of_cross_entropy(dtype, monkeypatch):
    """Of the first positions, which have labels; the others count for nothing."""
    monkeypatch.setattr(masked_lm, "BLOCK_SCORES", 3 * 300)  # three positions
    scores = (3 * torch.randn(12, 300)).to(dtype)
    labels = scores.argmax(-1)[:10]
    labels[::2] = torch.randint(300, (5,))
    scores[1, labels[1] + 1 :] = scores[1, labels[1]]  # the first of several that are best is the guess
    scores[3, 0] = scores[3, labels[3]]
    found, wide = scores.clone().requires_grad_(), scores.float().requires_grad_()
    loss, right = masked_lm._Score.apply(found, labels)
    (loss / 7).backward()
    expected = F.cross_entropy(wide[:10], labels, reduction="sum")
    (expected / 7).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found.grad, wide.grad.to(dtype))
    assert (
        torch.equal(right, scores[:10].argmax(-1) == labels) and right[1] and not right[3] and right.sum() > 2
    )


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_positions_are_asked_for_by_whole_steps_and_seen_without_what_fills_these(share):
    model, asked, seen = MaskedLanguageModel(CONFIGS["roformer_v2"]).eval(), [], []

    def encode(tokens, documents, positions_M):
        asked.append(positions_M)
        return model(tokens, documents, positions_M=positions_M)

    with torch.no_grad():
        masked_lm_loss(encode, model.logits, *batch(share), seen.append)
        everywhere = model.logits(model(batch(share)[0], batch(share)[3])).flatten(0, 1)
    predicted = batch(share)[2].flatten().nonzero().squeeze(1)
    count = len(predicted)
    assert torch.equal(asked[0][:count], predicted) and (count % masked_lm.POSITION_STEP > 0) == (share > 0)
    assert len(asked[0]) % masked_lm.POSITION_STEP == 0 and len(asked[0]) - count < masked_lm.POSITION_STEP
    assert set(asked[0].tolist()) == set(predicted.tolist())
    torch.testing.assert_close(torch.cat(seen), everywhere[predicted], atol=1e-5, rtol=1e-4)


class NothingRead(TorchDispatchMode):
    """Fails where the host reads a number of the device, for which it would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_host_reads_no_number_between_forward_and_backward():
    embedding = torch.nn.Embedding(300, 16)
    with NothingRead():
        loss = masked_lm_loss(
            lambda tokens, _, positions_M: embedding(tokens.flatten()[positions_M]),
            lambda hidden: hidden @ embedding.weight.T,
            *batch(0.3),
        )
        loss.loss_sum.backward()
    assert loss.hidden_tokens == batch(0.3)[2].sum() and embedding.weight.grad.any()


def test_chunks_replay_their_dropout(monkeypatch):
    """What is computed again in the backward pass must be what was computed: the loss is linear in the last bias."""
    monkeypatch.setattr(masked_lm, "CHUNK_POSITIONS", 16)
    model = MaskedLanguageModel(replace(CONFIGS["roformer_v2"], hidden_dropout=0.5)).train()
    drawn = []

    def logits(hidden_MD):
        scores = model.logits(hidden_MD)
        drawn.append(scores.detach())
        return scores

    masked_lm_loss(model, logits, *batch(0.3)).loss_sum.backward()
    half = len(drawn) // 2
    for forward, again in zip(drawn[:half], reversed(drawn[half:]), strict=True):
        assert torch.equal(forward, again)


def test_nothing_to_predict_is_a_zero_with_gradients():
    model = MaskedLanguageModel(CONFIGS["roformer_v2"])
    inputs, labels, hidden, documents = batch(0.0)
    loss = masked_lm_loss(model, model.logits, inputs, labels, hidden, documents).loss_sum
    assert loss.item() == 0.0
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["roformer_v2", "bert"])
def test_a_model_is_made_where_it_is_to_train(kind):
    """Nothing of it is elsewhere first, and on a CPU its weights are those of the constructor."""
    made = TrainingModel.on(torch.device("meta"), CONFIGS[kind])
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
    torch.manual_seed(5)
    here = TrainingModel.on(torch.device("cpu"), CONFIGS[kind]).state_dict()
    torch.manual_seed(5)
    for name, tensor in TrainingModel(CONFIGS[kind]).state_dict().items():
        assert torch.equal(here[name], tensor)

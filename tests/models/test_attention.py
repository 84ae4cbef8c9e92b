import math

import pytest
import torch

from sutrain.models import attention
from sutrain.models.attention import attend
from sutrain.models.visibility import build_visibility
from tests.models.tiny import CONFIGS


def visible(documents, dtype=torch.float32):
    return build_visibility(torch.tensor(documents), CONFIGS["roformer_v2"], dtype)


def plain(query, key, value, mask):
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
    return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize("value_size", [8, 24])
def test_attend_is_softmax_attention_under_a_mask(value_size):
    seen = visible([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    query, key = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    value = torch.randn(2, 3, 6, value_size)
    torch.testing.assert_close(attend(query, key, value, seen), plain(query, key, value, seen.mask))


def test_the_bf16_path_agrees_to_bf16_precision_with_gradients():
    documents = [[1] * 20 + [2] * 10 + [0] * 2] * 2
    inputs = [torch.randn(2, 3, 32, 8) for _ in range(3)]
    half = [x.bfloat16().requires_grad_() for x in inputs]
    full = [x.detach().float().requires_grad_() for x in half]
    found = attend(*half, visible(documents, torch.bfloat16))
    expected = plain(*full, visible(documents).mask)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for a, b in [(found, expected), *((x.grad, y.grad) for x, y in zip(half, full, strict=True))]:
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_dropout_drops_probabilities_and_keeps_the_mean():
    seen = visible([[1] * 64])
    query = key = torch.zeros(1, 1, 64, 8)  # uniform attention
    value = torch.ones(1, 1, 64, 8)
    outputs = torch.stack([attend(query, key, value, seen, 0.25) for _ in range(200)])
    assert abs(outputs.mean().item() - 1) < 0.01
    kept = outputs[0, 0, 0, :, 0] * 64 * 0.75  # how many keys each query kept
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert 40 < kept.mean() < 56


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("squared", [False, True])
def test_scores_of_wide_values_are_computed_again_to_the_bit(dropout, squared, monkeypatch):
    """Same output, gradients and random stream as when they are kept, and no tensor of L x L is held."""
    length, size, wide = 40, 8, 32
    visible = build_visibility(torch.ones(1, length, dtype=torch.long), CONFIGS["gau_alpha"], torch.float32)

    def run(from_tokens: int):
        monkeypatch.setattr(attention, "SCORES_AGAIN_FROM_TOKENS", from_tokens)
        torch.manual_seed(0)
        inputs = [torch.randn(1, 1, length, k, requires_grad=True) for k in (size, size, wide)]
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
            output = attend(*inputs, visible, dropout, squared)
        output.square().sum().backward()
        squares = sum(x.shape[-2:] == (length, length) and x is not visible.mask for x in held)
        return [output, *(x.grad for x in inputs), torch.rand(1)], squares

    kept, many = run(length + 1)
    again, none = run(length)
    assert many > 0 and none == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))

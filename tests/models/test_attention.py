import math
import sys
from dataclasses import replace

import pytest
import torch

from sutrain.models import attention
from sutrain.models import encoder as encoder_module
from sutrain.models.attention import attend, varlen_exists
from sutrain.models.documents import find_documents
from sutrain.models.encoder import Encoder
from sutrain.models.visibility import Visibility, build_visibility, build_visibility_of_documents
from tests.models.tiny import CONFIGS
from tests.models.varlen import varlen_in_torch

LENGTHS = torch.tensor([20, 300, 10, 256, 40])


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


def test_short_documents_between_long_ones_come_out_in_their_places():
    """Products of the short ones are made at once, the fused kernel takes the long ones."""
    documents = find_documents(torch.repeat_interleave(torch.arange(1, 6), LENGTHS).unsqueeze(0))
    seen = Visibility(torch.bfloat16, None, None, documents=documents)
    half = [torch.randn(1, 2, sum(LENGTHS), 8).bfloat16().requires_grad_() for _ in range(3)]
    full = [x.detach().float().requires_grad_() for x in half]
    found = attend(*half, seen)
    parts = zip(*(x.split(LENGTHS.tolist(), dim=2) for x in full), strict=True)
    expected = torch.cat([plain(*part, 0.0) for part in parts], dim=2)
    direction = torch.randn_like(expected)
    found.backward(direction.bfloat16())
    expected.backward(direction)
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


def test_varlen_attention_is_asked_for_only_where_it_exists(monkeypatch):
    """A torch without it, a GPU older than Ampere and heads that are no multiple of eight compute rows under a mask."""
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(attention, "varlen_attention", lambda: attend)
    encoder = Encoder(CONFIGS["roformer_v2"]).to(half).eval()
    assert varlen_exists(gpu, half, 64, 64) and encoder._varlen_serves(gpu)
    assert not varlen_exists(torch.device("cpu"), half, 64, 64)
    assert not varlen_exists(gpu, torch.float32, 64, 64)
    assert not varlen_exists(gpu, half, 264, 264)
    assert not varlen_exists(gpu, half, 64, 72)
    assert not varlen_exists(gpu, half, 20, 20)
    assert not Encoder(replace(encoder.config, head_size=20)).to(half).eval()._varlen_serves(gpu)
    capability = (7, 5)
    assert not varlen_exists(gpu, half, 64, 64) and not encoder._varlen_serves(gpu)
    capability = (9, 0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # as in an older torch
    attention.varlen_attention.cache_clear()
    assert not varlen_exists(gpu, half, 64, 64)
    monkeypatch.undo()
    attention.varlen_attention.cache_clear()


def test_all_layers_share_one_tensor_of_boundaries(monkeypatch):
    """Made in each layer it would make the host wait for the device in each; the numbers are those of rows."""
    seen = []

    def varlen(query, key, value, boundaries, same, longest, as_long):
        seen.append(boundaries)
        assert boundaries is same and longest == as_long == max(boundaries.diff())
        return varlen_in_torch(query, key, value, boundaries)

    monkeypatch.setattr(attention, "varlen_serves", lambda query, documents, *_: not documents.masks)
    monkeypatch.setattr(attention, "varlen_attention", lambda: varlen)
    encoder = Encoder(CONFIGS["roformer_v2"]).eval()
    tokens = torch.randint(5, 300, (2, 12))
    numbers = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    found = []
    for apart in (True, False):
        monkeypatch.setattr(encoder_module, "worthwhile", lambda *_, apart=apart: apart)
        found.append(encoder(tokens, numbers)[numbers > 0])
    torch.testing.assert_close(*found)
    assert len(seen) == 3 and len({id(boundaries) for boundaries in seen}) == 1
    assert seen[0].dtype == torch.int32 and seen[0].tolist() == [0, 5, 9, 21]


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


@pytest.mark.parametrize("lengths", [(40,), (25, 15)])
def test_on_some_processors_products_stand_for_the_fused_kernel_and_keep_no_scores(lengths, monkeypatch):
    """Heads of bf16 from 256 tokens on, where that is the faster way: the same to the bit as with scores kept, and as
    near to the exact numbers as the fused kernel's."""
    numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    config, dtype = CONFIGS["roformer_v2"], torch.bfloat16
    apart = build_visibility_of_documents(find_documents(numbers[None]), config, dtype)

    def run(fused_from: int, products_below: int = 64, dtype=torch.bfloat16):
        monkeypatch.setattr(attention, "FUSED_FROM_TOKENS", fused_from)
        monkeypatch.setattr(attention, "PRODUCTS_BELOW_TOKENS", products_below)
        torch.manual_seed(0)
        drawn = [torch.randn(1, 2, 40, 8).to(torch.bfloat16) for _ in range(3)]
        inputs = [x.to(dtype).requires_grad_() for x in drawn]
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
            output = attend(*inputs, apart)
        output.float().square().sum().backward()
        return [output, *(x.grad for x in inputs)], sum(x.numel() for x in held)

    kept, many = run(fused_from=64)
    again, few = run(fused_from=lengths[0])
    assert many > few
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    exact, _ = run(1, dtype=torch.float32)
    for found in (again, run(1, products_below=1)[0]):
        for one, other in zip(found, exact, strict=True):
            assert (one.float() - other).norm() < 0.01 * other.norm()

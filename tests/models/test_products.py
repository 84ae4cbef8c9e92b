import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sutrain.models.products import Source, _softmax_backward, attend_by_products

LENGTHS = [5, 1, 37, 9, 33]  # of two widths: groups of three and of two, none of them full


def by_autograd(query, key, value, lengths, masks, squared, silu=False):
    """The same in whole matrices, differentiated by autograd."""
    pieces, value = [], torch.nn.functional.silu(value) if silu else value
    for q, k, v, mask in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), masks, strict=True):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        pieces.append((torch.relu(scores).square() if squared else torch.softmax(scores, -1)) @ v)
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 3)], ids=["unit", "row", "rows"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_output_and_gradients_are_those_of_autograd(shape, squared, masked, keep, silu):
    """In fp64, so that nothing hides in rounding; inputs are views, as a model's are."""
    torch.manual_seed(0)
    lengths = LENGTHS if shape[0] == 1 else [13]
    total = sum(lengths)
    inputs = [
        torch.randn(shape[0], total, shape[1], size, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for size in (4, 4, 6)
    ]
    masks = [
        torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)[None] if masked else None for n in lengths
    ]
    direction = torch.randn(*shape, total, 6, dtype=torch.float64)
    found = attend_by_products(*inputs, lengths, masks, squared, keep, silu)
    expected = by_autograd(*inputs, lengths, masks, squared, silu)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("squared", [False, True])
def test_bf16_stays_within_its_rounding(squared):
    torch.manual_seed(0)
    half = [torch.randn(1, 3, sum(LENGTHS), 8).bfloat16().requires_grad_() for _ in range(3)]
    full = [x.detach().double().requires_grad_() for x in half]
    found = attend_by_products(*half, LENGTHS, [None] * 5, squared, False)
    expected = by_autograd(*full, LENGTHS, [None] * 5, squared)
    assert found.dtype == torch.bfloat16
    found.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in ((found, expected), *((x.grad, y.grad) for x, y in zip(half, full, strict=True))):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_masks_of_some_documents_alone_and_of_every_row():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, sum(LENGTHS), 4, dtype=torch.float64) for _ in range(3)]
    masks = [None, None, torch.full((37, 37), -math.inf, dtype=torch.float64).triu(1)[None], None, None]
    found = attend_by_products(*inputs, LENGTHS, masks, False, False)
    torch.testing.assert_close(found, by_autograd(*inputs, LENGTHS, masks, False))
    inputs = [torch.randn(3, 2, 5, 4, dtype=torch.float64) for _ in range(3)]
    masks = [torch.randn(3, 1, 5, 5, dtype=torch.float64)]  # as padding is hidden: each row its own
    found = attend_by_products(*inputs, [5], masks, False, False)
    torch.testing.assert_close(found, by_autograd(*inputs, [5], masks, False))


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_kept_is_what_was_asked_for(heads):
    """Query, key and value once, the scores of every group or none; masks belong to the batch and are not counted."""
    inputs = [torch.randn(1, heads, sum(LENGTHS), 4, requires_grad=True) for _ in range(3)]
    widths = [32, 32, 64, 32, 64]
    tokens = sum(LENGTHS) if heads == 1 else sum(widths)
    scores = [(n, n) for n in LENGTHS] if heads == 1 else [(32, 32), (64, 64)]
    for keep, squared, silu in itertools.product((False, True), repeat=3):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            attend_by_products(*inputs, LENGTHS, [None] * 5, squared, keep, silu)
        assert [x.numel() for x in held[:2]] == [tokens * heads * 4] * 2
        if silu:
            assert held[2].data_ptr() == inputs[2].data_ptr()  # the value as it was given
        assert [tuple(x.shape[-2:]) for x in held[3:]] == (scores if keep else [])


@pytest.mark.parametrize("squared", [False, True])
def test_what_is_made_again_is_not_kept(squared):
    """Its source is, and the gradients are those of query, key and value."""
    torch.manual_seed(0)
    shared = torch.randn(1, sum(LENGTHS), 4, dtype=torch.float64)

    def make(shared):
        return shared.unsqueeze(1), 2.0 * shared.unsqueeze(1), shared.repeat(1, 1, 2).unsqueeze(1) + 1.0

    found, kept = [], []
    for source in (None, Source((shared, None), lambda shared, _: make(shared))):
        held: list[torch.Tensor] = []
        inputs = [x.detach().requires_grad_() for x in make(shared)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            mixed = attend_by_products(*inputs, LENGTHS, [None] * 5, squared, False, True, source)
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), inputs)))
        kept.append({x.data_ptr() for x in held})
    torch.testing.assert_close(found[1], found[0])
    assert kept[1] == {shared.data_ptr()}
    assert len(kept[0]) == 3


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_computed_again_as_a_whole_has_the_same_gradients(keep):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, sum(LENGTHS), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    settings = LENGTHS, [None] * 5, False, keep
    found = attend_by_products(*inputs, *settings)
    again = checkpoint(attend_by_products, *inputs, *settings, use_reentrant=False)
    one, other = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, again))
    torch.testing.assert_close(one, other)


def test_softmax_goes_back_in_place():
    """What one kernel of torch's permits must not change unnoticed."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width in (1, 7, 512, 2049):
            weights = torch.softmax(torch.randn(3, 5, width, dtype=dtype), -1)
            gradient = torch.randn_like(weights)
            expected = torch._softmax_backward_data(gradient, weights, -1, dtype)
            torch.testing.assert_close(_softmax_backward(gradient, weights), expected, rtol=0, atol=0)

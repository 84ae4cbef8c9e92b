import itertools
import math

import pytest
import torch

from sutrain.models.gau import gated
from sutrain.models.products import attend_by_products

LENGTHS = [5, 1, 9]


def by_autograd(query, key, value, masks, squared, silu=False):
    """The same in whole matrices, differentiated by autograd."""
    pieces, value = [], torch.nn.functional.silu(value) if silu else value
    for q, k, v, mask in zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), masks, strict=True):
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
    total = sum(LENGTHS)
    inputs = [
        torch.randn(shape[0], total, shape[1], size, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for size in (4, 4, 6)
    ]
    masks = [
        torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)[None] if masked else None for n in LENGTHS
    ]
    direction = torch.randn(*shape, total, 6, dtype=torch.float64)
    found = attend_by_products(*inputs, LENGTHS, masks, squared, keep, silu)
    expected = by_autograd(*inputs, masks, squared, silu)
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
    found = attend_by_products(*half, LENGTHS, [None] * 3, squared, False)
    expected = by_autograd(*full, [None] * 3, squared)
    assert found.dtype == torch.bfloat16
    found.double().square().sum().backward()
    expected.square().sum().backward()
    for one, other in ((found, expected), *((x.grad, y.grad) for x, y in zip(half, full, strict=True))):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_what_is_kept_is_what_was_asked_for():
    """Scores of every document once, or none; the mask belongs to the batch and is not counted."""
    inputs = [torch.randn(1, 2, sum(LENGTHS), 4, requires_grad=True) for _ in range(3)]
    for keep, squared, silu in itertools.product((False, True), repeat=3):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            attend_by_products(*inputs, LENGTHS, [None] * 3, squared, keep, silu)
        assert [x.shape for x in held[:3]] == [x.shape for x in inputs]
        assert held[2].data_ptr() == inputs[2].data_ptr()  # the value as it was given
        assert [tuple(x.shape[-2:]) for x in held[3:]] == ([(n, n) for n in LENGTHS] if keep else [])


def test_a_gate_is_silu_and_keeps_what_it_was_given():
    gate, x = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(gated(gate, x), torch.nn.functional.silu(gate) * x)
    assert torch.autograd.gradcheck(gated, (gate, x))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        gated(gate, x)
    assert [t.data_ptr() for t in held] == [gate.data_ptr(), x.data_ptr()]

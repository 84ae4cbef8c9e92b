import pytest
import torch
from torch.nn import functional as F

from sutrain.models.feed_forward import gated_output


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_a_gated_output_keeps_gate_and_value_alone(activation):
    gate, x = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output = torch.nn.Linear(3, 4, dtype=torch.float64)
    inputs = (gate, x, *output.parameters())
    expected = F.linear(activation(gate) * x, output.weight, output.bias)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        found = gated_output(output, activation, gate, x)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )
    wide = [t for t in held if t.shape == gate.shape]
    assert {t.data_ptr() for t in wide} == {gate.data_ptr(), x.data_ptr()}


def test_no_product_is_made_twice():
    gate, x = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(2))
    output = torch.nn.Linear(3, 4, bias=False)
    calls = []
    output.register_forward_pre_hook(lambda module, inputs: calls.append("begun"))
    output.register_forward_hook(lambda module, inputs, out: calls.append("done"))
    gated_output(output, F.silu, gate, x).sum().backward()
    assert calls == ["begun", "done", "begun"]  # ends where its input is there again

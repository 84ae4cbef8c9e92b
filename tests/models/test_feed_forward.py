import pytest
import torch
from torch.nn import functional as F

from sutrain.models.feed_forward import relu


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_compiler_gets_a_relu_that_keeps_no_bools(monkeypatch, device):
    """Ours, of which torch.compile finds nothing to keep but the output; with the same gradients."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], device=device, requires_grad=True)
    y, expected = relu(x), F.relu(x)
    assert type(y.grad_fn).__name__ == "_ReluBackward"
    if device == "cpu":
        direction = torch.randn(4)
        found, wanted = (torch.autograd.grad(z, x, direction) for z in (y, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)

from dataclasses import replace

import pytest
import torch

from sutrain.models.norms import RMSNorm, build_norm
from tests.models.tiny import CONFIGS


def test_rms_divides_by_the_root_of_the_mean_square_with_epsilon_inside():
    x = torch.randn(5, 32) * 1e-3
    norm = RMSNorm(32, 1e-2, gain=False)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert list(norm.parameters()) == []


def test_the_mean_square_of_bf16_is_taken_in_fp32():
    """Summed in bf16, 4096 equal squares stop growing at 256 and the norm is wrong by a factor of four."""
    x = torch.full((1, 4096), 0.25, dtype=torch.bfloat16)
    assert torch.equal(RMSNorm(4096, 1e-12, gain=False)(x), torch.ones(1, 4096, dtype=torch.bfloat16))


def test_the_gradient_is_that_of_the_definition():
    """In fp64; and in bf16 to its rounding, beside torch's own."""
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RMSNorm(32, 1e-2, gain=False), x)
    half = torch.randn(50, 64).bfloat16().requires_grad_()
    full = half.detach().double().requires_grad_()
    direction = torch.randn(50, 64).bfloat16()
    RMSNorm(64, 1e-6, gain=False)(half).backward(direction)
    torch.nn.functional.rms_norm(full, (64,), None, 1e-6).backward(direction.double())
    assert (half.grad.double() - full.grad).norm() < 0.005 * full.grad.norm()


def test_nothing_is_kept_but_the_output_and_a_number_a_token():
    held = []
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = RMSNorm(32, 1e-6, gain=False)(x)
    assert [t.shape for t in held] == [(6, 32), (6, 1)] and held[0].data_ptr() == y.data_ptr()


def test_a_row_of_zeros_stays_finite_forward_and_backward():
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8, 1e-12, gain=False)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", ["rms", "rms_gain", "layer_norm"])
def test_an_fp32_stream_may_meet_bf16_weights(kind):
    norm = build_norm(replace(CONFIGS["roformer_v2"], norm=kind)).bfloat16()
    x = torch.randn(4, 32) + 1
    y = norm(x)
    assert y.dtype == torch.float32
    centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
    torch.testing.assert_close(y, centred / centred.pow(2).mean(-1, keepdim=True).sqrt())

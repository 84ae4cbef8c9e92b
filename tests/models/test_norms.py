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

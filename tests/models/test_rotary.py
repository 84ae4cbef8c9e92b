import numpy as np
import torch
from transformers.models.roformer.modeling_roformer import (
    RoFormerSelfAttention,
    RoFormerSinusoidalPositionalEmbedding,
)

from sutrain.models.rotary import _cached_table, rotary_table, rotate, turn_complex, turn_real
from tests.models import reference

CPU = torch.device("cpu")


def turned(x_LK, base=10000.0):
    """Rotate one head of one row."""
    length, size = x_LK.shape
    return rotate(x_LK[None, :, None, :], rotary_table(length, size, base, CPU))[0, :, 0]


def test_scores_depend_on_the_difference_of_positions_only():
    query, key = torch.randn(64), torch.randn(64)
    length = 512
    scores = turned(query.expand(length, 64)) @ turned(key.expand(length, 64)).T / 8
    for offset in (0, 1, 17, 300):
        diagonal = torch.diagonal(scores, offset)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    assert scores[0].std() > 0.01  # and they do depend on the difference


def test_equals_the_interleaved_formula():
    x = torch.randn(40, 16, dtype=torch.float64)
    expected = reference.rope(x.numpy())
    np.testing.assert_allclose(turned(x.float()).numpy(), expected, atol=1e-5)


def test_equals_the_rotary_positions_of_roformer_in_transformers():
    length, heads, size = 50, 3, 16
    table = RoFormerSinusoidalPositionalEmbedding(length, size)
    table.weight.data.copy_(table.create_weight())
    query, key = torch.randn(2, heads, length, size), torch.randn(2, heads, length, size)
    expected = RoFormerSelfAttention.apply_rotary_position_embeddings(
        table.weight[:length][None, None], query, key
    )
    ours = rotary_table(length, size, 10000.0, CPU)
    for given, wanted in zip((query, key), expected, strict=True):
        found = rotate(given.transpose(1, 2), ours).transpose(1, 2)
        assert (found - wanted).abs().max() < 1e-5


def test_real_and_complex_arithmetic_agree():
    """Compilers take the one, everybody else the other."""
    pairs, table = torch.randn(2, 9, 3, 4, 2), rotary_table(9, 8, 10000.0, CPU).unsqueeze(-3)
    torch.testing.assert_close(turn_real(pairs, table), turn_complex(pairs, table), atol=1e-6, rtol=0)


def test_the_table_survives_inference_mode_and_keeps_its_precision():
    _cached_table.cache_clear()
    with torch.inference_mode():
        rotary_table(20, 8, 10000.0, CPU)
    x = torch.randn(1, 20, 1, 8, requires_grad=True)
    rotate(x, rotary_table(20, 8, 10000.0, CPU)).sum().backward()
    assert x.grad is not None
    assert rotary_table(20, 8, 10000.0, CPU).dtype == torch.float32
    assert rotate(x.bfloat16(), rotary_table(20, 8, 10000.0, CPU)).dtype == torch.bfloat16


def test_tables_of_all_lengths_are_slices_of_each_other():
    long = rotary_table(300, 8, 10000.0, CPU)
    for length in (1, 127, 128, 129, 256, 257):
        table = rotary_table(length, 8, 10000.0, CPU)
        assert table.shape == (length, 4, 2)
        assert torch.equal(table, long[:length])


def test_a_table_of_a_recorded_program_is_nobody_elses():
    """What torch.export sees are stand-ins without numbers."""

    class Turn(torch.nn.Module):
        def forward(self, x_BLHK):
            return rotate(x_BLHK, rotary_table(x_BLHK.shape[1], x_BLHK.shape[3], 10000.0, CPU))

    _cached_table.cache_clear()
    x_BLHK = torch.randn(2, 9, 3, 8)
    recorded = torch.export.export(Turn(), (x_BLHK,)).module()
    torch.testing.assert_close(Turn()(x_BLHK), recorded(x_BLHK))

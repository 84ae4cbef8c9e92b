import numpy as np
import pytest
import torch
from transformers.models.roformer.modeling_roformer import (
    RoFormerSelfAttention,
    RoFormerSinusoidalPositionalEmbedding,
)

from sutrain.models.rotary import (
    _cached_table,
    rotary_table,
    rotate,
    turn_complex,
    turn_packed,
    turn_real,
)
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
    pairs = torch.randn(2, 9, 3, 4, 2)
    cos, sin, both = (x.unsqueeze(-2) for x in rotary_table(9, 8, 10000.0, CPU))
    torch.testing.assert_close(turn_real(pairs, cos, sin), turn_complex(pairs, both), atol=1e-6, rtol=0)


def test_pairs_packed_in_one_number_are_turned_to_the_same_bits():
    """As compiled code for a CPU reads them; halves, huge, tiny and no numbers included."""
    x = torch.randn(2, 9, 3, 16).bfloat16()
    x[0, 4, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 3e38, 3e38, 1e-40, -1e-40] * 2)
    for size in (2.0**-7, 2.0**-8):  # products of which many end in the middle between two bf16
        x[1, :, :, :8] = (torch.randint(-200, 200, (9, 3, 8)) * size).bfloat16()
    cos, sin, _ = (part.unsqueeze(-2).clone() for part in rotary_table(9, 16, 10000.0, CPU))
    cos[4:], sin[4:] = 0.5, 0.75
    found = turn_packed(x, cos, sin)
    expected = turn_real(x.float().unflatten(-1, (-1, 2)), cos, sin).flatten(-2).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().any() and found.isinf().any()


@pytest.mark.parametrize("half", [False, True])
def test_compiled_code_turns_as_other_code_does(half):
    turns, found = rotary_table(9, 16, 10000.0, CPU), []
    x = torch.randn(2, 3, 9, 16).bfloat16().transpose(1, 2)
    direction = torch.randn(2, 9, 16, 3).bfloat16().transpose(2, 3)  # whose pairs do not lie together
    for turn in (rotate, torch.compile(rotate)):
        given = x.clone().requires_grad_()
        turned = turn(given, turns, half)
        turned.backward(direction)
        found.append((turned.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert found[0][0].dtype == torch.bfloat16 and found[0][1].any()


def test_the_table_survives_inference_mode_and_keeps_its_precision():
    _cached_table.cache_clear()
    with torch.inference_mode():
        rotary_table(20, 8, 10000.0, CPU)
    x = torch.randn(1, 20, 1, 8, requires_grad=True)
    rotate(x, rotary_table(20, 8, 10000.0, CPU)).sum().backward()
    assert x.grad is not None
    assert [part.dtype for part in rotary_table(20, 8, 10000.0, CPU)] == [torch.float32] * 2 + [
        torch.complex64
    ]
    assert rotate(x.bfloat16(), rotary_table(20, 8, 10000.0, CPU)).dtype == torch.bfloat16


def test_tables_of_all_lengths_are_slices_of_each_other():
    long = rotary_table(300, 8, 10000.0, CPU)
    for length in (1, 127, 128, 129, 256, 257):
        table = rotary_table(length, 8, 10000.0, CPU)
        for part, whole in zip(table, long, strict=True):
            assert part.shape == (length, 4)
            assert torch.equal(part, whole[:length])


def test_a_table_of_a_recorded_program_is_nobody_elses():
    """What torch.export sees are stand-ins without numbers."""

    class Turn(torch.nn.Module):
        def forward(self, x_BLHK):
            return rotate(x_BLHK, rotary_table(x_BLHK.shape[1], x_BLHK.shape[3], 10000.0, CPU))

    _cached_table.cache_clear()
    x_BLHK = torch.randn(2, 9, 3, 8)
    recorded = torch.export.export(Turn(), (x_BLHK,)).module()
    torch.testing.assert_close(Turn()(x_BLHK), recorded(x_BLHK))

from dataclasses import replace

import pytest
import torch

from sutrain.models.encoder import Encoder
from sutrain.models.positions import LearnedPositions, positions_in_documents
from tests.models.tiny import CONFIGS, VARIANTS


def hierarchical(alpha, learned=32, size=64):
    config = replace(CONFIGS["bert"], hierarchical_alpha=alpha, max_row_tokens=learned, hidden_size=size)
    positions = LearnedPositions(config).double()
    torch.nn.init.normal_(positions.table.weight)
    return positions


def vectors(positions, count):
    return positions(torch.arange(count)[None], count)[0].detach()


def test_the_first_n_positions_are_the_learned_vectors_themselves():
    """kexue.fm/archives/7947: q(i n + j) = a u_i + (1 - a) u_j with u = (p - a p_0) / (1 - a)."""
    positions = hierarchical(0.4)
    p = positions.table.weight.detach()
    found = vectors(
        positions, 4 * 32
    )  # long enough for the decomposition, which need not equal p by a short cut
    assert (found[:32] - p).abs().max() < 1e-12
    u = (p - 0.4 * p[:1]) / 0.6
    torch.testing.assert_close(found[2 * 32 + 5], 0.4 * u[2] + 0.6 * u[5])


def test_four_n_positions_are_distinct_and_would_not_be_with_one_half():
    found = vectors(hierarchical(0.4), 4 * 32)
    assert (torch.cdist(found, found) + torch.eye(len(found)) > 1e-6).all()
    halved = hierarchical(0.4)
    halved.alpha = 0.5  # a configuration cannot say so
    same = vectors(halved, 4 * 32)
    assert torch.allclose(same[1 * 32 + 2], same[2 * 32 + 1])


def test_a_row_longer_than_there_are_positions_is_refused():
    tokens = torch.randint(5, 300, (1, 101))
    with pytest.raises(ValueError, match="row of 101 tokens: expected at most 64"):
        Encoder(CONFIGS["bert"])(tokens)
    with pytest.raises(ValueError, match="expected at most 100"):
        Encoder(VARIANTS["hierarchical"])(tokens)
    Encoder(VARIANTS["hierarchical"])(tokens[:, :100])


def test_gradient_reaches_the_table_through_both_parts():
    positions = hierarchical(0.4)
    positions(torch.tensor([[3 * 32 + 5]]), 128).sum().backward()
    assert positions.table.weight.grad.abs().amax(-1).nonzero().flatten().tolist() == [0, 3, 5]


def test_positions_start_anew_with_every_document_and_run_on_through_a_hole():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0], [3, 3, 0, 3, 4, 4, 4, 4]])
    expected = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 7], [0, 1, 0, 3, 0, 1, 2, 3]])
    assert torch.equal(positions_in_documents(documents), expected)

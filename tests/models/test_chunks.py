import pytest
import torch

from sutrain.models.chunks import build_chunks

# 5 and 4 tokens and padding; 2, 6 and 1: in chunks of 4 two rows of 3 and 4 chunks.
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0], [0] + [1] * 2 + [2] * 6 + [3]])


def test_every_document_begins_a_chunk():
    chunks = build_chunks(DOCUMENTS, 4, causal=False)
    tokens = torch.arange(1, 21, dtype=torch.float64).view(2, 10, 1)
    assert chunks.arrange(tokens).squeeze(-1).tolist() == [
        [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 9], [0, 0, 0, 0]],
        [[12, 13, 0, 0], [14, 15, 16, 17], [18, 19, 0, 0], [20, 0, 0, 0]],
    ]
    back = chunks.put_back(chunks.arrange(tokens))
    assert torch.equal(back, tokens * (DOCUMENTS > 0).unsqueeze(-1))


def test_gradients_go_back_where_the_tokens_came_from():
    chunks = build_chunks(DOCUMENTS, 4, causal=False)
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    places = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chunks.arrange, x)
    assert torch.autograd.gradcheck(chunks.put_back, places)


def test_what_is_infinite_stays_in_its_document():
    """The first token stands for what is in no place, and must not be multiplied by zero there."""
    chunks = build_chunks(DOCUMENTS, 4, causal=False)
    x = torch.randn(2, 10, 3)
    x[0, 0] = torch.inf
    assert chunks.arrange(x).isinf().sum() == 3
    assert chunks.put_back(chunks.arrange(x))[DOCUMENTS != 1].isfinite().all()
    assert not chunks.arrange(x).isnan().any()


def test_rows_of_padding_alone():
    chunks = build_chunks(torch.zeros(2, 3, dtype=torch.long), 4, causal=True)
    assert torch.equal(chunks.put_back(chunks.arrange(torch.randn(2, 3, 5))), torch.zeros(2, 3, 5))


def test_an_interrupted_document_is_refused():
    with pytest.raises(ValueError, match="interrupted"):
        build_chunks(torch.tensor([[1, 2, 1]]), 4, causal=False)

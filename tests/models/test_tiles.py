import pytest
import torch

from sutrain.models.tiles import WIDTH_STEP, tiling

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "lengths, rows, heads",
    [((5, 40, 32, 3, 33, 64), 1, 3), ((7,), 4, 2), ((7,), 1, 2), ((7,), 4, 1), ((5, 40, 3), 1, 1)],
)
def test_what_is_taken_comes_back_and_every_document_lies_where_its_group_says(lengths, rows, heads):
    tiles = tiling(lengths, rows, heads, CPU)
    length, size = sum(lengths), 6
    x = torch.randn(rows, length, heads, size).transpose(1, 2)
    taken = tiles.take(x)
    torch.testing.assert_close(tiles.put_back(taken, rows), x, rtol=0, atol=0)
    spans = [x[:, :, end - n : end] for n, end in zip(lengths, torch.tensor(lengths).cumsum(0), strict=True)]
    documents = spans if len(lengths) > 1 else [row.unsqueeze(0) for row in x]
    seen = []
    for group, batch in zip(tiles.groups, tiles.batches(taken), strict=True):
        assert batch.shape == (len(group.documents) * heads, group.width, size)
        for number, own in zip(group.documents, batch.split(heads), strict=True):
            n = documents[number].shape[2]
            torch.testing.assert_close(own[:, :n], documents[number][0], rtol=0, atol=0)
        seen += group.documents
    assert sorted(seen) == list(range(len(documents)))


def test_places_of_nobody_are_hidden_and_have_no_gradient():
    tiles = tiling((5, 40), 1, 3, CPU)
    assert [group.width for group in tiles.groups] == [WIDTH_STEP, 2 * WIDTH_STEP]
    gradient = tiles.take_gradient(torch.ones(1, 3, 45, 2))
    for group, batch, n in zip(tiles.groups, tiles.batches(gradient), (5, 40), strict=True):
        assert batch[:, :n].eq(1).all() and batch[:, n:].eq(0).all()
        empty = torch.arange(group.width)[-WIDTH_STEP:] >= n
        assert torch.equal(group.hidden_N1S == -torch.inf, empty.expand(3, 1, -1))
        assert group.hidden_N1S[..., ~empty].eq(0).all()
    assert torch.isfinite(tiles.take(torch.ones(1, 3, 45, 2))).all()


def test_one_width_leaves_no_places_and_one_head_is_not_moved():
    full = tiling((32, 32), 1, 2, CPU)
    assert full.empty is None and full.groups[0].hidden_N1S is None and len(full.groups) == 1
    x = torch.randn(1, 1, 45, 2)
    assert tiling((5, 40), 1, 1, CPU).take(x).data_ptr() == x.data_ptr()
    assert [group.width for group in tiling((5, 40), 1, 1, CPU).groups] == [5, 40]

"""A run of a flattened tensor equals its boxes put end to end."""

from itertools import pairwise
from math import prod

import pytest
import torch

from sutrain.optim.boxes import boxes_of_run


@pytest.mark.parametrize("shape", [(), (9,), (4, 5), (1, 6), (6, 1), (2, 3, 4), (3, 1, 4), (2, 2, 3, 2)])
def test_every_run_of_every_shape(shape):
    size = prod(shape)
    whole = torch.arange(size).view(shape or (1,))
    for offset in range(size):
        for length in range(1, size - offset + 1):
            boxes = boxes_of_run(shape, offset, length)
            run = torch.arange(offset, offset + length)
            assert boxes[0].position == 0
            assert all(a.position + prod(a.sizes) == b.position for a, b in pairwise(boxes))
            assert sum(prod(box.sizes) for box in boxes) == length
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            for box in boxes:
                part = box.of_flat(run)
                slices = tuple(slice(s, s + n) for s, n in zip(box.starts, box.sizes, strict=True))
                assert torch.equal(part, whole[slices])
                assert torch.equal(part, box.of_whole(whole))


def test_row_and_column_statistics_face_the_box():
    rows, columns = torch.arange(4).view(4, 1), torch.arange(5).view(1, 5)
    ragged_start, full_rows, ragged_end = boxes_of_run((4, 5), 3, 14)
    assert ragged_start.of_whole(rows).tolist() == [[0]]
    assert ragged_start.of_whole(columns).tolist() == [[3, 4]]
    assert full_rows.of_whole(rows).tolist() == [[1], [2]]
    assert full_rows.of_whole(columns).tolist() == [[0, 1, 2, 3, 4]]
    assert ragged_end.of_whole(rows).tolist() == [[3]]
    assert ragged_end.of_whole(columns).tolist() == [[0, 1]]

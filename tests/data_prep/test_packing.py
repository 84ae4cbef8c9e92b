"""Packing: every token once, in order, whatever the portions; pieces tile the rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data_prep.packing import Documents, RowPacker
from data_prep.rows import Block, document_numbers


def make_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[2, *(draw.randint(5, 99) for _ in range(draw.randint(1, longest))), 3] for _ in range(count)]


def pack(documents: list[list[int]], row_tokens: int, block_rows: int, portions: list[int]) -> list[Block]:
    packer, blocks, begin = RowPacker(row_tokens, block_rows), [], 0
    for size in [*portions, len(documents)]:
        part = documents[begin : begin + size]
        if not part:
            continue
        tokens = np.array([t for d in part for t in d], dtype=np.uint16)
        origin = np.array(
            [[0] * len(part), [1] * len(part), [2] * len(part), range(begin, begin + len(part))]
        )
        lengths = np.array([len(d) for d in part])
        blocks += packer.add(Documents(tokens, tokens % 2 == 0, lengths, origin.astype(np.uint32)))
        begin += size
    return blocks + list(packer.finish())


@pytest.mark.parametrize(("row_tokens", "block_rows"), [(8, 1), (8, 4), (32, 3), (64, 50)])
@pytest.mark.parametrize("longest", [3, 200])
def test_documents_tile_the_rows(row_tokens, block_rows, longest):
    documents = make_documents(150, longest)
    blocks = pack(documents, row_tokens, block_rows, [])
    stream = [token for document in documents for token in document]
    flat = np.concatenate([block.tokens_NL.reshape(-1) for block in blocks])
    assert flat[: len(stream)].tolist() == stream and not flat[len(stream) :].any()
    assert len(flat) - len(stream) < row_tokens
    words = np.concatenate([block.word_start_NL.reshape(-1) for block in blocks])
    assert np.array_equal(words[: len(stream)], np.array(stream) % 2 == 0) and not words[len(stream) :].any()
    rebuilt: dict[int, list[int]] = {}
    for block in blocks:
        ends = np.zeros(len(block.tokens_NL), dtype=int)
        for row, start, length, _source, _file, _block, record, piece in block.pieces.T.tolist():
            assert start == ends[row]
            ends[row] = start + length
            assert piece == 0 or record in rebuilt
            rebuilt.setdefault(record, []).extend(block.tokens_NL[row, start : start + length].tolist())
        assert np.all(ends[:-1] == row_tokens)
    assert [rebuilt[i] for i in range(len(documents))] == documents


def test_portions_cannot_be_seen():
    documents = make_documents(200, 60, seed=1)
    whole = pack(documents, 16, 4, [])
    for portions in ([1] * 200, [7] * 28, [199]):
        other = pack(documents, 16, 4, portions)
        assert len(other) == len(whole)
        for a, b in zip(whole, other, strict=True):
            assert np.array_equal(a.tokens_NL, b.tokens_NL) and np.array_equal(a.pieces, b.pieces)
            assert np.array_equal(a.word_start_NL, b.word_start_NL)


def test_document_numbers_count_pieces_in_each_row():
    blocks = pack([[2, 9, 3], [2, 9, 9, 9, 3], [2, 9, 3]], 8, 2, [])
    assert document_numbers(blocks[0]).tolist() == [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]]

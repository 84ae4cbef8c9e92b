"""Samples by number: every row once an epoch, any cut gives the same, shared out without overlap."""

import numpy as np
import pytest

from sutrain.config import Masking
from sutrain.data import (
    BLOCK_ROWS,
    BatchPlan,
    DataError,
    Samples,
    load_manifest,
    permuted,
    prefetch,
    word_masking,
)


@pytest.fixture(scope="module")
def samples(dataset):
    manifest = load_manifest(dataset)
    return Samples(dataset, "train", 5, word_masking(manifest, Masking(), 5, "masks"))


def test_every_row_comes_exactly_once_an_epoch(samples):
    rows = samples.rows_per_epoch
    assert rows > 2 * BLOCK_ROWS, "the data set is too small to permute blocks"
    orders = [samples.row_numbers(epoch * rows, rows) for epoch in range(3)]
    for order in orders:
        assert (np.sort(order) == np.arange(rows)).all()
    assert (orders[0] == np.arange(rows)).all(), "epoch 0 is the order on disk"
    assert (orders[1] != orders[0]).any() and (orders[2] != orders[1]).any()


def test_any_cut_of_the_sequence_gives_the_same_rows_across_epochs(samples):
    rows = samples.rows_per_epoch
    whole = samples.row_numbers(rows - 40, 600)
    parts = [samples.row_numbers(rows - 40 + a, b - a) for a, b in ((0, 1), (1, 39), (39, 300), (300, 600))]
    assert (np.concatenate(parts) == whole).all()


def test_a_batch_does_not_depend_on_how_it_is_cut(samples):
    start = samples.rows_per_epoch - 7
    whole = samples.batch(start, 24)
    parts = [samples.batch(start + a, 6) for a in range(0, 24, 6)]
    for name in ("inputs_NL", "labels_NL", "hidden_NL", "document_NL"):
        joined = np.concatenate([getattr(part, name).numpy() for part in parts])
        assert (joined == getattr(whole, name).numpy()).all(), name
    assert sum(part.fingerprint for part in parts) % 2**48 == whole.fingerprint
    assert samples.batch(start + 1, 24).fingerprint != whole.fingerprint


def test_rows_are_those_of_the_shards(samples):
    batch = samples.batch(samples.rows_per_epoch + 3, 20)
    numbers = samples.row_numbers(samples.rows_per_epoch + 3, 20)
    original = np.where(batch.labels_NL.numpy() >= 0, batch.labels_NL.numpy(), batch.inputs_NL.numpy())
    for row, number in enumerate(numbers):
        stored = samples.reader.rows(int(number), int(number) + 1)
        assert (original[row] == stored.tokens_NL[0]).all()
        assert (batch.document_NL[row].numpy() == stored.document_NL[0]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_the_keyed_permutation_is_one_and_depends_on_the_key(size):
    images = [permuted(i, size, key=11) for i in range(size)]
    assert sorted(images) == list(range(size))
    if size >= 64:
        assert images != list(range(size))
        assert images != [permuted(i, size, key=12) for i in range(size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [2, 4])
def test_ranks_and_micro_batches_tile_the_global_batch(world_size, micro):
    plans = [BatchPlan(24, micro, world_size, rank) for rank in range(world_size)]
    covered = [
        sample
        for plan in plans
        for first, count in plan.ranges(240)
        for sample in range(first, first + count)
    ]
    assert sorted(covered) == list(range(240, 264))
    assert all(plan.accumulation * micro * world_size == 24 for plan in plans)


def test_prefetching_reads_the_planned_ranges_and_stops(samples):
    plan = BatchPlan(8, 2, 2, 1)
    read = [[batch.first_sample for batch in batches] for batches in prefetch(samples, plan, 16, updates=3)]
    assert read == [[20, 22], [28, 30], [36, 38]]


def test_an_error_while_reading_ahead_reaches_the_loop(samples, monkeypatch):
    def broken(first, count):
        raise DataError("shard-000000.tar: damaged")

    monkeypatch.setattr(samples, "batch", broken)
    with pytest.raises(DataError, match="damaged"):
        next(prefetch(samples, BatchPlan(8, 2, 1, 0), 0, updates=3))


def test_an_unfinished_data_set_is_named_with_the_way_to_one(tmp_path):
    with pytest.raises(DataError, match="python -m data_prep run"):
        load_manifest(tmp_path)


def test_split_is_by_document(dataset):
    """No text of the validation split occurs in training: documents are put together again and compared."""

    def documents(split):
        reader = Samples(
            dataset, split, 0, word_masking(load_manifest(dataset), Masking(), 0, "masks")
        ).reader
        tokens = reader.rows(0, len(reader)).tokens_NL.ravel()
        ends = np.flatnonzero(tokens == 3)
        return {tuple(text[text > 4]) for text in np.split(tokens, ends + 1)} - {()}

    train, validation = documents("train"), documents("validation")
    assert len(train) > 1000 and len(validation) > 100
    assert not train & validation

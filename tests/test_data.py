"""Samples by number: every row once an epoch, any cut gives the same, shared out without overlap."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from sutrain import prefetch as prefetching
from sutrain.batch_plan import BatchPlan
from sutrain.config import Masking
from sutrain.data import (
    BLOCK_ROWS,
    DataError,
    MixedSamples,
    Samples,
    load_manifest,
    permuted,
    vocabulary_words,
)
from sutrain.labelling import word_masking
from sutrain.masking import IGNORED
from sutrain.prefetch import prefetch


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("size", [24, 23, 5, 1])
def test_ranks_and_micro_batches_tile_the_global_batch_whether_it_divides_or_not(world_size, micro, size):
    plans = [BatchPlan(size, micro, world_size, rank) for rank in range(world_size)]
    ranges = [plan.ranges(240) for plan in plans]
    covered = [sample for rank in ranges for first, count in rank for sample in range(first, first + count)]
    assert covered == list(range(240, 240 + size))
    assert {len(rank) for rank in ranges} == {plans[0].accumulation}, "ranks compute in step"
    assert plans[0].accumulation == math.ceil(size / (micro * world_size))
    counts = [count for rank in ranges for _, count in rank]
    assert max(counts) <= micro and (size % (micro * world_size) or set(counts) == {micro})
    shares = [sum(count for _, count in rank) for rank in ranges]
    assert max(shares) - min(shares) <= 1


def test_a_rank_without_rows_computes_one_that_counts_for_nothing(samples):
    plan = BatchPlan(5, 1, 2, 0)
    mine, theirs = (next(prefetch(samples, dataclasses.replace(plan, rank=rank), 10, 1)) for rank in (0, 1))
    assert [batch.idle for batch in (*mine, *theirs)] == [False] * 5 + [True]
    idle = theirs[2]
    assert idle.inputs_NL.shape == mine[0].inputs_NL.shape and (idle.document_NL > 0).any()
    assert (idle.tokens, idle.predicted_tokens, idle.fingerprint, idle.hidden_NL.any()) == (0, 0, 0, False)
    assert (idle.labels_NL == IGNORED).all()
    whole = samples.batch(10, 5)
    for name in ("tokens", "predicted_tokens", "fingerprint"):
        assert sum(getattr(batch, name) for batch in (*mine, *theirs)) % 2**48 == getattr(whole, name)


def test_prefetching_reads_the_planned_ranges_and_stops(samples):
    plan = BatchPlan(8, 2, 2, 1)
    read = [[batch.first_sample for batch in batches] for batches in prefetch(samples, plan, 16, updates=3)]
    assert read == [[20, 22], [28, 30], [36, 38]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_every_sample_once_an_epoch_at_any_world_size_and_number_of_workers(
    samples, world_size, workers, monkeypatch, capfd
):
    """Two epochs and the batch that wraps into the third, through the real loader of every rank."""
    monkeypatch.setattr(prefetching, "_UP_SECONDS", 60)
    batch, rows = 30, samples.rows_per_epoch
    updates = -(-2 * rows // batch)
    seen, fingerprints = {}, np.zeros(updates, np.int64)
    for rank in range(world_size):
        plan = BatchPlan(batch, {1: 10, 2: 5, 3: 5, 5: 3}[world_size], world_size, rank)
        for update, batches in enumerate(prefetch(samples, plan, 0, updates, workers=workers)):
            fingerprints[update] += sum(part.fingerprint for part in batches)
            for part in batches:
                original = np.where(part.labels_NL >= 0, part.labels_NL, part.inputs_NL).astype(np.int64)
                seen |= {part.first_sample + i: row.tobytes() for i, row in enumerate(original)}
    assert sorted(seen) == list(range(updates * batch))
    stored = samples.reader.rows(0, rows).tokens_NL.astype(np.int64)
    expected = sorted(row.tobytes() for row in stored)
    for epoch in (0, 1):
        assert sorted(seen[epoch * rows + i] for i in range(rows)) == expected
    once = [samples.batch(update * batch, batch).fingerprint for update in range(updates)]
    assert (fingerprints % 2**48 == once).all(), "the same documents and masks as read in one go"
    assert not capfd.readouterr().err, "no process failed, and left it to the loop"


def test_warm_ups_change_the_size_of_updates_and_the_length_of_rows_but_not_what_is_read(samples):
    plan = BatchPlan(
        24, 2, 2, 0, size_warmup=((0, 8), (16, 12), (40, 0)), length_warmup=((0, 8), (28, 16), (64, 0))
    )
    other = dataclasses.replace(plan, rank=1)
    read, lengths, position = [], [], 0
    for mine, theirs in zip(prefetch(samples, plan, 0, 6), prefetch(samples, other, 0, 6), strict=True):
        batches = [*mine, *theirs]
        position += plan.sequences_at(position)
        read.append(sum(len(batch.inputs_NL.ravel()) for batch in batches) // samples.manifest.row_tokens)
        lengths.append(batches[0].inputs_NL.shape[1])
    assert read == [8, 8, 12, 12, 24, 24] and position == sum(read)
    assert [plan.samples_after(updates) for updates in range(7)] == [0, *itertools.accumulate(read)]
    assert dataclasses.replace(plan, size_warmup=()).samples_after(10**9) == 24 * 10**9
    skipped = dataclasses.replace(plan, size_warmup=((0, 100), (16, 12), (40, 8), (120, 0)))
    assert [skipped.samples_after(updates) for updates in range(6)] == [0, 100, 108, 116, 124, 148]
    assert lengths == [8, 8, 8, 16, 16, 32]
    whole, cut = samples.batch(3, 4), samples.batch(3, 4).cut(8)
    assert (cut.labels_NL.reshape(4, -1) == whole.labels_NL).all() and cut.fingerprint == whole.fingerprint
    # A run that goes on in the middle of the warm-up sees what it would have seen.
    later = [batches[0].first_sample for batches in prefetch(samples, plan, 16, 4)]
    assert later == [16, 28, 40, 64]


def test_corpora_are_mixed_and_masked_by_their_place_in_the_mixture(samples, dataset):
    other = Samples(dataset, "validation", 5, samples.labelling)
    mixed = MixedSamples([samples, other], [3, 1], 5, samples.labelling)
    whole = mixed.batch(1000, 60)
    parts = [mixed.batch(1000 + a, b - a) for a, b in ((0, 7), (7, 40), (40, 60))]
    assert (np.concatenate([part.inputs_NL for part in parts]) == whole.inputs_NL.numpy()).all()
    assert sum(part.fingerprint for part in parts) % 2**48 == whole.fingerprint
    corpus_N, number_N = mixed.mixture.assign(1000, 60)
    assert 5 < (corpus_N == 1).sum() < 30
    original = np.where(whole.labels_NL >= 0, whole.labels_NL, whole.inputs_NL)
    for row, (corpus, number) in enumerate(zip(corpus_N, number_N, strict=True)):
        assert (original[row] == [samples, other][corpus].read(int(number), 1)[0][0]).all()


def test_corpora_of_other_tokenizers_are_not_mixed(samples, dataset):
    other = Samples(dataset, "validation", 5, samples.labelling)
    other.manifest = dataclasses.replace(other.manifest, row_tokens=64)
    with pytest.raises(DataError, match="row_tokens differs"):
        MixedSamples([samples, other], [1, 1], 5, samples.labelling)


def test_shards_without_word_starts_take_them_from_the_vocabulary(dataset):
    words = vocabulary_words(dataset)
    reader = Samples(dataset, "train", 5, word_masking(load_manifest(dataset), Masking(), 5, "masks"))
    tokens_NL, segmented_NL, _ = reader.read(0, 50)
    starts_NL = words.starts(tokens_NL)
    assert starts_NL.shape == segmented_NL.shape and 0.2 < starts_NL.mean() <= 1
    assert vocabulary_words(dataset.parent) is None


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

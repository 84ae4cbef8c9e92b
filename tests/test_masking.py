"""Whole-word masking: the published shares, words as a whole, nothing visible that is scored, no state."""

import numpy as np
import pytest

from sutrain.masking import IGNORED, Spans, VocabularyWords, WordMasking

SPECIAL = (0, 1, 2, 3, 4)
CLS, SEP, MASK, PAD = 2, 3, 4, 0
VOCAB = 1000


def masking(**changes):
    return WordMasking(seed=7, vocab_size=VOCAB, special_ids=SPECIAL, mask_id=MASK, **changes)


def random_rows(rows, length, seed=0):
    """Rows of [CLS] words of one to four tokens … [SEP], with padding at the end of every third row."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, VOCAB, (rows, length))
    starts = random.random((rows, length)) < 0.4
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    tokens[::3, -9:] = PAD
    tokens[::3, -10] = SEP
    return tokens, starts | np.isin(tokens, SPECIAL)


def word_numbers(tokens, starts):
    special = np.isin(tokens, SPECIAL)
    begins = starts | special
    begins[:, 1:] |= special[:, :-1]
    begins[:, 0] = True
    return np.cumsum(begins.ravel()).reshape(begins.shape)


@pytest.fixture(scope="module")
def masked():
    tokens, starts = random_rows(4000, 64)
    return tokens, starts, masking()(tokens, starts, 0)


def test_shares_by_word_are_those_of_roformer_v2(masked):
    tokens, starts, rows = masked
    regular = ~np.isin(tokens, SPECIAL)
    words = word_numbers(tokens, starts)
    first = np.unique(words[regular], return_index=True)[1]
    labels, inputs = rows.labels_NL[regular][first], rows.inputs_NL[regular][first]
    predicted = labels != IGNORED
    count = len(first)
    assert count > 80_000
    assert predicted.mean() == pytest.approx(0.15, abs=0.003)
    hidden = (inputs == MASK)[predicted].mean()
    kept = (inputs == labels)[predicted].mean()
    assert hidden == pytest.approx(0.8, abs=0.01)
    # A random token equals the original once in V.
    assert kept == pytest.approx(0.1, abs=0.01)


def test_all_tokens_of_a_word_share_one_fate(masked):
    tokens, starts, rows = masked
    words = word_numbers(tokens, starts).ravel()
    for fate in (rows.labels_NL != IGNORED, rows.hidden_NL):
        total = np.bincount(words, fate.ravel().astype(float))
        size = np.bincount(words)
        assert np.isin(total, [0]).sum() + (total == size)[total > 0].sum() == len(size)


def test_special_tokens_are_neither_hidden_nor_predicted_nor_drawn(masked):
    tokens, _, rows = masked
    special = np.isin(tokens, SPECIAL)
    assert (rows.labels_NL[special] == IGNORED).all()
    assert (rows.inputs_NL[special] == tokens[special]).all()
    changed = (rows.inputs_NL != tokens) & ~rows.hidden_NL
    assert changed.any() and not np.isin(rows.inputs_NL[changed], SPECIAL).any()


def test_no_scored_mask_position_shows_its_token(masked):
    """Accuracy is counted where `hidden`: there the input must be [MASK] and the label the original token."""
    tokens, _, rows = masked
    assert (rows.inputs_NL[rows.hidden_NL] == MASK).all()
    assert (rows.labels_NL[rows.hidden_NL] == tokens[rows.hidden_NL]).all()
    visible = (rows.labels_NL != IGNORED) & (rows.inputs_NL != MASK)
    assert not (visible & rows.hidden_NL).any()


def test_masks_depend_on_the_sample_number_and_on_nothing_else():
    tokens, starts = random_rows(50, 32)
    whole = masking()(tokens, starts, 1000)
    for first, stop in ((0, 1), (1, 8), (8, 50)):
        part = masking()(tokens[first:stop], starts[first:stop], 1000 + first)
        assert (part.inputs_NL == whole.inputs_NL[first:stop]).all()
        assert (part.labels_NL == whole.labels_NL[first:stop]).all()
    assert (masking()(tokens, starts, 1001).inputs_NL != whole.inputs_NL).any()
    assert (masking(stream="validation masks")(tokens, starts, 1000).inputs_NL != whole.inputs_NL).any()


def test_a_word_does_not_reach_over_a_special_token():
    tokens = np.array([[CLS, 10, 11, SEP, CLS, 12, 13, SEP]])
    starts = np.zeros_like(tokens, dtype=bool)
    fates = {
        tuple(masking()(tokens, starts, sample).labels_NL[0, [1, 2, 5, 6]] != IGNORED)
        for sample in range(500)
    }
    assert fates == {(a, a, b, b) for a in (False, True) for b in (False, True)}


def test_whole_words_without_word_starts_are_refused_with_the_way_out():
    tokens, _ = random_rows(2, 16)
    with pytest.raises(ValueError, match="whole_words=false"):
        masking()(tokens, None, 0)
    single = masking(whole_words=False)(np.full((2000, 16), 9), None, 0)
    assert (single.labels_NL != IGNORED).mean() == pytest.approx(0.15, abs=0.01)


def long_rows(rows=600, length=400):
    """Rows of one document without special tokens inside, so that edges hardly count."""
    random = np.random.default_rng(1)
    tokens = random.integers(5, VOCAB, (rows, length))
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    return tokens, random.random((rows, length)) < 0.5


def test_spans_cover_their_share_of_words_in_stretches_of_geometric_length():
    tokens, starts = long_rows()
    rows = masking(spans=Spans(stop=0.2, longest=10))(tokens, starts, 0)
    predicted = rows.labels_NL != IGNORED
    for part in (predicted[:, 1:6], predicted[:, 30:-30], predicted[:, -6:-1]):
        assert part.mean() == pytest.approx(0.15, abs=0.02 if part.size < 4000 else 0.004)
    words = word_numbers(tokens, starts)
    single = masking()(tokens, starts, 0).labels_NL != IGNORED

    def mean_words_of_a_stretch(mask):
        begins = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        return len(np.unique(words[mask])) / begins.sum()

    # (1 - 0.8^10) / 0.2 = 4.5 words a span, more where two meet; single words meet by chance only.
    assert mean_words_of_a_stretch(predicted) > 4 > 1.5 > mean_words_of_a_stretch(single)
    hidden = (rows.inputs_NL == MASK)[predicted].mean()
    assert hidden == pytest.approx(0.8, abs=0.03)


def test_spans_hide_whole_words_inside_one_document_and_know_no_batch():
    tokens, starts = random_rows(300, 64)
    spans = masking(spans=Spans(), predict_share=0.4)
    rows = spans(tokens, starts, 50)
    words = word_numbers(tokens, starts).ravel()
    total = np.bincount(words, (rows.labels_NL != IGNORED).ravel().astype(float))
    assert ((total == 0) | (total == np.bincount(words))).all()
    special = np.isin(tokens, SPECIAL)
    assert (rows.inputs_NL[special] == tokens[special]).all()
    for first, stop in ((0, 1), (1, 17), (17, 300)):
        part = spans(tokens[first:stop], starts[first:stop], 50 + first)
        assert (part.inputs_NL == rows.inputs_NL[first:stop]).all()
        assert (part.labels_NL == rows.labels_NL[first:stop]).all()


def test_a_span_does_not_reach_over_a_special_token():
    tokens = np.array([[CLS, 10, 11, SEP, CLS, 12, 13, SEP]])
    starts = np.ones_like(tokens, dtype=bool)
    spans = masking(spans=Spans(stop=0.05), predict_share=0.3)
    fates = [spans(tokens, starts, sample).labels_NL[0, [1, 2, 5, 6]] != IGNORED for sample in range(3000)]
    left, right = np.array(fates)[:, 1], np.array(fates)[:, 2]
    assert left.mean() == pytest.approx(0.3, abs=0.03) and abs(np.corrcoef(left, right)[0, 1]) < 0.06
    assert np.corrcoef(np.array(fates)[:, 0], left)[0, 1] > 0.3, "inside of a document spans do reach further"


def test_words_of_a_bert_vocabulary_begin_without_the_continuation_mark():
    words = VocabularyWords.of_pieces(["[PAD]", "play", "##ing", "中", "##", "国"])
    assert words.starts(np.array([[1, 2, 2, 3, 5, 4]])).tolist() == [[True, False, False, True, True, True]]


def test_words_of_a_sentencepiece_vocabulary_begin_at_spaces_and_at_chinese_pieces():
    pieces = ["[PAD]", "▁play", "ing", "中国", "人", "。", "▁", "abc", "12", "の"]
    words = VocabularyWords.of_pieces(pieces)
    row = [1, 2, 3, 4, 5, 7, 2, 6, 7, 8, 9, 2]
    expected = [1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1]
    assert words.starts(np.array([row])).astype(int).tolist() == [expected]

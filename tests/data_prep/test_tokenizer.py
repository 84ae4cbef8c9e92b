"""The tokenizer: reproducible, fixed ids, text unchanged, control symbols out of reach; and word starts."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from data_prep.config import TrainSection
from data_prep.errors import DataPrepError
from data_prep.measure import available_bytes
from data_prep.sample import TrainTask, train_tokenizer
from data_prep.scatter import tokenise
from data_prep.shards import SPECIAL_IDS
from data_prep.tokenizer import Tokenizer, cut_sentences, load_tokenizer, train
from data_prep.words import _dictionary_hash, segmenter_identity, word_start_characters
from tests.data_prep.made import ROOT, make_texts

TEXTS = make_texts(600)


def build(model: str = "unigram", vocab_size: int = 200, **settings) -> bytes:
    section = TrainSection(model=model, vocab_size=vocab_size, character_coverage=0.98, **settings)
    return train(iter(TEXTS), section)[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build())


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_training_is_reproducible_and_special_ids_are_fixed(model):
    first = build(model)
    assert first == build(model)
    processor = Tokenizer(first)._processor
    assert {processor.id_to_piece(i): i for i in range(5)} == SPECIAL_IDS


def test_lengths_add_up_to_the_text(tokenizer):
    texts = [*TEXTS[:50], "稀有字𠀀𠀁和龘", "龘", "a龘b龘c", "  two  spaces ", "tab\tand\nline"]
    ids, lengths, counts = tokenizer.encode(texts)
    assert len(ids) == len(lengths) == counts.sum()
    ends = np.cumsum(counts)
    assert [lengths[e - c : e].sum() for e, c in zip(ends, counts, strict=True)] == [len(t) for t in texts]
    assert (ids[-int(counts[-5:].sum()) :] == SPECIAL_IDS["[UNK]"]).any()


def test_no_text_becomes_a_control_symbol(tokenizer):
    ids, _, _ = tokenizer.encode(["[MASK] [CLS]x[SEP] [PAD]"])
    assert not np.isin(ids, [SPECIAL_IDS[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]).any()


def test_text_is_not_normalised_behind_our_back(tokenizer):
    full_width, _, _ = tokenizer.encode(["ＡＢＣ"])
    ascii_only, _, _ = tokenizer.encode(["ABC"])
    assert full_width.tolist() == [SPECIAL_IDS["[UNK]"]] and len(ascii_only)
    once, twice = (tokenizer.encode([text])[2][0] for text in ("law law", "law  law"))
    assert twice > once


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(DataPrepError, match=r"vocab_size=50000: the sample supports only \d+ pieces"):
        build(vocab_size=50_000)
    with pytest.raises(DataPrepError, match="characters that each need a piece"):
        train(
            iter(map(chr, range(0x4E00, 0x4F00))),
            TrainSection(model="bpe", vocab_size=100, character_coverage=1),
        )
    with pytest.raises(DataPrepError, match="the sample has no text"):
        train(iter([]), TrainSection(vocab_size=100))


def build_otherwise(**options) -> bytes:
    """A model with the right special pieces; `options` change how it treats text."""
    model = io.BytesIO()
    names = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        control_symbols=["[MASK]"],
        **{f"{name}_id": i for name, i in names.items()},
        **{f"{name}_piece": list(SPECIAL_IDS)[i] for name, i in names.items()},
        minloglevel=2,
        **{
            "vocab_size": 200,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        }
        | options,
    )
    return model.getvalue()


def test_pieces_that_do_not_add_up_to_the_text_stop_the_run(tokenizer, monkeypatch):
    texts = [text.encode() for text in TEXTS[:2]]
    place = (np.zeros(2, np.uint64), 3, 4, np.array([6, 7]), tokenizer, "none")
    monkeypatch.setattr(tokenizer, "_byte_lengths", tokenizer._byte_lengths + np.uint16(1))
    tokenise(texts, *place)  # a closer look finds nothing wrong
    monkeypatch.setattr(tokenizer, "_lengths", tokenizer._lengths + 1)
    with pytest.raises(DataPrepError, match=r"the tokenizer changes text: .*file 3, block 4, record [67]"):
        tokenise(texts, *place)


def test_candidates_must_exceed_the_vocabulary():
    with pytest.raises(ValueError, match="seed_pieces: 200 candidates cannot give vocab_size=200"):
        TrainSection(vocab_size=200, seed_pieces=200)
    assert TrainSection(model="bpe", vocab_size=200, seed_pieces=200).seed_pieces == 200
    sizes = {vocab: TrainSection(vocab_size=vocab).seed_size for vocab in (6000, 50_000, 500_000)}
    assert sizes == {6000: 120_000, 50_000: 1_000_000, 500_000: 2_500_000}


def test_foreign_models_are_refused(tmp_path, tokenizer):
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=other,
        vocab_size=200,
        minloglevel=2,
        character_coverage=0.98,
    )
    with pytest.raises(DataPrepError, match="the first pieces must be"):
        Tokenizer(other.getvalue(), "other.model")
    with pytest.raises(DataPrepError, match="not a sentencepiece model"):
        Tokenizer(b"nonsense", "other.model")
    for options, finding in (
        ({"normalization_rule_name": "nfkc"}, "normalisation 'nfkc'"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"user_defined_symbols": ["法律"]}, "user_defined_symbols"),
        ({"byte_fallback": True, "vocab_size": 500}, "byte_fallback"),
    ):
        with pytest.raises(DataPrepError, match=rf"changes text or its characters \({finding}\)"):
            Tokenizer(build_otherwise(**options), "other.model")
    assert Tokenizer(build_otherwise()).vocab_size == 200
    path = tmp_path / "other.model"
    path.write_bytes(build("bpe"))
    with pytest.raises(DataPrepError, match="not the one this run began with"):
        load_tokenizer(str(path), tokenizer.sha256)


def test_long_texts_are_cut_for_training_and_lose_nothing():
    text = ("本法自公布之日起施行。" * 400) + "无标点" * 900
    parts = cut_sentences(text)
    assert "".join(parts) == text and max(len(part.encode()) for part in parts) <= 4192
    assert all(part.endswith("。") for part in parts[:3])
    assert cut_sentences("one\n\ntwo") == ["one", "two"]
    _, statistics = train(iter([text, *TEXTS]), TrainSection(vocab_size=200, character_coverage=0.98))
    assert statistics["cut_texts"] == 1 and statistics["sentences"] == len(parts) + len(TEXTS)


def starts(text: str) -> str:
    """The text with a bar before every word start."""
    return "".join("|" + c if s else c for c, s in zip(text, word_start_characters([text]), strict=True))


def test_word_starts_follow_the_segmenter_and_keep_spaces_with_the_next_word():
    assert starts("中华人民共和国保护合法权益") == "|中华人民共和国|保护|合法权益"
    assert starts("the law, 法律 12") == "|the| law|,| 法律| 12"
    assert starts("a  b") == "|a|  b"


def test_texts_do_not_touch_each_other():
    texts = ["中华人民", "共和国", "x", "\ny", "z\r", "w"]
    alone = np.concatenate([word_start_characters([text]) for text in texts])
    together = word_start_characters(texts)
    assert np.array_equal(alone, together) and len(together) == sum(map(len, texts))
    assert together[[0, 4]].all()


def test_segmenter_identity_names_dictionary():
    identity = segmenter_identity("rjieba")
    assert identity["segmenter"] == "rjieba" and len(identity["probe"]) == 16
    assert identity == segmenter_identity("rjieba")
    assert identity["dictionary"] != _dictionary_hash(lambda word: False)
    assert segmenter_identity("none") == {"segmenter": "none"}


def test_the_dictionary_hash_tells_one_more_word():
    asked: list[str] = []
    _dictionary_hash(lambda word: bool(asked.append(word)))
    one = asked[12345]
    assert len(set(asked)) == 25_600
    assert _dictionary_hash(lambda word: word == one) != _dictionary_hash(lambda word: False)


def test_nothing_is_read_from_a_folder_that_all_may_write(tmp_path):
    code = (
        "import sys, os\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "from data_prep.words import _dictionary_hash, segmenter_identity, word_start_characters\n"
        "segmenter_identity('rjieba'); word_start_characters(['南京市长江大桥'])\n"
        "assert not [name for name in opened if name.startswith(os.environ['TMPDIR'])], opened\n"
        "assert 'marshal' not in ' '.join(opened) and 'jieba.cache' not in ' '.join(opened)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and not list(tmp_path.iterdir()), result.stderr


def test_skipped_sentences_are_those_that_sentencepiece_would_skip(tmp_path):
    """What its log says of the same sentences: it leaves out what holds its own sign for the unknown."""
    texts = make_texts(400)
    texts[::40] = [f"{text}▅" for text in texts[::40]]
    section = TrainSection(vocab_size=300, model="bpe", sample_bytes=1)
    _, statistics = train(iter(texts), section)
    assert statistics == {"sentences": 400, "cut_texts": 0, "skipped_sentences": 10}
    code = (
        "import sentencepiece, sys, io; from tests.data_prep.made import make_texts\n"
        "texts = make_texts(400); texts[::40] = [f'{text}▅' for text in texts[::40]]\n"
        "sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=io.BytesIO(),"
        " vocab_size=300, model_type='bpe')"
    )
    log = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr
    assert log.count("Reserved chars are found. Skipped") == 10 and "Loaded all 390 sentences" in log


def test_training_is_refused_where_memory_does_not_suffice(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sample.available_bytes", lambda: 100_000)
    monkeypatch.setattr(
        "data_prep.sample.zstandard.open",
        lambda *_, **__: io.StringIO('[1, 0, 0, 0, "text to train"]\n' * 999),
    )
    with pytest.raises(
        DataPrepError, match="training on 12,987 bytes takes about 337,662 bytes of memory, and 100,000"
    ):
        train_tokenizer(TrainTask(str(tmp_path), 1, TrainSection(), str(tmp_path)))
    assert available_bytes() > 50_000_000

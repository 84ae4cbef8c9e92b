"""Tokenizers that others made: sentencepiece models taken over, and BERT vocabularies."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep.adopt import adopt
from data_prep.errors import DataPrepError
from data_prep.scatter import tokenise
from data_prep.shards import SPECIAL_IDS, SplitReader
from data_prep.tokenizer import Tokenizer
from data_prep.wordpiece import WordPieceTokenizer
from tests.data_prep.made import command_line, make_texts, prepare, settings

CHARACTERS = "人法权国规应机责合财民律利家定当关任同产。，0123456789"
PIECES = [
    "[PAD]",
    "[unused1]",
    "protect",
    "pro",
    "con",
    "##tect",
    "##tract",
    "##s",
    *CHARACTERS,
    "the",
    "cafe",
]
VOCABULARY = [*PIECES, "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!"]


def foreign_model(kind: str = "unigram", **changes) -> bytes:
    """A model as sentencepiece makes it by default: NFKC, dummy prefix, its own special ids, byte pieces."""
    model = io.BytesIO()
    options = {"vocab_size": 500, "byte_fallback": True, "user_defined_symbols": ["<sep>"]} | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(800)), model_writer=model, model_type=kind, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def foreign() -> bytes:
    return foreign_model()


def test_a_foreign_model_keeps_its_pieces_and_loses_its_ways(foreign):
    model, notes = adopt(foreign, "foreign")
    tokenizer = Tokenizer(model)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=foreign)
    processor = tokenizer._processor
    assert {processor.id_to_piece(i): i for i in range(5)} == SPECIAL_IDS
    regular = [theirs.id_to_piece(i) for i in range(theirs.get_piece_size()) if not theirs.is_control(i)]
    regular = [p for p in regular if not (p.startswith("<0x") or p in ("<unk>", "<sep>"))]
    assert [processor.id_to_piece(i) for i in range(5, tokenizer.vocab_size)] == regular
    for text in make_texts(50, seed=4):
        assert processor.encode(f" {text}", out_type=str) == theirs.encode(text, out_type=str)  # their prefix
    ids, lengths, counts = tokenizer.encode(["法律，ＡＢ\U0001f600"])
    assert lengths.sum() == 6 and (ids == SPECIAL_IDS["[UNK]"]).any() and counts.tolist() == [len(ids)]
    assert "<sep>" in notes["pieces_left_out"] and "byte_fallback" in notes["settings_left_out"]
    assert adopt(foreign, "foreign")[0] == model


@pytest.mark.parametrize("kind", ["word", "char"])
def test_models_that_cannot_be_taken_over_are_told(kind):
    options = {"byte_fallback": False, "user_defined_symbols": [], "vocab_size": 60}
    with pytest.raises(DataPrepError, match="only unigram and BPE"):
        adopt(foreign_model(kind, **options), "theirs.model")
    with pytest.raises(DataPrepError, match="not a sentencepiece model"):
        adopt(b"something else", "theirs.model")


def test_a_run_with_a_model_taken_over(foreign, tmp_path):
    (tmp_path / "theirs.model").write_bytes(foreign)
    (tmp_path / "a.txt").write_text("\n".join(make_texts(300)))
    tree = settings(
        tmp_path / "out", [tmp_path / "a.txt"], tokenizer={"load": str(tmp_path / "theirs.model")}
    )
    refused = command_line(tree, tmp_path, "run")
    assert refused.returncode == 2 and "tokenizer.adopt=true" in refused.stderr
    tree["tokenizer"]["adopt"] = True
    manifest = prepare(tree)
    described = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text())
    assert described["sha256"] == manifest.tokenizer["sha256"] and "<sep>" in described["pieces_left_out"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def test_every_id_of_a_vocabulary_stands_for_characters_of_the_text(vocabulary):
    tokenizer = WordPieceTokenizer(vocabulary.read_bytes())
    texts = ["Protects the CAFÉ, 人民法律 123!", "\u0301", "[MASK] [PAD]", "法"]
    ids, lengths, counts = tokenizer.encode(texts)
    pieces = [VOCABULARY[i] for i in ids.tolist()]
    assert pieces[:4] == ["protect", "##s", "the", "cafe"] and pieces[5:9] == list("人民法律")
    stops = np.cumsum(counts)
    assert [lengths[a:b].sum() for a, b in zip(stops - counts, stops, strict=True)] == list(map(len, texts))
    begins = (np.cumsum(lengths) - lengths)[: counts[0]]
    assert [texts[0][a:].lstrip()[:3].lower() for a in begins[:3].tolist()] == ["pro", "s t", "the"]
    assert not {VOCABULARY.index(p) for p in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")} & set(ids.tolist())


def test_word_starts_of_a_vocabulary_are_those_of_the_segmenter(vocabulary):
    tokenizer = WordPieceTokenizer(vocabulary.read_bytes())
    texts = ["protects the 法律权利", "con protect"]
    found = tokenise(
        [text.encode() for text in texts],
        np.arange(2, dtype=np.uint64),
        0,
        0,
        np.arange(2),
        tokenizer,
        "rjieba",
    )
    shown = [
        ("|" if w else "") + VOCABULARY[t] for t, w in zip(found.tokens.tolist(), found.words, strict=True)
    ]
    assert "".join(shown) == "|[CLS]|protect##s|the|法律|权利|[SEP]|[CLS]|con|protect|[SEP]"


def test_a_run_with_a_vocabulary(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(300)))
    tree = settings(tmp_path / "out", [tmp_path / "a.txt"], tokenizer={"load": str(vocabulary)})
    manifest = prepare(tree)
    assert manifest.special_ids["[MASK]"] == VOCABULARY.index("[MASK]") and manifest.vocab_size == len(
        VOCABULARY
    )
    assert manifest.tokenizer["file"] == "tokenizer/vocab.txt"
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    batch = SplitReader(tmp_path / "out", "train").rows(0, 4)
    assert batch.tokens_NL[0, 0] == VOCABULARY.index("[CLS]") and batch.word_start_NL is not None
    verified = command_line(tree, tmp_path, "verify")
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (VOCABULARY[1:], "[PAD] missing"),
        ([line for line in VOCABULARY if line != "[MASK]"], "[MASK] missing"),
        (["first", *VOCABULARY], "not first"),
        ([*VOCABULARY, "the"], "twice"),
    ],
)
def test_other_lists_of_words_are_refused(lines, reason):
    with pytest.raises(DataPrepError) as error:
        WordPieceTokenizer("\n".join(lines).encode(), "mine.txt")
    assert "mine.txt: not a BERT vocabulary" in str(error.value) and reason in str(error.value)
    with pytest.raises(DataPrepError, match="not UTF-8"):
        WordPieceTokenizer(b"\xff\n")

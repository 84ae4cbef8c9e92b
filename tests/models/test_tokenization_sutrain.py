import pickle

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

import sutrain.huggingface  # noqa: F401
from data_prep.clean import make_cleaner
from data_prep.config import CleaningSection
from sutrain.models.tokenization_sutrain import SutrainTokenizer, refuse_older
from tests.models.tiny import sentences, write_tokenizer

TEXTS = [
    *sentences(20, seed=1),
    "北京 today: 今天天气very good。",
    "unseen 龘 letters ÅÄÖ 🙂 and digits 42",
    "  ragged\u3000white\tspace\r\n and\u200b marks\u00ad \ufeff\x07",
    "Cafe\u0301 \u212b",  # decomposed, and the sign that normalises to a letter
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return SutrainTokenizer(str(folder / "tokenizer.model"), model_max_length=32)


@pytest.mark.parametrize("settings", [{}, {"unicode": "nfkc", "strip_control": False}, {"unicode": "none"}])
def test_cleaning_is_that_of_data_preparation(folder, settings):
    theirs = make_cleaner(CleaningSection(**settings))
    ours = SutrainTokenizer(str(folder / "tokenizer.model"), **settings)
    for text in TEXTS:
        assert ours.clean(text) == theirs(text)[0]


def test_ids_are_those_of_sentencepiece_between_cls_and_sep(folder, tokenizer):
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    clean = make_cleaner(CleaningSection())
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [2, *pieces.encode(clean(text)[0]), 3]


def test_words_given_apart_keep_the_space_before_them(tokenizer):
    """The same ids as of the text, so that labels of words meet what the model was trained on."""
    for text in ("we walk in the park", "[MASK] we walk"):
        words = [word if number == 0 else f" {word}" for number, word in enumerate(text.split())]
        whole = tokenizer(text)["input_ids"]
        assert tokenizer(words, is_split_into_words=True)["input_ids"] == whole
        assert tokenizer([words, words], is_split_into_words=True)["input_ids"] == [whole, whole]
    joined = tokenizer(["one", "two"], is_split_into_words=True)["input_ids"]
    assert joined[1:-1] == tokenizer("one")["input_ids"][1:-1] + tokenizer("two")["input_ids"][1:-1]


def test_an_older_library_is_refused():
    with pytest.raises(ImportError, match=r"4\.57\.6, expected 5\.23"):
        refuse_older("4.57.6")
    refuse_older("5.23.1")


def test_special_ids(tokenizer):
    names = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    assert [getattr(tokenizer, name) for name in names] == [0, 1, 2, 3, 4]
    assert len(tokenizer) == tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("text", "masked", "hidden"),
    [
        ("we walk in the park", "we walk [MASK] the park", " in"),
        ("今天天气很好", "今天[MASK]很好", "天气"),
        ("the park, today", "the [MASK], today", " park"),
    ],
)
def test_a_mask_stands_where_a_hidden_word_stood(tokenizer, text, masked, hidden):
    """Training replaces the tokens of a word, its space included; all around them must come out the same."""
    before, after = text.split(hidden)
    pieces = tokenizer.pieces
    around = [2, *pieces.encode(before), 4, *pieces.encode(after), 3]
    assert tokenizer(masked)["input_ids"] == around
    assert tokenizer.pieces.encode("[MASK]") != [4]  # plain text cannot spell it


def test_text_comes_back(tokenizer):
    clean = make_cleaner(CleaningSection())
    for text in sentences(20, seed=2):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == clean(text)[0]
    assert tokenizer.decode(tokenizer("the [MASK] is good")["input_ids"]) == "[CLS] the [MASK] is good [SEP]"


def test_padding_truncation_and_pairs(tokenizer):
    batch = tokenizer(["the park", "the weather is very good today"], padding=True)
    lengths = [sum(row) for row in batch["attention_mask"]]
    assert lengths[0] < lengths[1] == len(batch["input_ids"][0])
    assert set(batch["input_ids"][0][lengths[0] :]) == {0}

    cut = tokenizer("today " * 100, truncation=True)["input_ids"]
    assert len(cut) == 32 and cut[0] == 2 and cut[-1] == 3

    pair = tokenizer("the park", "今天天气")
    assert pair["input_ids"].count(3) == 2 and pair["input_ids"].count(2) == 1
    assert set(pair["token_type_ids"]) == {0}


def test_saving_keeps_ids_and_cleaning(folder, tmp_path):
    first = SutrainTokenizer(str(folder / "tokenizer.model"), unicode="nfkc", model_max_length=77)
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, SutrainTokenizer)
    assert (again.unicode, again.model_max_length) == ("nfkc", 77)
    masked = [*TEXTS, "we [MASK] today", "今天[MASK]很好"]
    assert again(masked)["input_ids"] == first(masked)["input_ids"]
    assert pickle.loads(pickle.dumps(again))(masked)["input_ids"] == first(masked)["input_ids"]


def test_added_tokens_get_new_ids(folder):
    tokenizer = SutrainTokenizer(str(folder / "tokenizer.model"))
    assert tokenizer.add_tokens(["<entity>"]) == 1
    assert tokenizer.convert_tokens_to_ids("<entity>") == 300
    assert 300 in tokenizer("the <entity> park")["input_ids"]
    assert tokenizer.decode([300]) == "<entity>"


def test_rows_of_a_model_beyond_the_pieces_are_unknown_tokens(tokenizer):
    """As resize_token_embeddings(pad_to_multiple_of=64) makes them; a fill-mask pipeline decodes what it proposes."""
    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens([299, 300, 319]) == [
        tokenizer.convert_ids_to_tokens(299),
        "[UNK]",
        "[UNK]",
    ]
    assert tokenizer.decode([319], skip_special_tokens=True) == tokenizer.decode([1])


def test_offsets_are_refused_instead_of_left_out(tokenizer):
    with pytest.raises(NotImplementedError, match="return_offsets_mapping: found True"):
        tokenizer("we walk", return_offsets_mapping=True)


def test_another_kind_of_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="unicode: found 'nfd'"):
        SutrainTokenizer(str(folder / "tokenizer.model"), unicode="nfd")
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)),
        model_prefix=str(tmp_path / "other"),
        vocab_size=120,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="found first pieces"):
        SutrainTokenizer(str(tmp_path / "other.model"))

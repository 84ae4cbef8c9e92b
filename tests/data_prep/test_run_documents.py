"""What the whole pipeline writes: every document once, shuffled by chance, copies on one side."""

from __future__ import annotations

from collections import Counter

import numpy as np

from data_prep.shards import SplitReader
from data_prep.tokenizer import Tokenizer
from tests.data_prep.made import (
    documents_of,
    make_texts,
    prepare,
    settings,
    write_jsonl,
)


def test_every_document_is_there_once_and_decodes_to_its_text(prepared):
    texts = make_texts(3000)
    tokenizer = Tokenizer((prepared / "tokenizer" / "tokenizer.model").read_bytes())
    documents = documents_of(prepared, "train") + documents_of(prepared, "validation")
    names = [file["path"] for file in SplitReader(prepared, "train").manifest.files]
    bases = {"a.jsonl": 0, "sub/b.jsonl": 1200, "c.jsonl.gz": 2200}
    numbers = [bases[names[file]] + record for (file, _, record), _ in documents]
    assert sorted(numbers) == list(range(3000))
    for number, (_, ids) in list(zip(numbers, documents, strict=True))[::50]:
        assert ids[0] == 2 and ids[-1] == 3
        assert tokenizer._processor.decode(ids[1:-1]) == texts[number]


def test_neighbours_come_from_the_files_as_chance_would_have_it(prepared):
    """The share of neighbours from one file is that of independent draws, within four standard deviations."""
    files = np.array([file for (file, _, _), _ in documents_of(prepared, "train")])
    shares = np.bincount(files) / len(files)
    expected = float((shares**2).sum())
    found = float((files[1:] == files[:-1]).mean())
    assert abs(found - expected) < 4 * (expected * (1 - expected) / len(files)) ** 0.5
    thirds = np.array_split(files, 3)
    counts = np.array([np.bincount(third, minlength=3) for third in thirds])
    chances = np.outer([len(third) for third in thirds], shares)
    assert ((counts - chances) ** 2 / chances).sum() < 18.5  # chi-square, 4 degrees of freedom, 99.9 %


def test_another_seed_gives_another_order(corpus, prepared, tmp_path):
    prepare(settings(tmp_path / "out", [corpus], seed=6))
    ours, others = (documents_of(folder, "train")[:100] for folder in (prepared, tmp_path / "out"))
    assert [origin for origin, _ in ours] != [origin for origin, _ in others]


def test_copies_of_a_text_are_on_one_side(tmp_path):
    texts = make_texts(400)
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", texts if number else texts[::-1])
    prepare(
        settings(tmp_path / "out", [tmp_path / "*.jsonl"], shards={"validation_share": 0.3, "row_tokens": 64})
    )
    sides = [
        Counter(tuple(ids) for _, ids in documents_of(tmp_path / "out", split))
        for split in ("train", "validation")
    ]
    assert not sides[0].keys() & sides[1].keys()
    assert set(sides[0].values()) == set(sides[1].values()) == {3}
    assert 0.2 < len(sides[1]) / 400 < 0.4


def test_a_tokenizer_can_be_loaded_and_words_left_out(prepared, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n".join(make_texts(200)))
    model = prepared / "tokenizer" / "tokenizer.model"
    manifest = prepare(
        settings(tmp_path / "out", [source], tokenizer={"load": str(model)}, words={"segmenter": "none"})
    )
    assert manifest.tokenizer["sha256"] == SplitReader(prepared, "train").manifest.tokenizer["sha256"]
    assert SplitReader(tmp_path / "out", "train").rows(0, 3).word_start_NL is None

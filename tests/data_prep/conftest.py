"""A small corpus and the output of the pipeline over it, shared by the tests."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.data_prep.made import make_texts, prepare, settings, write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with two jsonl files and one gz, 3,000 texts in all."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(3000)
    write_jsonl(folder / "a.jsonl", texts[:1200])
    write_jsonl(folder / "sub" / "b.jsonl", texts[1200:2200])
    plain = write_jsonl(folder / "c.jsonl", texts[2200:])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """The output of the pipeline over `corpus`; tests that change it copy it first."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(settings(output, [corpus], resources={"task_bytes": 1}))
    return output

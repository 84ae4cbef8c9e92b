"""Parquet: memory is bounded whatever the rows are like, and only what does not decode is damage."""

from __future__ import annotations

import errno
import io
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import inputs, parquet, sources
from data_prep.config import CorpusSection, PrepareConfig
from data_prep.errors import DataPrepError
from data_prep.inputs import list_corpus
from data_prep.plan import Plan
from data_prep.plan_report import _pages
from data_prep.sources import InputFile, read_batches
from tests.data_prep.made import settings
from tests.data_prep.test_sources import read_all
from tests.data_prep.test_splitting import by_blocks, listed, parquet_file, whole

_LIMIT = 2**24


def long_texts(alike: bool) -> list[str]:
    """Some hundred of 300 kB, after many short ones: the mean of the group is far below them."""
    draw = random.Random(0)
    words = "".join(draw.choices("abcdefgh", k=400_000))
    begins = [0] * 150 if alike else [draw.randrange(100_000) for _ in range(150)]
    return [words[i : i + 40] for i in range(3000)] + [words[i : i + 300_000] for i in begins]


@pytest.mark.parametrize("alike", [True, False], ids=["in a dictionary", "plain"])
def test_long_rows_are_read_a_few_at_a_time(tmp_path, alike):
    texts = long_texts(alike)
    # Arrow unpacks a page as a whole, so pages are made of few rows, as other writers make them.
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", write_batch_size=8)
    file, before = listed(tmp_path / "a.parquet"), pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        batches = list(read_batches(file, 0, None, _LIMIT))
    finally:
        pa.set_memory_pool(before)
    assert [line.decode() for batch in batches for line in batch.lines if isinstance(line, bytes)] == texts
    assert max(sum(map(len, batch.lines)) for batch in batches) < parquet._BATCH_BYTES + 300_000
    assert 0 < pool.max_memory() < 32 * 1024**2


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_portions_do_not_show_in_the_records(tmp_path, monkeypatch, rows):
    texts = [*("x" * (i * 37 % 500) for i in range(200)), None]
    parquet_file(tmp_path / "a.parquet", texts, rows=90)
    file = listed(tmp_path / "a.parquet")
    expected = whole(file, 400)
    for name, value in (("_DECODED_ROWS", rows), ("_BATCH_ROWS", 5 * rows), ("_BATCH_BYTES", 300)):
        monkeypatch.setattr(parquet, name, value)
    assert whole(file, 400) == by_blocks(file, 400) == expected
    assert {line for *_, line in expected if isinstance(line, str)} == {
        "record_too_large",
        "field_is_not_text",
    }


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.large_binary()])
def test_columns_of_every_kind_of_text_are_taken(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["one", None, "法" * 50]).cast(kind)}), tmp_path / "a.parquet")
    found = [line for *_, line in whole(listed(tmp_path / "a.parquet"), 100)]
    assert found == [b"one", "field_is_not_text", "record_too_large"]


def test_a_row_group_that_cannot_be_text_is_not_unpacked(tmp_path):
    """70 MB of one letter in some kilobytes, which Arrow would unpack as a whole, between two groups of text."""
    path, schema = tmp_path / "a.parquet", pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for texts in (["one", "two"], ["a" * 1_000_000] * 70, ["three"]):
            writer.write_table(pa.table({"text": texts}, schema))
    assert path.stat().st_size < 100_000
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        found = whole(listed(path), _LIMIT)
    finally:
        pa.set_memory_pool(before)
    assert found == [
        (0, 0, 0, b"one"),
        (0, 1, 1, b"two"),
        (1, 0, 2, "decompression_bomb"),
        (2, 0, 72, b"three"),
    ]
    assert pool.max_memory() < 8 * 1024**2


class FailingStorage(io.FileIO):
    """A file whose reads fail from some byte on, as those of a share or a bucket do for a while."""

    fails_from = 0

    def read(self, size: int | None = -1) -> Any:
        if self.tell() >= self.fails_from:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def failing(monkeypatch, module, fails_from: int) -> None:
    monkeypatch.setattr(FailingStorage, "fails_from", fails_from)
    monkeypatch.setattr(module, "open_to_read", lambda path: FailingStorage(path))


def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch):
    texts = [f"{i} " * 500 for i in range(400)]
    parquet_file(tmp_path / "a.parquet", texts, rows=100)
    file = listed(tmp_path / "a.parquet")
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    for begin in (0, metadata.row_group(2).column(1).dictionary_page_offset):
        with monkeypatch.context() as patch:
            failing(patch, sources, begin)
            found = []
            with pytest.raises(DataPrepError, match=r"a\.parquet: cannot be read \(.*Input/output error"):
                for batch in read_batches(file, 0, None, _LIMIT):
                    found += batch.lines
            assert "damaged_parquet" not in found
    with monkeypatch.context() as patch:
        failing(patch, inputs, 0)
        _, _, problems = list_corpus(0, CorpusSection(name="x", paths=[str(tmp_path / "a.parquet")]))
        assert len(problems) == 1 and "a.parquet: cannot be read (" in problems[0]
    assert len(read_all(file, limit=_LIMIT)[0]) == 400


@pytest.mark.parametrize("times", [2, 9])
def test_a_storage_that_does_not_tell_is_asked_again_and_never_taken_for_a_change(
    tmp_path, monkeypatch, times
):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    file, original, calls = listed(tmp_path / "a.txt"), sources.stamp_of, []

    def sometimes(path: str, handle: Any = None) -> tuple[int, str]:
        calls.append(path)
        if len(calls) <= times:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
        return original(path, handle)

    monkeypatch.setattr(sources, "stamp_of", sometimes)
    monkeypatch.setattr(sources, "_PAUSES_SECONDS", (0, 0, 0))
    if times == 2:
        assert [line for *_, line in read_all(file)[0]] == [b"one", b"two"]
    else:
        with pytest.raises(DataPrepError, match=r"a\.txt: cannot be read \(Connection timed out\)"):
            read_all(file)


def test_a_file_that_is_gone_has_changed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n")
    file = listed(tmp_path / "a.txt")

    def gone(path: str, handle: Any = None) -> tuple[int, str]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(sources, "stamp_of", gone)
    assert read_all(file)[1] == (0, 0, 0, "file_changed")


@pytest.mark.parametrize(("rows", "told"), [(1024, True), (8, False)])
def test_plan_names_a_file_whose_pages_may_be_large(tmp_path, rows, told):
    """300 kB a row: 307 MB where the writer put 1,024 of them into a page."""
    tree = settings(tmp_path / "out", [tmp_path / "a.parquet"])
    files = [
        InputFile(
            0, f"{n}.parquet", f"{n}.parquet", 10**6, "", "parquet", "text", "", groups=(r,), text_bytes=r * b
        )
        for n, r, b in ((0, 10**6, 1000), (1, rows, 300_000))
    ]
    found = _pages(Plan(PrepareConfig.model_validate(tree), files, [], []))
    assert bool(found) == told
    if told:
        assert found[0][1].startswith("307.2 MB unpacked") and "1,024 rows of 1.parquet" in found[0][1]

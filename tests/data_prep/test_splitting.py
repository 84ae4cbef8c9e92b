"""Files that several tasks read: every record once, by whatever blocks it is asked for, damage included."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import decompress, inputs, sources
from data_prep.config import CorpusSection
from data_prep.inputs import list_corpus
from data_prep.parquet import read_footer
from data_prep.sources import InputFile
from tests.data_prep.test_sources import planned, read_all

BLOCK = 100


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (sources, inputs):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 37)
    monkeypatch.setattr(decompress, "CHUNK_BYTES", 41)
    monkeypatch.setattr(inputs, "_SPLIT_BYTES", 1)


def listed(path: Path, **settings) -> InputFile:
    files, _, problems = list_corpus(0, CorpusSection(name="x", paths=[str(path)], **settings))
    assert problems == []
    return files[0]


def by_blocks(file: InputFile, limit: int = 10_000) -> list:
    found = []
    for block in range(file.blocks or 0):
        records, damage = read_all(file, block, block + 1, limit)
        found += [*records, damage] if damage else records
    return sorted(found, key=lambda record: record[2])


def whole(file: InputFile, limit: int = 10_000) -> list:
    records, damage = read_all(file, 0, None, limit)
    return sorted([*records, damage] if damage else records, key=lambda record: record[2])


def paragraphs_and_file(seed: int) -> tuple[list[bytes], bytes]:
    draw = random.Random(seed)
    end = draw.choice([b"\n", b"\r\n"])
    records = []
    for _ in range(draw.randint(0, 40)):
        lines = [b"x" * draw.randint(1, 60) for _ in range(draw.randint(1, 4))]
        records.append(end.join(lines))
    data = end * draw.randint(0, 4)
    for record in records:
        data += record + end * draw.randint(2, 5)
    return records, data[: len(data) - draw.randint(0, 2) * len(end)] if records else data


@pytest.mark.parametrize("seed", range(40))
def test_paragraphs_are_the_same_from_any_block(tmp_path, small_blocks, seed):
    records, data = paragraphs_and_file(seed)
    path = tmp_path / "a.txt"
    path.write_bytes(data or b"\n")
    file = listed(path, records="paragraph")
    found = whole(file)
    assert [line for *_, line in found] == records
    assert all(data[offset : offset + len(line)] == line for _, _, offset, line in found)
    assert by_blocks(file) == found


def test_a_giant_paragraph_is_lost_alone(tmp_path, small_blocks):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n" + b"line of text\n" * 500 + b"\n\ntwo\nlines\n\n" + b"L" * 900)
    file = listed(path, records="paragraph")
    found = [(offset, line) for _, _, offset, line in whole(file, 50)]
    assert found == [
        (0, b"one"),
        (5, "record_too_large"),
        (6507, b"two\nlines"),
        (6518, "record_too_large"),
    ]
    assert by_blocks(file, 50) == whole(file, 50)


LINES = [b"%03d " % i + bytes(random.Random(i).choices(range(97, 123), k=7 * i % 90)) for i in range(60)]


def frames_file(path: Path, cuts: list[int], sizes: bool = True) -> list[int]:
    """A zst file of one frame between any two cuts, with their sizes in the headers; the frames' offsets."""
    data = b"\n".join(LINES) + b"\n"
    compressor = zstandard.ZstdCompressor(write_content_size=sizes)
    frames = [compressor.compress(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    path.write_bytes(b"".join(frames))
    offsets = [0]
    for frame in frames:
        offsets.append(offsets[-1] + len(frame))
    return offsets


@pytest.mark.parametrize("seed", range(10))
def test_frames_of_zst_are_split_and_hold_each_record_once(tmp_path, small_blocks, seed):
    draw = random.Random(seed)
    size = sum(map(len, LINES)) + len(LINES)
    path = tmp_path / "a.txt.zst"
    frames_file(path, sorted(draw.sample(range(1, size), draw.choice([1, 5, 30]))))
    file = listed(path)
    assert file.blocks == -(-size // BLOCK) and file.text_bytes == size
    assert [line for *_, line in whole(file)] == LINES
    assert by_blocks(file) == whole(file)
    assert (
        sum(file.disk_bytes(b, b + 1) for b in range(file.blocks)) < 1.5 * file.size_bytes + 40 * file.blocks
    )


def test_a_zst_file_without_sizes_or_with_one_frame_is_read_whole(tmp_path, small_blocks):
    frames_file(tmp_path / "a.txt.zst", [500, 900], sizes=False)
    frames_file(tmp_path / "b.txt.zst", [])
    for name in ("a.txt.zst", "b.txt.zst"):
        file = listed(tmp_path / name)
        assert file.blocks is None and [line for *_, line in whole(file)] == LINES


def test_a_seek_table_tells_the_frames(tmp_path, small_blocks):
    cuts = [400, 800, 1300]
    offsets = frames_file(tmp_path / "a.txt.zst", cuts, sizes=False)
    size = sum(map(len, LINES)) + len(LINES)
    texts = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    packed = [b - a for a, b in pairwise(offsets)]
    table = b"".join(
        p.to_bytes(4, "little") + t.to_bytes(4, "little") for p, t in zip(packed, texts, strict=True)
    )
    footer = len(texts).to_bytes(4, "little") + b"\0" + (0x8F92EAB1).to_bytes(4, "little")
    header = (0x184D2A5E).to_bytes(4, "little") + (len(table) + 9).to_bytes(4, "little")
    with (tmp_path / "a.txt.zst").open("ab") as stream:
        stream.write(header + table + footer)
    file = listed(tmp_path / "a.txt.zst")
    assert file.blocks == -(-size // BLOCK)
    assert [line for *_, line in whole(file)] == LINES and by_blocks(file) == whole(file)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_damaged_frame_costs_no_other_frame(tmp_path, small_blocks, suffix):
    path = tmp_path / f"a.{suffix}.zst"
    cuts = [700, 1400, 1800]
    offsets = frames_file(path, cuts)
    data = bytearray(path.read_bytes())
    data[offsets[1] + 30 : offsets[1] + 60] = b"\xff" * 30
    path.write_bytes(data)
    file = listed(path)
    found = whole(file)
    assert by_blocks(file) == found
    lines = [line for *_, line in found if isinstance(line, bytes)]
    reasons = [line for *_, line in found if isinstance(line, str)]
    assert reasons == (
        ["damaged_compression", "beside_damage"] if suffix == "txt" else ["damaged_compression"]
    )
    text = b"\n".join(LINES)
    before, after = text[:700].count(b"\n"), text[1400:].count(b"\n")
    assert lines[:before] == LINES[:before] and lines[-after:] == LINES[-after:]


@pytest.mark.parametrize("read_bytes", [64, 250, 400, 700, 1000])
def test_as_much_of_a_damaged_frame_is_read_from_any_block(tmp_path, small_blocks, monkeypatch, read_bytes):
    """A frame of many blocks, damaged in its middle: what comes before the damage does not depend on the reader."""
    monkeypatch.setattr(decompress, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(
        decompress, "CHUNK_BYTES", 10_000
    )  # one call decodes several blocks, and all are lost with it
    data = b"".join(b"%04d %s\n" % (i, random.Random(i).randbytes(12).hex().encode()) for i in range(200))
    packed, flushed = b"", [0]
    for begin, stop in ((0, 1490), (1490, 4500), (4500, len(data))):
        maker = zstandard.ZstdCompressor().compressobj(size=stop - begin)
        for at in range(begin, stop, 170):
            packed += maker.compress(data[at : min(stop, at + 170)]) + maker.flush(
                zstandard.COMPRESSOBJ_FLUSH_BLOCK
            )
            flushed.append(len(packed))
        packed += maker.flush()
    broken = bytearray(packed)
    first, last = flushed[18] + 3, flushed[19]  # a block of the second frame, without its header
    broken[first:last] = b"\xff" * (last - first)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(broken)
    file = listed(path)
    found = whole(file)
    lines = [line for *_, line in found if isinstance(line, bytes)]
    assert (
        by_blocks(file) == found
        and lines[:49] == data.splitlines()[:49]
        and lines[-50:] == data.splitlines()[-50:]
    )
    assert len(lines) < 190


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_decompression_bomb_is_refused_in_little_memory(tmp_path, suffix):
    import bz2
    import gzip
    import lzma

    zeros = b"\0" * (80 * 1024**2)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[
        suffix
    ]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(zeros) if suffix != ".xz" else lzma.compress(zeros, preset=0))
    del zeros
    tracemalloc.start()
    found, damage = read_all(planned(path), limit=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [] and damage is not None and damage[3] == "decompression_bomb"
    assert peak < 16 * 1024**2


def parquet_file(path: Path, texts: list, rows: int = 16) -> None:
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, path, row_group_size=rows, compression="snappy")


def test_a_row_group_of_parquet_is_a_block(tmp_path):
    texts = [f"text {i} 法律" for i in range(50)]
    parquet_file(tmp_path / "a.parquet", texts)
    file = listed(tmp_path / "a.parquet")
    assert file.blocks == 4 and file.groups == (16, 16, 16, 2)
    assert [(block, number) for block, number, *_ in whole(file)] == [(i // 16, i % 16) for i in range(50)]
    assert [line.decode() for *_, line in whole(file)] == texts
    assert by_blocks(file) == whole(file) and [offset for _, _, offset, _ in whole(file)] == list(range(50))


def test_bad_rows_of_parquet_have_their_reasons(tmp_path):
    bad = pa.array([b"one", b"\xff\xfe", None, b"x" * 99, b"five\0"], pa.binary())
    pq.write_table(
        pa.table({"text": pa.StringArray.from_buffers(5, *bad.buffers()[1:], bad.buffers()[0])}),
        tmp_path / "a.parquet",
    )
    file = listed(tmp_path / "a.parquet")
    parsed = [sources.parse(file, line) for *_, line in whole(file, 50)]
    assert parsed == [
        ("one", ""),
        (None, "invalid_utf8"),
        (None, "field_is_not_text"),
        (None, "record_too_large"),
        ("five\0", ""),
    ]


def test_damaged_and_wrong_parquet_files_are_told(tmp_path):
    draw = random.Random(0)
    parquet_file(tmp_path / "a.parquet", ["".join(draw.choices("abcdefgh", k=300)) for _ in range(64)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    begin = group.dictionary_page_offset or group.data_page_offset
    data[begin : begin + 100] = b"\xff" * 100
    (tmp_path / "bad.parquet").write_bytes(data)
    found = whole(listed(tmp_path / "bad.parquet"))
    assert [line for *_, line in found if isinstance(line, str)] == ["damaged_parquet"]
    assert [(block, n) for block, n, _, line in found if isinstance(line, bytes)] == [
        (block, n) for block in (0, 2, 3) for n in range(16)
    ]
    assert whole(listed(tmp_path / "cut.parquet")) == [(0, 0, 0, "damaged_parquet")]
    _, _, problems = list_corpus(
        0, CorpusSection(name="x", paths=[str(tmp_path / "a.parquet")], text_field="body")
    )
    assert "no column 'body'; there are id, text; set text_field" in problems[0]
    with (tmp_path / "a.parquet").open("rb") as handle:
        assert "is int64, not text" in str(read_footer(handle, "id"))
    twice = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with (tmp_path / "twice.parquet").open("rb") as handle:
        assert read_footer(handle, "text") == "2 columns are called 'text'; rename all but one"


def test_planning_does_not_read_a_file_of_one_frame(tmp_path):
    """Of every 128 KiB the header of a block; bytes as the kernel fetched them from the disk."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(random.Random(0).randbytes(12 * 1024**2)))

    def fetched() -> int:
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])

    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = fetched()
    file = listed(path)
    assert file.blocks is None and file.text_bytes == 12 * 1024**2
    assert fetched() - before < path.stat().st_size // 4


def test_a_block_of_a_large_file_is_read_without_the_rest(tmp_path, small_blocks, monkeypatch):
    frames_file(tmp_path / "a.txt.zst", list(range(100, 2400, 100)))
    file = listed(tmp_path / "a.txt.zst")
    made = []
    original = decompress.decompressed

    def counted(*arguments):
        for chunk in original(*arguments):
            made.append(len(chunk))
            yield chunk

    monkeypatch.setattr(sources, "decompressed", counted)
    assert read_all(file, 20, 21)[0] == [record for record in whole(file) if record[0] == 20]
    made.clear()
    read_all(file, 20, 21)
    assert sum(made) < 500
    assert replace(file, frames=()).blocks is None

"""Reading: every record exactly once, whatever the blocks, chunks, compression and damage."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_prep import sources
from data_prep.errors import DataPrepError
from data_prep.sources import FILE_REASONS, FileChangedError, InputFile, format_of, parse, read_batches


def planned(path: Path, field: str = "text") -> InputFile:
    kind, compression = format_of(path)
    status = path.stat()
    stamp = str(status.st_mtime_ns)
    return InputFile(0, str(path), path.name, status.st_size, stamp, kind, field, compression)


def read_all(file: InputFile, first: int = 0, stop: int | None = None, limit: int = 10_000):
    """[(block, record number, offset, line)], and the same of what a damaged file lost, if anything."""
    found = [
        (batch.block, batch.first_record + i, int(batch.offsets[i]), line)
        for batch in read_batches(file, first, stop, limit)
        for i, line in enumerate(batch.lines)
    ]
    lost = [entry for entry in found if entry[3] in FILE_REASONS]
    return [entry for entry in found if entry not in lost], lost[0] if lost else None


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 37)


LINES = [b"x" * (7 * i % 90) for i in range(60)]


@pytest.mark.parametrize("final_newline", [True, False])
@pytest.mark.parametrize("lines", [LINES, [b"nine char"] * 55], ids=["ragged", "starting with the block"])
def test_blocks_of_a_plain_file_hold_each_record_once(tmp_path, small_blocks, lines, final_newline):
    data = b"\n".join(lines) + (b"\n" if final_newline else b"")
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    file = planned(path)
    whole, _ = read_all(file)
    assert [line for *_, line in whole] == lines
    assert all(data[offset : offset + len(line)] == line for _, _, offset, line in whole)
    by_blocks = [record for block in range(file.blocks) for record in read_all(file, block, block + 1)[0]]
    assert by_blocks == whole
    assert all(block == offset // 100 for block, _, offset, _ in whole)
    for block in range(file.blocks):
        numbers = [number for b, number, *_ in whole if b == block]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", lambda d: gzip.compress(d[:700]) + gzip.compress(d[700:]) + b"\0" * 20),
        (".zst", lambda d: zstandard.compress(d[:700]) + zstandard.compress(d[700:])),
        (".bz2", lambda d: bz2.compress(d[:700]) + bz2.compress(d[700:])),
        (".xz", lambda d: lzma.compress(d[:700]) + lzma.compress(d[700:])),
    ],
)
def test_compressed_files_read_like_plain_ones(tmp_path, small_blocks, suffix, compress):
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt{suffix}"
    plain.write_bytes(b"\n".join(LINES))
    packed.write_bytes(compress(plain.read_bytes()))
    assert planned(packed).blocks is None
    assert read_all(planned(packed)) == read_all(planned(plain))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_truncated_compression_loses_no_whole_record_before_the_cut(tmp_path, suffix):
    lines = [os.urandom(200).hex().encode() for _ in range(2000)]
    data = b"\n".join(lines)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}[suffix](data)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack[: len(pack) // 2])
    found, damage = read_all(planned(path))
    assert damage is not None and damage[3] == "truncated_compression"
    assert 0 < len(found) < 2000 and [line for *_, line in found] == lines[: len(found)]
    assert damage[2] == len(b"\n".join(lines[: len(found)])) + 1


def test_damaged_compression_is_told(tmp_path):
    packed = bytearray(gzip.compress(b"\n".join(os.urandom(100).hex().encode() for _ in range(3000))))
    packed[len(packed) // 2 : len(packed) // 2 + 50] = b"\xff" * 50
    (tmp_path / "a.txt.gz").write_bytes(packed)
    _, damage = read_all(planned(tmp_path / "a.txt.gz"))
    assert damage is not None and damage[3] == "damaged_compression"


@pytest.mark.parametrize("suffix", [".zst", ".xz"])
def test_a_window_beyond_the_limit_is_no_damage(tmp_path, suffix):
    if suffix == ".zst":
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        packed = (
            stream.compress(b"one\n") + stream.flush()
        )  # the size is not told, so the window is the whole one
    else:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 * 1024**2}]
        packed = lzma.compress(b"one\n", filters=filters)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    found, damage = read_all(planned(tmp_path / f"a.txt{suffix}"))
    assert found == [] and damage is not None and damage[3] == "window_too_large"


@pytest.mark.parametrize("chunk", [5, 64, 1000])
def test_too_large_records_cost_no_neighbour(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"L" * 500 + b"\ntwo\n" + b"M" * 300)
    found, _ = read_all(planned(path), limit=50)
    assert [(number, offset, line) for _, number, offset, line in found] == [
        (0, 0, b"one"),
        (1, 4, "record_too_large"),
        (2, 505, b"two"),
        (3, 509, "record_too_large"),
    ]


def test_a_huge_line_is_read_once_by_all_its_blocks_together(tmp_path, small_blocks, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"L" * 20_000 + b"\ntwo\n")
    taken, chunks = [], sources._chunks

    def counted(handle):
        for chunk in chunks(handle):
            taken.append(len(chunk))
            yield chunk

    monkeypatch.setattr(sources, "_chunks", counted)
    file = planned(path)
    by_blocks = [record for block in range(file.blocks) for record in read_all(file, block, block + 1, 50)[0]]
    found = [(offset, line) for _, _, offset, line in by_blocks]
    assert found == [(0, b"one"), (4, "record_too_large"), (20_005, b"two")]
    assert sum(taken) < 2 * path.stat().st_size


def test_many_short_lines_come_in_several_batches(tmp_path, monkeypatch):
    """What is held for each record is many times a short one."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"%d\n" % (number % 10) for number in range(2500)))
    whole = list(read_batches(planned(path), 0, None, 100))
    monkeypatch.setattr(sources, "_BATCH_RECORDS", 1000)
    batches = list(read_batches(planned(path), 0, None, 100))
    assert [(batch.first_record, len(batch.lines)) for batch in batches] == [
        (0, 1000),
        (1000, 1000),
        (2000, 500),
    ]
    assert [line for batch in batches for line in batch.lines] == whole[0].lines
    assert np.concatenate([batch.offsets for batch in batches]).tolist() == whole[0].offsets.tolist()


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nfour\xff\x00")
    assert [line for *_, line in read_all(planned(path))[0]] == [b"one", b"two", b"", b"four\xff\x00"]


@pytest.mark.parametrize(
    ("line", "text", "reason"),
    [
        (b'{"text": "good"}', "good", ""),
        (b"", "", ""),
        (b'{"text": "bad', None, "invalid_json"),
        (b"[" * 100_000, None, "nested_too_deep"),
        (b'{"a": ' + b"[" * 199 + b"]" * 199 + b', "text": "deep"}', "deep", ""),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b', "text": "deep"}', None, "nested_too_deep"),
        (b'{"text": "' + b'\\"[' * 300 + b'"}', '"[' * 300, ""),
        (b'{"a": [' + b"[], " * 300 + b'1], "text": "wide"}', "wide", ""),
        (b'{"text": "' + b"[" * 300 + b"\\", None, "invalid_json"),
        (b'["text"]', None, "not_a_json_object"),
        (b'{"body": "x"}', None, "missing_field"),
        (b'{"text": 3}', None, "field_is_not_text"),
        (b'{"text": null}', None, "field_is_not_text"),
        (b'{"text": "\xff"}', None, "invalid_utf8"),
        ("record_too_large", None, "record_too_large"),
    ],
)
def test_every_bad_record_has_its_reason(tmp_path, line, text, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x")
    assert parse(planned(path), line) == (text, reason)


def test_other_fields_may_hold_the_text(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_bytes(json.dumps({"body": "x"}).encode())
    assert parse(planned(path, "body"), path.read_bytes()) == ("x", "")


def test_a_changed_file_is_quarantined_and_a_missing_one_stops_the_run(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n")
    file = planned(path)
    path.write_bytes(b"one\ntwo\n")
    assert read_all(file) == ([], (0, 0, 0, "file_changed"))
    changing = read_batches(planned(path), 0, None, 100)
    assert len(next(changing).lines) == 2
    path.write_bytes(b"three\n")
    with pytest.raises(FileChangedError, match="changed while it was read"):
        next(changing)
    path.unlink()
    with pytest.raises(DataPrepError, match="cannot be read"):
        read_all(file)

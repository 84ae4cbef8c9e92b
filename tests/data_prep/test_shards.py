"""The shard format: readers agree, damage is noticed, and the audit finds what checksums cannot."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.errors import AuditError
from data_prep.executor import LocalExecutor
from data_prep.files import write_json
from data_prep.packing import Documents, RowPacker
from data_prep.progress import RunProgress
from data_prep.shards import Manifest, ShardError, ShardReader, ShardWriter, SplitReader, index_name
from tests.data_prep.made import ROOT, settings


@pytest.fixture
def output(prepared, tmp_path) -> Path:
    """A copy of the prepared data set that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def audit(output: Path) -> str:
    """The findings of `verify`, "" when there are none."""
    try:
        verify(output, LocalExecutor(1), RunProgress(None, 60))
    except (AuditError, ShardError) as error:
        return str(error)
    return ""


def test_manifest_counts_are_those_of_the_rows(prepared):
    manifest = Manifest.load(prepared)
    assert manifest.special_ids == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert manifest.token_dtype == np.uint16
    for split in ("train", "validation"):
        reader = SplitReader(prepared, split)
        entry = manifest.splits[split]
        rows = reader.rows(0, len(reader))
        assert rows.tokens_NL.shape == (entry.rows, manifest.row_tokens) == rows.document_NL.shape
        assert (rows.tokens_NL != 0).sum() == entry.tokens
        assert (rows.tokens_NL == 2).sum() == entry.documents == (rows.tokens_NL == 3).sum()
        assert np.array_equal(rows.tokens_NL == 0, rows.document_NL == 0)
        assert rows.word_start_NL[np.isin(rows.tokens_NL, [2, 3])].all()
        if split == "train":
            counts = np.bincount(rows.tokens_NL.reshape(-1), minlength=manifest.vocab_size)
            counts[0] = 0
            assert np.array_equal(counts, manifest.load_token_counts())


def test_rows_are_addressed_by_number(prepared):
    reader = SplitReader(prepared, "train", cached_blocks=2)
    whole = reader.rows(0, len(reader))
    draw = np.random.default_rng(0)
    for _ in range(60):
        start, stop = np.sort(draw.integers(0, len(reader) + 1, 2))
        part = reader.rows(int(start), int(stop))
        for name in ("tokens_NL", "word_start_NL", "document_NL"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start:stop])
            assert getattr(part, name).dtype == getattr(whole, name).dtype
    with pytest.raises(IndexError):
        reader.rows(0, len(reader) + 1)
    copied = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copied.rows(5, 9).tokens_NL, whole.tokens_NL[5:9])


def test_document_numbers_follow_separators(prepared):
    rows = SplitReader(prepared, "train").rows(0, 50)
    for tokens, numbers in zip(rows.tokens_NL, rows.document_NL, strict=True):
        after = np.cumsum(np.concatenate([[0], tokens[:-1] == 3])) + 1
        assert np.array_equal(np.where(tokens == 0, 0, after), numbers)


def test_stock_webdataset_decodes_every_sample_with_the_documented_handler(prepared):
    """The snippet of docs/data_format.md, run as it stands there, sees the rows that our reader sees."""
    import webdataset

    text = (ROOT / "docs" / "data_format.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    handler = snippet[snippet.index("def decode") : snippet.index("\n\n", snippet.index("def decode"))]
    assert len(handler.strip().splitlines()) <= 5
    names: dict = {}
    exec(snippet.replace("OUTPUT", str(prepared)), names)
    manifest = Manifest.load(prepared)
    tokens = [block["tokens"] for block in names["dataset"]]
    words = [block["words"] for block in names["dataset"]]
    reader = SplitReader(prepared, "train")
    rows = reader.rows(0, manifest.splits["train"].shards[0].rows)
    assert np.array_equal(np.concatenate(tokens), rows.tokens_NL)
    assert np.array_equal(np.concatenate(words), rows.word_start_NL)
    pieces = np.concatenate([block["documents"].reshape(8, -1) for block in names["dataset"]], axis=1)
    assert (pieces[7] == 0).sum() == manifest.splits["train"].shards[0].documents
    urls = [str(path) for path in sorted((prepared / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert set(samples[0]) >= {"tokens.zst", "words.zst", "documents.zst"}


def test_tar_is_plain_and_deterministic(prepared):
    with tarfile.open(prepared / "train" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o444)}
    assert len({len(m.name.split(".")[0]) for m in members}) == 1
    assert (prepared / "train" / "shard-000000.tar").stat().st_size % 10_240 == 0


def test_large_vocabularies_take_four_bytes(prepared, tmp_path):
    manifest = replace(Manifest.load(prepared), vocab_size=70_000, row_tokens=8, directory=str(tmp_path))
    packer, file = RowPacker(8, 2), io.BytesIO()
    tokens = np.array([2, 69_999, 65_536, 3, 2, 9, 3], dtype=np.uint32)
    origin = np.arange(8, dtype=np.uint32).reshape(4, 2)
    writer = ShardWriter(file, "train", 0, manifest.token_dtype, 3)
    blocks = [*packer.add(Documents(tokens, None, np.array([4, 3]), origin)), *packer.finish()]
    for block in blocks:
        writer.add(block)
    index, hashes = writer.finish()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000000.tar").write_bytes(file.getvalue())
    (tmp_path / "train" / "shard-000000.index.json").write_bytes(index)
    entry = replace(manifest.splits["train"].shards[0], index_xxh3=hashes["index_xxh3"])
    block = ShardReader(manifest, "train", entry).read(0)
    assert block.tokens_NL.tolist() == [[2, 69_999, 65_536, 3, 2, 9, 3, 0]] and block.word_start_NL is None


def test_an_intact_output_passes_the_audit(prepared):
    assert audit(prepared) == ""


def test_the_audit_holds_no_more_than_the_sums_of_shards_it_has_looked_at(prepared):
    """A result has the count of every id, which for thousands of shards is more than a machine has."""
    made: list[weakref.ref] = []
    most = []

    class Result(dict):
        """A dict that can be watched."""

    class Watched(LocalExecutor):
        def run(self, *arguments, **named):
            for found in super().run(*arguments, **named):
                result = Result(found)
                made.append(weakref.ref(result))
                most.append(sum(ref() is not None for ref in made))
                yield result

    verify(prepared, Watched(1), RunProgress(None, 60))
    assert len(made) > 4 and max(most) <= 2


def test_a_flipped_bit_is_noticed_by_reader_and_audit(output):
    path = output / "train" / "shard-000001.tar"
    index = json.loads(path.with_name(index_name(path.name)).read_bytes())
    for name in ("tokens", "words", "documents"):
        data = bytearray(path.read_bytes())
        offset, length = index["blocks"][0][name]
        data[offset + length - 5] ^= 1
        original = path.read_bytes()
        path.write_bytes(data)
        assert "shard-000001.tar: damaged" in audit(output)
        reader = SplitReader(output, "train")
        first = reader.manifest.splits["train"].shards[0].rows
        with pytest.raises(ShardError, match="block 0 is damaged"):
            reader.rows(first, first + 1)
        path.write_bytes(original)
    assert audit(output) == ""


def test_truncated_and_missing_shards_are_named(output):
    path = output / "train" / "shard-000002.tar"
    os.truncate(path, path.stat().st_size // 2)
    assert "shard-000002.tar" in audit(output)
    with pytest.raises(ShardError, match="truncated"):
        reader = SplitReader(output, "train")
        reader.rows(0, len(reader))
    path.unlink()
    assert "shard-000002.tar: cannot be read" in audit(output)
    (output / "train" / "shard-000001.index.json").unlink()
    assert "shard-000001.index.json: cannot be read" in audit(output)


def test_an_altered_manifest_token_table_or_tokenizer_is_noticed(output):
    path = output / "token_counts.bin"
    data = path.read_bytes()
    path.write_bytes(bytes(8) + data[8:-8] + bytes([1] * 8))
    assert "token_counts.bin: damaged" in audit(output)
    path.write_bytes(data)
    model = output / "tokenizer" / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\x12\x00")
    assert "tokenizer" in audit(output)
    text = (output / "manifest.json").read_text()
    (output / "manifest.json").write_text(text.replace('"seed": 5', '"seed": 6', 1))
    assert "altered" in audit(output)
    (output / "manifest.json").write_text(text.replace('"format_version": 1', '"format_version": 99', 1))
    assert "format version 99" in audit(output)


@pytest.mark.parametrize("forgery", ["removed", "swapped", "reordered origin"])
def test_the_audit_finds_a_forgery_whose_checksums_are_all_right(output, forgery):
    """A document is taken out, or its text or origin altered, and every hash and count is made to fit again."""
    manifest = Manifest.load(output)
    entry = manifest.splits["train"].shards[0]
    reader = ShardReader(manifest, "train", entry)
    tokens, words, lengths, origins = [], [], [], []
    for number in range(len(reader.blocks)):
        block = reader.read(number)
        filled = int(block.pieces[2].sum())
        tokens.append(block.tokens_NL.reshape(-1)[:filled])
        words.append(block.word_start_NL.reshape(-1)[:filled])
        for _row, _start, length, *origin, piece in block.pieces.T.tolist():
            if piece:
                lengths[-1] += length
            else:
                lengths.append(length)
                origins.append(origin)
    flat, starts, count = np.concatenate(tokens), np.concatenate(words), len(lengths)
    size = np.array(lengths)
    if forgery == "removed":
        flat, starts, size, origins, count = (
            flat[size[0] :],
            starts[size[0] :],
            size[1:],
            origins[1:],
            count - 1,
        )
    elif forgery == "swapped":
        flat = flat.copy()
        inner = np.flatnonzero(flat > 4)
        flat[inner[0]] = flat[inner[1]] if flat[inner[0]] != flat[inner[1]] else flat[inner[0]] + 1
    else:
        origins[0], origins[1] = origins[1], origins[0]
    packer, file = RowPacker(manifest.row_tokens, manifest.block_rows), io.BytesIO()
    writer = ShardWriter(file, "train", 0, manifest.token_dtype, 3)
    for block in packer.add(Documents(flat, starts, size, np.array(origins, dtype=np.uint32).T)):
        writer.add(block)
    for block in packer.finish():
        writer.add(block)
    index, hashes = writer.finish()
    reader.path.write_bytes(file.getvalue())
    reader.path.with_name(index_name(entry.name)).write_bytes(index)
    forged = replace(entry, rows=writer.rows, documents=count, tokens=len(flat), **hashes)
    split = manifest.splits["train"]
    split = replace(
        split,
        shards=[forged, *split.shards[1:]],
        rows=split.rows - entry.rows + forged.rows,
        documents=split.documents - entry.documents + count,
        tokens=split.tokens - entry.tokens + forged.tokens,
    )
    lost = entry.documents - count
    sources = [manifest.sources[0] | {k: manifest.sources[0][k] - lost for k in ("read", "written")}]
    counts = np.bincount(
        np.concatenate([flat, *(_tokens_of(manifest, shard) for shard in split.shards[1:])]),
        minlength=manifest.vocab_size,
    ).astype("<u8")
    counts[0] = 0
    (output / "token_counts.bin").write_bytes(counts.tobytes())
    table = manifest.token_counts | {"xxh3": xxhash.xxh3_128_hexdigest(counts.tobytes())}
    changed = replace(
        manifest, splits=manifest.splits | {"train": split}, sources=sources, token_counts=table
    )
    write_json(output / "manifest.json", changed.to_json())
    findings = audit(output)
    assert "train: the documents are not those of pass 1" in findings
    assert len(findings.splitlines()) == 1, findings


def _tokens_of(manifest: Manifest, shard) -> np.ndarray:
    reader = ShardReader(manifest, "train", shard)
    return np.concatenate([reader.read(number).tokens_NL.reshape(-1) for number in range(len(reader.blocks))])


def test_the_audit_looks_at_the_folder_the_quarantine_and_the_configuration(output):
    stray = output / "train" / "shard-000099.tar"
    shutil.copy(output / "train" / "shard-000000.tar", stray)
    assert "shard-000099.tar: not a shard of this data set" in audit(output)
    stray.unlink()
    quarantine = output / "quarantine.jsonl"
    text = quarantine.read_bytes()
    quarantine.write_bytes(text + b"{}\n")
    assert re.search(r"quarantine.jsonl: \d+ records, the manifest counts", audit(output))
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["records"]["quarantine_xxh3"] == xxhash.xxh3_128_hexdigest(text)
    quarantine.write_bytes(text)
    config = PrepareConfig.model_validate(settings(output, ["raw/*.jsonl"]))
    arguments = (output, LocalExecutor(1), RunProgress(None, 60))
    assert verify(*arguments, config).content_hash
    with pytest.raises(AuditError, match=r"another configuration:\n  seed: was 5, is now 8$"):
        verify(*arguments, config.model_copy(update={"seed": 8}))


def test_a_manifest_without_its_parts_is_a_clear_line(output):
    tree = json.loads((output / "manifest.json").read_text())
    for key in ("splits", "seed"):
        (output / "manifest.json").write_text(json.dumps({k: v for k, v in tree.items() if k != key}))
        with pytest.raises(ShardError, match=rf"not a whole manifest .*{key}"):
            Manifest.load(output)


def test_missing_outputs_are_told_apart(tmp_path, prepared):
    with pytest.raises(ShardError, match="has `data_prep run` finished"):
        Manifest.load(tmp_path)
    with pytest.raises(ShardError, match="no split 'test'; there are train, validation"):
        SplitReader(prepared, "test")

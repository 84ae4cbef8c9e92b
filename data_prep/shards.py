"""The shard format: writer, reader and manifest side by side, so that preparation and training cannot drift apart.

OUTPUT/manifest.json        only what decides the content (docs/data_format.md lists every field)
OUTPUT/tokenizer/           tokenizer.model (or vocab.txt), tokenizer.json
OUTPUT/token_counts.bin     how often each id occurs in the train split, little-endian uint64 [V]
OUTPUT/train/shard-000000.tar, shard-000000.index.json, …    OUTPUT/validation/…

A shard is a plain USTAR tar that stock webdataset reads. A sample is a block of N rows of L tokens: `tokens.zst`
(little-endian uint16, uint32 where V > 65536, [N, L]), `words.zst` (word starts, packed bits over the flattened block)
and `documents.zst` (uint32 [8, P]: the columns PIECE_COLUMNS of the P document pieces, in order). The index beside it
says where each member lies and has a checksum of each block's content, so a reader fetches any rows by one range read.

Shapes: N rows, L row length, P document pieces, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
import zstandard

from .places import place, read_range
from .rows import Block, RowBatch

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
PIECE_COLUMNS = ("row", "start", "length", "source", "file", "block", "record", "piece")
_RECORD_BYTES = 512
_TAR_BYTES = 10_240
_OPEN_INDEXES = 16  # shard indexes that a reader keeps in memory


class ShardError(ValueError):
    """A prepared data set is missing, damaged or of another format version; the message says which file, and what."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard. `content` hashes the uncompressed blocks and is the same everywhere; the file_ and index_
    fields depend on the zstd version too and only guard the transport.
    """

    name: str
    rows: int
    documents: int
    tokens: int
    content: str
    file_bytes: int
    file_xxh3: str
    index_xxh3: str


@dataclass(frozen=True)
class SplitEntry:
    """One split: totals over its shards (`tokens` without padding) and the order-independent sum of its
    documents.
    """

    rows: int
    documents: int
    tokens: int
    document_sum: str
    shards: list[ShardEntry]


@dataclass(frozen=True)
class Manifest:
    """What OUTPUT holds, and the hash that names it. `Manifest.load` checks the version and the hash."""

    seed: int
    row_tokens: int
    block_rows: int
    vocab_size: int
    special_ids: dict[str, int]
    has_words: bool
    tokenizer: dict[str, Any]
    token_counts: dict[str, str]
    splits: dict[str, SplitEntry]
    sources: list[dict[str, Any]]
    files: list[dict[str, Any]]
    records: dict[str, Any]
    config: dict[str, Any]
    tools: dict[str, str]
    format_version: int = FORMAT_VERSION
    content_hash: str = ""
    directory: str = field(default="", compare=False)

    @property
    def token_dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read OUTPUT/manifest.json. Raises ShardError when it is missing, of another version, or altered."""
        path = place(directory) / "manifest.json"
        try:
            tree = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ShardError(f"{path}: no such file; has `data_prep run` finished for this folder?") from None
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: cannot be read ({error})") from None
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
        try:
            splits = tree.pop("splits")
            entries = {
                name: SplitEntry(**(split | {"shards": [ShardEntry(**shard) for shard in split["shards"]]}))
                for name, split in splits.items()
            }
            manifest = cls(**tree, splits=entries, directory=str(directory))
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: not a whole manifest ({error}); prepare the data again") from None
        names = [*entries, *manifest.tokenizer["file"].split("/"), manifest.token_counts["file"]]
        names += [shard.name for entry in entries.values() for shard in entry.shards]
        if outside := [name for name in names if not re.fullmatch(r"\w[\w.-]*|", name)]:
            raise ShardError(f"{path}: names a file outside of its folder ({outside[0]!r})")
        if manifest.compute_content_hash() != manifest.content_hash:
            raise ShardError(f"{path}: altered after it was written (its content hash does not match)")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The tree that goes to manifest.json, with the content hash filled in."""
        tree = asdict(self)
        del tree["directory"]
        return tree | {"content_hash": self.compute_content_hash()}

    def compute_content_hash(self) -> str:
        """xxh3-128 over every field but those that depend on the compressor or guard the transport."""
        tree = asdict(self)
        for key in ("content_hash", "directory", "tools"):
            del tree[key]
        for split in tree["splits"].values():
            for shard in split["shards"]:
                for key in ("file_bytes", "file_xxh3", "index_xxh3"):
                    del shard[key]
        canonical = json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(canonical.encode())

    def load_token_counts(self) -> np.ndarray:
        """Occurrences of each id in the train split, padding left out, uint64 [V]. Raises ShardError if
        damaged.
        """
        path = place(self.directory) / self.token_counts["file"]
        data = _read(path)
        if xxhash.xxh3_128_hexdigest(data) != self.token_counts["xxh3"]:
            raise ShardError(f"{path}: damaged (checksum differs from the manifest)")
        return np.frombuffer(data, dtype="<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 while every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(number: int) -> str:
    """File name of a shard; its index is the same with .index.json for .tar."""
    return f"shard-{number:06d}.tar"


def index_name(name: str) -> str:
    return name.removesuffix(".tar") + ".index.json"


class ShardWriter:
    """Writes blocks into an open file as a deterministic tar, and gathers the index."""

    def __init__(self, file: BinaryIO, split: str, number: int, dtype: np.dtype, zstd_level: int) -> None:
        self._file, self._dtype = file, dtype
        self._prefix = f"{split}-{number:06d}"
        self._compressor = zstandard.ZstdCompressor(level=zstd_level)
        self._file_hash, self._content_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._offset = 0
        self._blocks: list[dict[str, Any]] = []
        self.rows = 0

    def add(self, block: Block) -> None:
        """Append one block as one webdataset sample."""
        contents = {"tokens": block.tokens_NL.astype(self._dtype, copy=False).tobytes()}
        if block.word_bits is not None:
            contents["words"] = block.word_bits.tobytes()
        contents["documents"] = block.pieces.astype("<u4", copy=False).tobytes()
        checksum = xxhash.xxh3_64()
        entry: dict[str, Any] = {"first_row": self.rows, "rows": len(block.tokens_NL)}
        key = f"{self._prefix}-{len(self._blocks):06d}"
        for name, content in contents.items():
            checksum.update(content)
            self._content_hash.update(content)
            data = self._compressor.compress(content)
            self._write(tar_header(f"{key}.{name}.zst", len(data)))
            entry[name] = [self._offset, len(data)]
            self._write(data + bytes(-len(data) % _RECORD_BYTES))
        self._blocks.append(entry | {"xxh3": checksum.hexdigest()})
        self.rows += len(block.tokens_NL)

    def finish(self) -> tuple[bytes, dict[str, Any]]:
        """End the tar; returns the bytes of the index file and the hash fields of the ShardEntry."""
        end = 2 * _RECORD_BYTES
        self._write(bytes(end + -(self._offset + end) % _TAR_BYTES))
        lines = ",\n".join(json.dumps(block) for block in self._blocks)
        index = (
            f'{{"format_version": {FORMAT_VERSION}, "rows": {self.rows}, "blocks": [\n{lines}\n]}}\n'.encode()
        )
        return index, {
            "content": self._content_hash.hexdigest(),
            "file_bytes": self._offset,
            "file_xxh3": self._file_hash.hexdigest(),
            "index_xxh3": xxhash.xxh3_128_hexdigest(index),
        }

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file_hash.update(data)
        self._offset += len(data)


def tar_header(name: str, size_bytes: int) -> bytes:
    """A USTAR header that depends on name and size alone."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size_bytes, 0o444, 0
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


class ShardReader:
    """Reads blocks of one shard through its index. Holds no open file, so it survives fork and travels to
    workers.
    """

    def __init__(self, manifest: Manifest, split: str, entry: ShardEntry) -> None:
        self._manifest = manifest
        self.path = place(manifest.directory) / split / entry.name
        index_path = self.path.with_name(index_name(entry.name))
        index = _read(index_path)
        if xxhash.xxh3_128_hexdigest(index) != entry.index_xxh3:
            raise ShardError(f"{index_path}: damaged (checksum differs from the manifest)")
        self.blocks: list[dict[str, Any]] = json.loads(index)["blocks"]
        self.first_rows: list[int] = [block["first_row"] for block in self.blocks]

    def read_range(self, offset: int, length: int) -> bytes:
        """Bytes of the shard's file; a subclass may take them from elsewhere."""
        return _read(self.path, offset, length)

    def read(self, number: int) -> Block:
        """Decode block `number` with one range read. Raises ShardError when its content is not what was
        written.
        """
        entry = self.blocks[number]
        members = [name for name in ("tokens", "words", "documents") if name in entry]
        first, (last, last_bytes) = entry[members[0]][0], entry[members[-1]]
        data = memoryview(self.read_range(first, last + last_bytes - first))
        contents, checksum = {}, xxhash.xxh3_64()
        try:
            for name in members:
                offset, length = entry[name]
                part = data[offset - first : offset - first + length]
                contents[name] = _decompressor().decompress(part)
                checksum.update(contents[name])
            intact = checksum.hexdigest() == entry["xxh3"]
        except zstandard.ZstdError:
            intact = False
        if not intact:
            raise ShardError(f"{self.path}: block {number} is damaged (checksum differs from the index)")
        shape = (entry["rows"], self._manifest.row_tokens)
        words = np.frombuffer(contents["words"], np.uint8) if "words" in contents else None
        tokens = np.frombuffer(contents["tokens"], self._manifest.token_dtype).reshape(shape)
        pieces = np.frombuffer(contents["documents"], "<u4").reshape(len(PIECE_COLUMNS), -1)
        return Block(tokens, words, pieces)


class SplitReader:
    """Random access to the rows of one split, in disk order, which is already a uniform shuffle of the
    documents.

    `len(reader)` is the number of rows. Blocks are verified on every read; the last few stay decoded.
    Raises ShardError for a split that does not exist and for damaged or missing files.
    """

    def __init__(self, directory: str | Path, split: str, cached_blocks: int = 4) -> None:
        self.manifest = Manifest.load(directory)
        if split not in self.manifest.splits:
            raise ShardError(f"{directory}: no split {split!r}; there are {', '.join(self.manifest.splits)}")
        if self.manifest.config["shards"].get("content") == "text":
            raise ShardError(
                f"{directory}: holds shuffled text, not rows of tokens; prepare it with content: tokens"
            )
        self.split = split
        self._entries = self.manifest.splits[split].shards
        self._stops = list(itertools.accumulate(entry.rows for entry in self._entries))
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._cache: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._cached_blocks = cached_blocks
        self._last_rows, self._last_block = range(0), self._empty()

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def rows(self, start: int, stop: int) -> RowBatch:
        """Rows start .. stop - 1. Raises IndexError outside of 0 .. len."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start}..{stop} of {len(self)}")
        parts: list[tuple[Block, slice | np.ndarray]] = []
        row = start
        while row < stop:
            block, first = self._block_at(row)
            end = min(stop, first + len(block.tokens_NL))
            parts.append((block, slice(row - first, end - first)))
            row = end
        return RowBatch(parts or [(self._empty(), slice(0))])

    def take(self, numbers: np.ndarray) -> RowBatch:
        """Rows of any numbers, in that order; each block is read once. Raises IndexError outside of 0 .. len."""
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if len(ordered) and not 0 <= ordered[0] <= ordered[-1] < len(self):
            raise IndexError(f"rows {ordered[0]}..{ordered[-1]} of {len(self)}")
        parts: list[tuple[Block, slice | np.ndarray]] = []
        at = 0
        while at < len(ordered):
            block, first = self._block_at(int(ordered[at]))
            end = int(np.searchsorted(ordered, first + len(block.tokens_NL)))
            parts.append((block, ordered[at:end] - first))
            at = end
        if len(parts) == 1:
            return RowBatch([(parts[0][0], numbers - first)])
        return RowBatch(parts or [(self._empty(), slice(0))], np.argsort(order))

    def open_shard(self, entry: ShardEntry) -> ShardReader:
        """The reader of one shard; a subclass may read it from elsewhere."""
        return ShardReader(self.manifest, self.split, entry)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._shards:
            self._shards[shard] = self.open_shard(self._entries[shard])
            if len(self._shards) > _OPEN_INDEXES:
                self._shards.popitem(last=False)
        return self._shards[shard]

    def _block_at(self, row: int) -> tuple[Block, int]:
        """The block that holds a row, and the number of its first row."""
        if row in self._last_rows:
            return self._last_block, self._last_rows.start
        shard = bisect_right(self._stops, row)
        base = self._stops[shard] - self._entries[shard].rows
        reader = self._reader(shard)
        number = bisect_right(reader.first_rows, row - base) - 1
        key = (shard, number)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            self._cache[key] = reader.read(number)
            if len(self._cache) > self._cached_blocks:
                self._cache.popitem(last=False)
        block, first = self._cache[key], base + reader.first_rows[number]
        self._last_rows, self._last_block = range(first, first + len(block.tokens_NL)), block
        return block, first

    def _empty(self) -> Block:
        tokens_NL = np.zeros((0, self.manifest.row_tokens), self.manifest.token_dtype)
        pieces = np.zeros((len(PIECE_COLUMNS), 0), np.uint32)
        return Block(tokens_NL, np.zeros(0, np.uint8) if self.manifest.has_words else None, pieces)


_of_this_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """Kept, because a new one costs as much as a small member; one for each thread, because they must not share it."""
    if not hasattr(_of_this_thread, "decompressor"):
        _of_this_thread.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _of_this_thread.decompressor
    return found


def _read(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file or of a range of it. Raises ShardError when the file is missing or ends early."""
    try:
        data = read_range(path, offset, length)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    if length is not None and len(data) != length:
        raise ShardError(f"{path}: truncated (ends before byte {offset + length})")
    return data

"""`verify`: read everything again and show that the output is whole, intact and complete.

For every shard: the file and its index hash to what the manifest says, the tar lists the members that the
index names, every block decodes and matches its checksum, and the document pieces tile the rows. From the
pieces the documents are put together again, and the order-independent sum over them must be the one that
pass 1 took before the shuffle.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .books import balance
from .config import PrepareConfig
from .errors import AuditError
from .executor import Executor
from .fingerprint import document_sum
from .owned import SHARD
from .places import place
from .plan import differences
from .progress import RunProgress
from .quarantine import records_of_line
from .shards import SPECIAL_IDS, Block, Manifest, ShardEntry, ShardError, ShardReader, index_name
from .text import verify_text
from .tokenizer import make_tokenizer, read_model

_READ_BYTES = 4 * 1024**2
_CHECK_TOKENS = 4 * 1024**2


@dataclass(frozen=True)
class VerifyTask:
    """Check one shard of a prepared data set."""

    directory: str
    split: str
    shard: int


@dataclass
class _Totals:
    """Of the shards of a split that have been looked at; token_counts: occurrences of each id, uint64 [V]."""

    token_counts: np.ndarray
    sums: Counter[str] = field(default_factory=Counter)
    damaged: bool = False

    def add(self, result: dict[str, Any]) -> None:
        self.damaged |= bool(result["problems"])
        self.sums.update({key: result[key] for key in ("rows", "documents", "tokens", "document_sum")})
        if not self.damaged:
            self.token_counts += np.frombuffer(result["counts"], dtype="<u8")


def verify(
    directory: str | Path, executor: Executor, progress: RunProgress, config: PrepareConfig | None = None
) -> Manifest:
    """Check a prepared data set, and that it is the one of `config`. Raises AuditError with one line a finding,
    ShardError without a usable manifest.
    """
    manifest = Manifest.load(directory)
    problems = _check_config(manifest, config) if config else []
    problems += _check_listing(manifest) + _check_quarantine(manifest)
    try:
        if manifest.vocab_size:
            problems += _check_tokenizer(manifest)
    except ValueError as error:
        problems.append(str(error))
    tasks = [
        VerifyTask(str(directory), split, shard)
        for split, entry in manifest.splits.items()
        for shard in range(len(entry.shards))
    ]
    totals = {split: _Totals(np.zeros(manifest.vocab_size, dtype=np.uint64)) for split in manifest.splits}
    unit = "tokens" if manifest.vocab_size else "bytes"
    with progress.stage("verify", sum(e.tokens for e in manifest.splits.values()), len(tasks), unit):
        for result in executor.run(verify_shard, tasks):
            totals[result["split"]].add(result)
            problems += result["problems"]
            progress.advance(result["tokens"])
    for split, entry in manifest.splits.items():
        total = totals[split]
        if total.damaged:
            continue
        for key in ("rows", "documents", "tokens"):
            if total.sums[key] != getattr(entry, key):
                problems.append(
                    f"{split}: the manifest counts {getattr(entry, key)} {key}, the shards hold {total.sums[key]}"
                )
        if f"{total.sums['document_sum'] % (1 << 64):016x}" != entry.document_sum:
            problems.append(
                f"{split}: the documents are not those of pass 1 (lost, doubled or altered; sum differs)"
            )
    problems += _check_counts(manifest, totals["train"])
    balance(manifest.sources, sum(split.documents for split in manifest.splits.values()), problems)
    if problems:
        raise AuditError("\n".join(problems))
    return manifest


def verify_shard(task: VerifyTask) -> dict[str, Any]:
    """Check one shard; the result lists its problems, and its counts for the totals."""
    manifest = Manifest.load(task.directory)
    entry = manifest.splits[task.split].shards[task.shard]
    if not manifest.vocab_size:
        return verify_text(manifest, task.split, entry)
    result: dict[str, Any] = {
        "split": task.split,
        "problems": [],
        "rows": 0,
        "documents": 0,
        "tokens": 0,
        "document_sum": 0,
    }
    try:
        reader = ShardReader(manifest, task.split, entry)
        _check_file(reader, entry)
        counts = np.zeros(manifest.vocab_size, dtype=np.int64)
        content = xxhash.xxh3_128()
        check = _DocumentCheck(reader.path, manifest.special_ids)
        for block in _blocks(reader, content):
            check.add(block)
            result["rows"] += len(block.tokens_NL)
            counts += np.bincount(block.tokens_NL.reshape(-1), minlength=manifest.vocab_size)
        counts[SPECIAL_IDS["[PAD]"]] = 0
        check.finish()
        result |= {"documents": check.documents, "tokens": check.tokens, "document_sum": check.sum}
        result["counts"] = counts.astype("<u8").tobytes()
        for key in ("rows", "documents", "tokens"):
            if result[key] != getattr(entry, key):
                raise ShardError(
                    f"{reader.path}: holds {result[key]} {key}, the manifest says {getattr(entry, key)}"
                )
        if content.hexdigest() != entry.content:
            raise ShardError(f"{reader.path}: its content is not that of the manifest (hash differs)")
    except (ShardError, tarfile.TarError, ValueError) as error:
        result["problems"].append(str(error))
    return result


def _blocks(reader: ShardReader, content: Any) -> Iterator[Block]:
    for number in range(len(reader.blocks)):
        block = reader.read(number)
        content.update(block.tokens_NL.tobytes())
        if block.word_bits is not None:
            content.update(block.word_bits)
        content.update(block.pieces.tobytes())
        yield block


def _check_file(reader: ShardReader, entry: ShardEntry) -> None:
    """The file is the one that was written, and a tar reader finds in it what the index says."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with reader.path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
                size += len(data)
    except OSError as error:
        raise ShardError(f"{reader.path}: cannot be read ({error.strerror})") from None
    if size != entry.file_bytes:
        raise ShardError(f"{reader.path}: {size} bytes, the manifest says {entry.file_bytes}")
    if digest.hexdigest() != entry.file_xxh3:
        raise ShardError(f"{reader.path}: damaged (checksum differs from the manifest)")
    with reader.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        listed = [(member.offset_data, member.size) for member in tar]
    names = ("tokens", "words", "documents")
    indexed = [tuple(block[name]) for block in reader.blocks for name in names if name in block]
    if listed != indexed:
        raise ShardError(f"{reader.path}: the index does not describe the members of the tar")


class _DocumentCheck:
    """Checks that pieces tile the rows, and puts the documents together again, across rows and blocks."""

    def __init__(self, path: Path, special_ids: dict[str, int]) -> None:
        self._special_ids = special_ids
        self.documents = self.tokens = self.sum = 0
        self._path = path
        self._tokens: list[np.ndarray] = []
        self._pieces: list[np.ndarray] = []
        self._held = 0

    def add(self, block: Block) -> None:
        row, start, length = (block.pieces[i].astype(np.int64) for i in range(3))
        row_tokens = block.tokens_NL.shape[1]
        begin = row * row_tokens + start
        filled = int(length.sum())
        tiles = (
            len(begin) > 0
            and begin[0] == 0
            and bool(np.all(begin[1:] == begin[:-1] + length[:-1]))
            and bool(np.all(start + length <= row_tokens))
            and block.tokens_NL.size - filled < row_tokens
        )
        flat = block.tokens_NL.reshape(-1)
        padding = SPECIAL_IDS["[PAD]"]
        if not tiles or np.any(flat[filled:] != padding) or np.any(flat[:filled] == padding):
            raise ShardError(f"{self._path}: the document pieces do not tile the rows")
        self._tokens.append(flat[:filled])
        self._pieces.append(block.pieces[2:])
        self._held += filled
        if self._held >= _CHECK_TOKENS:
            self._settle(last=False)

    def finish(self) -> None:
        self._settle(last=True)

    def _settle(self, last: bool) -> None:
        """Account for the documents held, but for the last one while it may go on."""
        if not self._tokens:
            return
        tokens, pieces = np.concatenate(self._tokens), np.concatenate(self._pieces, axis=1)
        length, piece = pieces[0].astype(np.int64), pieces[5]
        firsts = np.flatnonzero(piece == 0)
        begins = np.cumsum(length) - length
        same = np.all(pieces[1:5, 1:] == pieces[1:5, :-1], axis=0)
        follows = (piece[1:] == 0) | (same & (piece[1:] == piece[:-1] + 1))
        if not len(firsts) or firsts[0] != 0 or not bool(np.all(follows)):
            raise ShardError(f"{self._path}: a document's pieces do not follow each other")
        if not last:
            if len(firsts) == 1:
                return
            keep = int(firsts[-1])
            kept_tokens, kept_pieces = tokens[begins[keep] :], pieces[:, keep:]
            tokens, firsts = tokens[: begins[keep]], firsts[:-1]
            self._tokens, self._pieces, self._held = [kept_tokens], [kept_pieces], len(kept_tokens)
        starts = begins[firsts]
        stops = np.append(starts[1:], len(tokens))
        if np.any(tokens[starts] != self._special_ids["[CLS]"]) or np.any(
            tokens[stops - 1] != self._special_ids["[SEP]"]
        ):
            raise ShardError(f"{self._path}: a document does not begin with [CLS] and end with [SEP]")
        self.documents += len(firsts)
        self.tokens += len(tokens)
        self.sum = (self.sum + document_sum(tokens, stops - starts, pieces[2:5, firsts])) % (1 << 64)


def _check_tokenizer(manifest: Manifest) -> list[str]:
    name = manifest.tokenizer["file"]
    tokenizer = make_tokenizer(read_model(place(manifest.directory) / name), name)
    if tokenizer.sha256 == manifest.tokenizer["sha256"]:
        return []
    return [f"{manifest.tokenizer['file']}: not the model of the manifest (sha256 differs)"]


def _check_config(manifest: Manifest, config: PrepareConfig) -> list[str]:
    """Settings in which the configuration is not that of the data set."""
    made = manifest.config | {"words": {"segmenter": manifest.config["words"]["segmenter"]}}
    made["tokenizer"] = {key: value for key, value in made["tokenizer"].items() if key != "sha256"}
    made["cleaning"] = {key: value for key, value in made["cleaning"].items() if key != "function_sources"}
    changed = differences(made, config.content())
    if not changed:
        return []
    return [f"{manifest.directory}: was prepared with another configuration:", *changed]


def _check_listing(manifest: Manifest) -> list[str]:
    """Shards in the folders that the manifest does not know; a reader that goes by names would take them."""
    problems = []
    for split, entry in manifest.splits.items():
        known = {name for shard in entry.shards for name in (shard.name, index_name(shard.name))}
        for path in sorted((place(manifest.directory) / split).glob("*")):
            if path.name not in known and (path.name.endswith(".tar") or SHARD.fullmatch(path.name)):
                problems.append(f"{path}: not a shard of this data set; take it out of the folder")
    return problems


def _check_quarantine(manifest: Manifest) -> list[str]:
    path = place(manifest.directory) / "quarantine.jsonl"
    digest, records = xxhash.xxh3_128(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                records += records_of_line(line)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    except ValueError:
        return [f"{path}: damaged (a line is not one of ours)"]
    if records != manifest.records["quarantined"]:
        return [f"{path}: {records} records, the manifest counts {manifest.records['quarantined']}"]
    if digest.hexdigest() != manifest.records.get("quarantine_xxh3", digest.hexdigest()):
        return [f"{path}: damaged (checksum differs from the manifest)"]
    return []


def _check_counts(manifest: Manifest, train: _Totals) -> list[str]:
    try:
        expected = manifest.load_token_counts()
    except ShardError as error:
        return [str(error)]
    if train.damaged or np.array_equal(train.token_counts, expected):
        return []
    return ["token_counts.bin: not the counts of the train shards"]

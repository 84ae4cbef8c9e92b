"""Shards that lie elsewhere (any fsspec URL: s3://, gs://, http://, file://), read by range, kept in a bounded cache.

The local folder of the data set mirrors what is small: manifest, tokenizer, counts, the validation split; indexes
when they are needed. Blocks are fetched when a batch needs them, by the rank and each process that reads ahead, and
kept as files below FOLDER/.blocks until the cache is full; then those go that were used longest ago. All processes of a
host share the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from data_prep.config_file import ConfigError
from data_prep.shards import Block, ShardEntry, ShardError, ShardReader, SplitReader, index_name

ATTEMPTS = 4
_PAUSE_SECONDS = 0.5


class NoSuchFileError(ShardError):
    """The storage answers, and has no file of this name."""


class Remote:
    """One data set at `url`, mirrored in `directory`, with at most `cache_bytes` of blocks on the local disk."""

    def __init__(self, url: str, directory: Path, cache_bytes: int, readers: int = 1):
        """`readers`: how many processes of a rank read. Raises ConfigError for a URL that cannot be read here."""
        self._described = (url, directory, cache_bytes, readers)
        self.directory, self.cache_bytes = Path(directory), cache_bytes
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"data.remote: {url}: {error}") from None
        self._cache = self.directory / ".blocks"
        # A look at all blocks of a large cache takes longer than it takes to fetch one. So a look leaves a sixteenth of
        # it free, which the processes of this host may fill before the next.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        self._spare_bytes, self._look_after_bytes = cache_bytes // 16, cache_bytes // 16 // (ranks * readers)
        self._unseen_bytes = cache_bytes  # kept since the last look; at the start nothing has been seen

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, self._described  # another process connects itself

    def mirror(self) -> None:
        """Bring the small files here; the manifest comes last, so a folder with one is whole.

        Raises ShardError when the data set cannot be reached, ConfigError when the folder holds other files.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        mark = self.directory / ".mirror.lock"
        # In this order: another rank of the host, which begins with the mark, may be filling the folder right now.
        if any(self.directory.iterdir()) and not mark.exists():
            raise ConfigError(
                f"data.dir: {self.directory} holds files that data.remote did not put there, which a mirror would "
                "replace; give it a new or an empty folder, or leave data.remote out to train on what is there"
            )
        with mark.open("w") as lock:  # one rank of a host at a time
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._mirror()

    def _mirror(self) -> None:
        manifest = self._get("manifest.json")
        here = self.directory / "manifest.json"
        if here.is_file():
            if here.read_bytes() == manifest:
                return
            self._clear()
        for name in (
            "token_counts.bin",
            "tokenizer/tokenizer.model",
            "tokenizer/tokenizer.json",
            "tokenizer/vocab.txt",
        ):
            if self._files.exists(f"{self._root}/{name}"):
                _write(self.directory / name, self._get(name))
        for shard in json.loads(manifest)["splits"].get("validation", {}).get("shards", []):
            self.index("validation", shard["name"])
            _write(self.directory / "validation" / shard["name"], self._get(f"validation/{shard['name']}"))
        _write(here, manifest)

    def _clear(self) -> None:
        """Another data set lies there now: what was kept of the one before has the same names and other content."""
        shutil.rmtree(self._cache, ignore_errors=True)
        for index in self.directory.glob("*/*.index.json"):
            index.unlink(missing_ok=True)

    def reader(self, split: str) -> SplitReader:
        """The rows of one split. Raises ShardError."""
        return RemoteSplitReader(self, self.directory, split)

    def size(self, split: str, shard: str) -> int | None:
        """Bytes of a shard there, None where there is no such file. Raises ShardError when it cannot be asked."""
        name = f"{split}/{shard}"
        try:
            return int(self._try(name, lambda: self._files.size(f"{self._root}/{name}")))
        except NoSuchFileError:
            return None

    def index(self, split: str, shard: str) -> None:
        """Bring the index of one shard here."""
        name = f"{split}/{index_name(shard)}"
        if not (self.directory / name).is_file():
            _write(self.directory / name, self._get(name))

    def block(self, split: str, shard: str, offset: int, length: int) -> bytes:
        """A range of a shard, from the cache or from afar."""
        file = self._block_file(split, shard, offset)
        try:
            data = file.read_bytes()
            if len(data) == length:
                os.utime(file)
                return data
        except OSError:
            pass
        data = self._get(f"{split}/{shard}", offset, offset + length)
        if len(data) == length and length <= self.cache_bytes:
            _write(file, data)
            self._evict(length)
        return data

    def forget(self, split: str, shard: str, offset: int) -> None:
        """Drop a block that turned out damaged from the cache."""
        self._block_file(split, shard, offset).unlink(missing_ok=True)

    def _block_file(self, split: str, shard: str, offset: int) -> Path:
        return self._cache / f"{split}-{shard}-{offset}"

    def _get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file or a range of it. Raises ShardError."""
        return bytes(
            self._try(name, lambda: self._files.cat_file(f"{self._root}/{name}", start=start, end=end))
        )

    def _try(self, name: str, ask: Callable[[], Any]) -> Any:
        """What the storage answers, asked again when the network fails. Raises ShardError, NoSuchFileError."""
        for attempt in range(ATTEMPTS):
            try:
                return ask()
            except FileNotFoundError:
                raise NoSuchFileError(f"{self._root}/{name}: no such file") from None
            except Exception as error:  # every storage has exceptions of its own
                if attempt == ATTEMPTS - 1:
                    raise ShardError(
                        f"{self._root}/{name}: cannot be read after {ATTEMPTS} attempts ({error})"
                    ) from None
                time.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    def _evict(self, added_bytes: int) -> None:
        self._unseen_bytes += added_bytes
        if self._unseen_bytes < self._look_after_bytes:
            return
        self._unseen_bytes, found = 0, []
        for file in self._cache.iterdir():
            try:
                status = file.stat()
            except FileNotFoundError:  # another rank was faster
                continue
            found.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self.cache_bytes - self._spare_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size


class _RemoteShardReader(ShardReader):
    def __init__(self, remote: Remote, manifest: Any, split: str, entry: ShardEntry):
        remote.index(split, entry.name)
        super().__init__(manifest, split, entry)
        self._remote, self._split, self._name = remote, split, entry.name
        self._offset = 0

    def read_range(self, offset: int, length: int) -> bytes:
        self._offset = offset
        return self._remote.block(self._split, self._name, offset, length)

    def read(self, number: int) -> Block:
        try:
            return super().read(number)
        except ShardError:  # once more, from afar: the copy in the cache may be what is damaged
            self._remote.forget(self._split, self._name, self._offset)
            return super().read(number)


class RemoteSplitReader(SplitReader):
    """A SplitReader whose shards lie elsewhere."""

    def __init__(self, remote: Remote, directory: str | Path, split: str):
        self._remote = remote
        super().__init__(directory, split)

    def open_shard(self, entry: ShardEntry) -> ShardReader:
        return _RemoteShardReader(self._remote, self.manifest, self.split, entry)


def _write(file: Path, data: bytes) -> None:
    """Atomic, and under a name of this process, so that several of one host may write the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.rename(file)
